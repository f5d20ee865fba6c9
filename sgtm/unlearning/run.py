"""From a run to a run whose model has unlearned a domain: what `sgtm unlearn` does.

The new directory appears when it is complete. It holds config.yaml (the source's, with name and place of its own),
one checkpoint of weights alone with the source's step, metrics.jsonl (the steps of the unlearning), unlearned.json and
environment.jsonl.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sgtm.config.errors import ConfigError
from sgtm.config.load import save_config
from sgtm.config.schema import RUN_NAME, Config
from sgtm.config.sections import SteeringConfig
from sgtm.data.store import Corpus
from sgtm.distributed.self_check import check_kernels
from sgtm.files import sha256_of, sync_directory
from sgtm.masking.strategy import removal_tables
from sgtm.process.names import did_you_mean
from sgtm.run.checkpoint import MANIFEST, open_run, read_manifest
from sgtm.run.environment import record_environment
from sgtm.run.evaluate import load_model, open_run_corpus
from sgtm.run.located import SYNTHETIC, record_folder
from sgtm.run.unlearned import described, read_unlearned, write_unlearned
from sgtm.run.weights_only import save_weights
from sgtm.unlearning.loop import unlearn
from sgtm.unlearning.methods import METHODS
from sgtm.unlearning.misdirection import layer_of
from sgtm.unlearning.text import Sequences

LINES = 10  # that are printed of an unlearning


def unlearn_run(
    run: str | Path,
    method: str,
    out: str | Path,
    *,
    domain: str | None = None,
    options: dict | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    data: str | None = None,
) -> Path:
    """Unlearn a domain in the newest checkpoint of a run and write the result as the run directory `out`; returns it.

    method   of `sgtm.unlearning.methods.METHODS`
    domain   None: the run's only one. Forget text is that of its categories, retain text that of categories labelled
             `retain`, both of the split train
    options  of the method, by name; those left out have the paper's values
    steps    None: the method's; lr: None: the run's peak learning rate over the method's divisor
    seed     of the order of the sequences and of RMU's direction
    data     `data.path` to take, of the same corpus; None: that of the run

    Raises ValueError before any step for an `out` that exists and is not empty, a method, option or domain that there
    is not, a folder that is no run, a checkpoint that is damaged, data that are gone or another corpus, a category
    without text; and where the unlearning diverges. Then there is no `out`.
    """
    run, out = Path(run), Path(os.path.abspath(out))
    check_out(out)
    options = checked_options(method, options or {})
    config, checkpoint = open_run(run, data)
    domain = domain_of(config, domain, run)
    if "layer" in options:
        options["layer"] = layer_of(config.model.layers, options["layer"])
    corpus = open_run_corpus(config, run, read_manifest(checkpoint))
    of_method = METHODS[method]
    forget, retain = (
        categories_of(corpus, label) if read else []
        for label, read in ((f"forget:{domain}", of_method.forget), ("retain", of_method.retain))
    )
    forget_text, retain_text = (Sequences(corpus, config, names, seed) if names else None for names in (forget, retain))
    steps, lr = steps or of_method.steps, lr or config.optimizer.lr / of_method.divisor
    manifest = read_manifest(checkpoint)
    record = {
        "method": method,
        "options": options,
        "domain": domain,
        "forget": forget,
        "retain": retain,
        "steps": steps,
        "lr": lr,
        "seed": seed,
        "batch": config.for_ranks(1).micro_batch,
        "source": _source(run, config, checkpoint, manifest["step"]),
    }
    all_options = options | ({"seed": seed} if "seed" in of_method.options else {})
    own, model, tables = own_config(config, corpus, out), _model(config, checkpoint), removal_tables(config.space, ())
    with _filled(out) as folder:
        with (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as file:
            log = _log(file.write, steps)
            unlearn(model, method, forget_text, retain_text, tables, options=all_options, steps=steps, lr=lr, log=log)
        save_weights(folder, model.state_dict(), own, step=manifest["step"], corpus=manifest["corpus"])
        write_unlearned(folder, record)
        record_folder(folder)
        record_environment(folder)
        save_config(own, folder / "config.yaml")
    print(described(record).replace("`", ""), file=sys.stderr)
    return out


def check_out(out: Path) -> None:
    """Raises ValueError where `out` exists and is not an empty folder, or has a name that no run may have."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; give a new one with --out")
    if not re.fullmatch(RUN_NAME, out.name):
        raise ConfigError(f"--out {out}: a run directory has a name of letters, digits and . + - _; give another one")


