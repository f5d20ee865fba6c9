"""The one warning about a residual stream that grows.

Where retain weights learn from tokens on which a forget group is active, the two groups can out-shout one another: both
outputs grow, gradients through the norms shrink in proportion, and learning stalls while nothing else looks wrong.
Measured on novels at a million parameters (learning rate 2e-3, 50 steps of warm-up): with nothing masked the norm after
the last layer was 12 in the middle of the warm-up and at most 27 later, 2.2 times as much; where three quarters of the
retain data were trained `unlabeled` it was 19 and grew to 295, 18 times as much. `GROWTH` lies between, as far from one
as from the other. At a learning rate of 5e-4 neither stream grew (7 and 12).
"""

from __future__ import annotations

import math

from sgtm.config.schema import Config
from sgtm_kernels.plan import PROJECTIONS, Tables

GROWTH = 6.0
"""Multiple of its early norm from which on a residual stream is called growing."""


class ResidualWatch:
    """Reads the lines of `metrics.jsonl` in order, those before a resume too, and warns once.

    The early norm of a label is that of its last line in the first half of the warm-up, or of its first line where it
    has none there; and at least the square root of the hidden size, which is the norm of what every layer reads. Below
    that the stream of every run grows, from the norm of the embedding.
    """

    def __init__(self, config: Config):
        self.config, self.warned = config, False
        self.warm_up = config.optimizer.warmup(config.train.steps)
        self.early: dict[str, float] = {}

    def see(self, line: dict) -> str | None:
        """The warning, at the first line that gives reason for it."""
        if line["kind"] != "step":
            return None
        now = {label: parts["residual"][-1] for label, parts in line.get("norms", {}).items()}
        now = {label: norm for label, norm in now.items() if norm is not None and math.isfinite(norm) and norm > 0}
        for label, norm in now.items():
            if label not in self.early or line["step"] <= self.warm_up / 2:
                self.early[label] = max(norm, math.sqrt(self.config.model.hidden_size))
        worst = max(now, key=lambda label: now[label] / self.early[label], default=None)
        if self.warned or worst is None or now[worst] < GROWTH * self.early[worst]:
            return None
        self.warned = True
        return (
            f"step {line['step']}: the residual stream grows: its norm after the last layer is {now[worst]:.3g} on "
            f"{worst} tokens, {now[worst] / self.early[worst]:.1f} times its early norm {self.early[worst]:.3g}; "
            f"gradients shrink in proportion, and learning stalls. {self._advice()}"
        )

    def _advice(self) -> str:
        labels = [label for label in mixed_labels(self.config.tables) if label in self.early]
        if not labels or self.config.masking.strategy == "none":
            return f"Likely cause: optimizer.lr {self.config.optimizer.lr:g} is too high; lower it"
        dual = self.config.recipe == "dual"
        more = "a larger share of the retain data trained as retain (data.channel)" if dual else DUAL
        return (
            f"Likely cause: {' and '.join(labels)} tokens train the retain group while a forget group is active, and "
            f"the groups out-shout one another. Remedy: {more}; or a lower optimizer.lr than "
            f"{self.config.optimizer.lr:g}, at which a run without them may grow too"
        )


DUAL = "recipe: dual, whose domains have an embedding of their own and whose retain data are mostly trained as retain"


def mixed_labels(tables: Tables) -> list[str]:
    """The labels that train the retain group while a forget group is active."""
    return [
        name
        for label, name in enumerate(tables.labels)
        if any(tables.contribution(projection, label, 0) != 0 for projection in PROJECTIONS)
        and any(active != 0 for active in tables.active[label][1:])
    ]
