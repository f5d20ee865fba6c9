"""Which model a path names: a run, with or without some of its domains, or an exported folder.

Nothing heavy is imported: what is wrong with a path or a domain shows before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgtm.config.errors import ConfigError
from sgtm.config.schema import Config
from sgtm.masking.labels import LabelSpace
from sgtm.run.adapted import read_adapted
from sgtm.run.located import check_run
from sgtm.words import listed


@dataclass(frozen=True)
class ModelSource:
    """config: of a run; None of an exported folder. data: `data.path` to take instead of the run's."""

    path: Path
    config: Config | None
    data: str | None = None

    @property
    def removable(self) -> tuple[str, ...]:
        """Domains without which there is a model, in the order of the config: of an adapted run the one in adapters;
        none of an exported folder, or of a run without masks."""
        if self.config is None:
            return ()
        if (adapted := read_adapted(self.path)) is not None:
            return (adapted["domain"],)
        return tuple(self.config.masking.domains) if self.config.removes_groups or self.config.steered else ()

    def removed(self, domains: Sequence[str]) -> tuple[str, ...]:
        """The set of these domains, in the order of the config. Raises ValueError where one cannot be removed."""
        if not domains:
            return ()
        if self.config is None:
            raise ValueError(
                f"{self.path} is an exported folder, of which {listed(domains)} cannot be removed: only its run has "
                f"the groups; give the run, or an export without"
            )
        removable = self.removable
        if not removable:
            raise ValueError(
                f"{self.path} was trained without masks: no group of it holds {listed(domains)}, and nothing can be "
                f"removed; give a run that was trained with masks"
            )
        space = LabelSpace(removable)
        for domain in domains:
            space.group_of(domain)
        return tuple(domain for domain in removable if domain in domains)


def find_model(path: Path, data: str | None = None) -> ModelSource:
    """The run or the exported folder at a path.

    data  `data.path` to take instead of the run's

    Raises ValueError where it is neither, where the data of a run are gone, and for an export without a tokenizer.
    """
    is_run = (path / "config.yaml").is_file()
    if not is_run and (path / "config.json").is_file():
        if not (path / "tokenizer.json").is_file():
            raise ValueError(
                f"{path} has no tokenizer.json, so it cannot read a text; export the run again, with --data.path DIR "
                f"where its corpus has moved"
            )
        return ModelSource(path, None)
    try:
        return ModelSource(path, check_run(path, data), data)
    except ConfigError as error:  # which lists the runs here
        raise error if is_run else ValueError(f"{error}; nor is it an exported folder (no config.json)") from None