def checked_options(method: str, options: dict) -> dict:
    """All options of a method, those left out at their defaults. Raises ValueError for one that it does not take."""
    if method not in METHODS:
        slip = did_you_mean(method, METHODS)
        raise ValueError(f"unknown method {method!r}{slip}; known methods: {', '.join(METHODS)}")
    defaults = {name: value for name, value in METHODS[method].options.items() if name != "seed"}
    if foreign := [name for name in options if name not in defaults]:
        raise ValueError(f"{method} has no option {', '.join(foreign)}; it takes {', '.join(defaults) or 'none'}")
    return {**defaults, **options}


def domain_of(config: Config, domain: str | None, run: Path) -> str:
    """The domain to unlearn. Raises ValueError for one that the run does not have, and where it is not clear which."""
    domains = config.space.domains
    if domain is None and len(domains) == 1:
        return domains[0]
    if domain in domains:
        return domain
    known = ", ".join(domains) or "none"
    if domain is None:
        raise ValueError(f"{run} has several domains or none ({known}); give one with --domain")
    raise ValueError(f"{run} has no domain {domain!r}{did_you_mean(domain, domains)}; its domains are {known}")


def categories_of(corpus: Corpus, label: str) -> list[str]:
    """Categories of a true label. Raises ValueError where there is none."""
    if names := [category for category, true_label in corpus.categories.items() if true_label == label]:
        return names
    labelled = ", ".join(f"{category} ({name})" for category, name in corpus.categories.items())
    raise ValueError(f"{corpus.path} has no category with the label {label}; its categories are {labelled}")


def _model(config: Config, checkpoint: Path):
    train = config.train.model_copy(update={"precision": "fp32"})
    for warning in check_kernels(config.model_copy(update={"train": train}), lambda action: [action()]):
        print(warning, file=sys.stderr)
    model = load_model(config, checkpoint)
    model.steering = None  # what is unlearned is the model that an export gives
    return model


def _source(run: Path, config: Config, checkpoint: Path, step: int) -> dict:
    source = {"run": config.name, "checkpoint": checkpoint.name, "step": step}
    earlier = read_unlearned(run)
    return source | {"manifest_sha256": sha256_of(checkpoint / MANIFEST)} | ({"unlearned": earlier} if earlier else {})


def own_config(config: Config, corpus: Corpus, out: Path) -> Config:
    """That of the new run, which finds the same corpus and adds no direction."""
    path, beside = config.data.path, Path(os.path.abspath(corpus.path))
    if path == SYNTHETIC and beside.parent != out.parent:
        path = str(beside)
    data = config.data.model_copy(update={"path": path})
    own = {"name": out.name, "runs": str(out.parent), "data": data, "steering": SteeringConfig()}
    return config.model_copy(update=own)


def _log(write: Callable[[str], object], steps: int) -> Callable[[dict], None]:
    every = max(1, steps // LINES)

    def line(values: dict) -> None:
        write(json.dumps(values) + "\n")
        if values["step"] % every == 0 or values["step"] == steps:
            parts = (f"{name} {value:.4g}" for name, value in values.items() if name.startswith(("loss", "distance")))
            print(f"step {values['step']}/{steps}  {'  '.join(parts)}")

    return line


@contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `out` when the block ends; after an error it is gone."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)  # an empty folder is replaced
        sync_directory(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
