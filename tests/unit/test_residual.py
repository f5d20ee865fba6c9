"""The warning about a residual stream that grows: when, once, with which cause; logged and printed."""

from __future__ import annotations

import math

import pytest
from tiny import tiny_config

from sgtm.run.metrics import MetricsLog, read_metrics
from sgtm.run.residual import GROWTH, ResidualWatch, mixed_labels

WARM_UP = {"lr": 1e-3, "warmup_steps": 8}


def line(step: int, **norms: float) -> dict:
    """`retain=3.0`: the last layer's norm on retain tokens; the layers before have others."""
    by_layer = {label: [1.0 + 99 * step, 50.0, norm] for label, norm in norms.items()}
    by_label = {label.replace("_", ":"): {"residual": norms} for label, norms in by_layer.items()}
    return {"kind": "step", "step": step, "norms": by_label}


def warnings(lines: list[dict], recipe: str | None = None, **sections) -> list[str]:
    config = tiny_config(optimizer=WARM_UP, **sections)
    watch = ResidualWatch(config.model_copy(update={"recipe": recipe}))
    return [warning for warning in map(watch.see, lines) if warning]


def test_a_growing_stream_warns_once_with_cause_and_remedy():
    growth = [2, 6, 10, 30, 10 * GROWTH - 1, 10 * GROWTH, 500]
    lines = [line(step, retain=5.0, unlabeled=norm) for step, norm in zip((1, 2, 4, 6, 8, 10, 12), growth, strict=True)]
    (warning,) = warnings(lines)
    assert warning.startswith(
        "step 10: the residual stream grows: its norm after the last layer is 60 on unlabeled tokens"
    )
    assert "6.0 times its early norm 10; " in warning
    assert "Likely cause: unlabeled tokens train the retain group while a forget group is active" in warning
    lower = "; or a lower optimizer.lr than 0.001, at which a run without them may grow too"
    assert "Remedy: recipe: dual, whose domains have" in warning and warning.endswith(lower)
    (warning,) = warnings(lines, recipe="dual")
    assert "recipe: dual" not in warning and warning.endswith(lower)
    assert "a larger share of the retain data trained as retain (data.channel)" in warning


def test_a_healthy_stream_does_not_warn():
    assert warnings([line(step, retain=min(step, 12.0), forget_es=9 + step % 5) for step in range(2, 40, 2)]) == []


def test_a_label_that_first_occurs_late_is_compared_with_itself():
    assert warnings([line(2, retain=4.0), line(20, forget_es=50.0), line(30, forget_es=60.0, retain=23.9)]) == []
    assert len(warnings([line(2, retain=4.0), line(20, forget_es=50.0), line(30, forget_es=301.0)])) == 1


def test_growth_from_the_norm_of_the_embedding_is_that_of_every_run():
    """The hidden size is 9, so that the early norm is at least 3."""
    assert warnings([line(2, retain=0.1), line(30, retain=17.9)]) == []
    assert len(warnings([line(2, retain=0.1), line(30, retain=18.0)])) == 1


@pytest.mark.parametrize("norm", [None, math.nan, math.inf, 0.0])
def test_what_is_no_norm_is_passed_over(norm):
    assert warnings([line(2, retain=norm), line(4, retain=4.0), line(6, retain=norm), line(8, retain=23.0)]) == []
    assert warnings([{"kind": "step", "step": 1}, {"kind": "eval", "step": 1, "norms": {"full": {}}}]) == []


@pytest.mark.parametrize(("strategy", "labels"), [("sgtm", ["retain", "forget_es"]), ("none", ["unlabeled", "retain"])])
def test_where_no_masked_label_can_be_the_cause_it_is_the_learning_rate(strategy, labels):
    lines = [line(4, **dict.fromkeys(labels, 1.0)), line(9, **dict.fromkeys(labels, 19.0))]
    (warning,) = warnings(lines, masking={"strategy": strategy, "joint": "free"})
    assert warning.endswith("Likely cause: optimizer.lr 0.001 is too high; lower it")


def test_the_cause_is_in_the_tables():
    config = tiny_config(masking={"domains": ["es", "fr"], "joint": "free", "strategy": "sgtm"})
    assert mixed_labels(config.tables) == ["unlabeled"]
    overrides = {"update.unlabeled.retain." + part: 0.0 for part in ("attn_in", "attn_out", "mlp_in", "mlp_out")}
    config = tiny_config(masking={"joint": "free", "overrides": overrides})
    assert mixed_labels(config.tables) == []


def test_open_labels_of_every_domain_are_a_cause():
    sections = {
        "masking": {"domains": ["es", "fr"], "joint": "free"},
        "data": {"channel": {"retain": {"retain": 0.5, "open:es": 0.25, "open:fr": 0.25}}},
    }
    assert mixed_labels(tiny_config(**sections).tables) == ["unlabeled", "open:es", "open:fr"]
    for label in ("open:es", "open:fr"):
        lines = [line(step, retain=5.0, **{label.replace(":", "_"): norm}) for step, norm in ((4, 10.0), (9, 60.0))]
        (warning,) = warnings(lines, **sections)
        assert f"Likely cause: {label} tokens train the retain group while a forget group is active" in warning


def test_it_is_printed_and_logged_once_also_by_a_resumed_run(tmp_path, capsys):
    values = {"seconds": 1.0, "loss": 2.0, "tokens_per_second": 3.0}
    lines = [
        line(2, unlabeled=4.0),
        line(10, unlabeled=28.0),
        line(12, unlabeled=29.0, retain=math.nan),
        line(14, unlabeled=9.0),
        line(16, unlabeled=60.0),
    ]
    for start, mine in ((0, lines[:3]), (12, lines[3:])):
        log = MetricsLog(tmp_path, tiny_config(optimizer=WARM_UP), rank=0, start=start)
        log.open()
        with log:
            for values_of_line in mine:
                log.step({**values_of_line, **values})
    logged = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if entry["kind"] == "warning"]
    assert [entry["step"] for entry in logged] == [10]
    assert '"retain": {"residual": [1189.0, 50.0, null]}' in (tmp_path / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count(f"warning: {logged[0]['text']}") == 1
