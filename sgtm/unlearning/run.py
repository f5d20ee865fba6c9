"""From a run to a run whose model has unlearned a domain: what `sgtm unlearn` does.

The new directory is as sgtm/unlearning/derived.py has it, its record unlearned.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sgtm.data.trained import trained_tokens
from sgtm.masking.strategy import removal_tables
from sgtm.process.names import did_you_mean
from sgtm.run.adapted import read_adapted
from sgtm.run.checkpoint import open_run, read_manifest
from sgtm.run.evaluate import open_run_corpus
from sgtm.run.unlearned import described, write_unlearned
from sgtm.run.weights_only import save_weights
from sgtm.unlearning.derived import check_out, domain_of, new_run, open_model, own_config, read_text, source_record
from sgtm.unlearning.loop import unlearn
from sgtm.unlearning.methods import METHODS
from sgtm.unlearning.misdirection import layer_of


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
    manifest, of_method = read_manifest(checkpoint), METHODS[method]
    corpus = open_run_corpus(config, run, manifest)
    forget, forget_text = read_text(corpus, config, f"forget:{domain}", seed, of_method.forget)
    retain, retain_text = read_text(corpus, config, "retain", seed, of_method.retain)
    steps, lr = steps or of_method.steps, lr or config.optimizer.lr / of_method.divisor
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
        "source": source_record(run, config, checkpoint),
    }
    if f"forget:{domain}" not in trained_tokens(corpus, config) and not (read_adapted(run) or config.train.init_from):
        print(f"warning: {run} was never trained on {domain}: there is nothing to unlearn", file=sys.stderr)
    all_options = options | ({"seed": seed} if "seed" in of_method.options else {})
    own, tables = own_config(config, corpus, out), removal_tables(config.space, ())
    model = open_model(config, checkpoint)
    with new_run(out, own, steps) as (folder, log):
        unlearn(model, method, forget_text, retain_text, tables, options=all_options, steps=steps, lr=lr, log=log)
        save_weights(folder, model.state_dict(), own, step=manifest["step"], corpus=manifest["corpus"])
        write_unlearned(folder, record)
    print(described(record).replace("`", ""), file=sys.stderr)
    return out


def checked_options(method: str, options: dict) -> dict:
    """All options of a method, those left out at their defaults. Raises ValueError for one that it does not take."""
    if method not in METHODS:
        slip = did_you_mean(method, METHODS)
        raise ValueError(f"unknown method {method!r}{slip}; known methods: {', '.join(METHODS)}")
    defaults = {name: value for name, value in METHODS[method].options.items() if name != "seed"}
    if foreign := [name for name in options if name not in defaults]:
        raise ValueError(f"{method} has no option {', '.join(foreign)}; it takes {', '.join(defaults) or 'none'}")
    return {**defaults, **options}
