"""From a run to a run with low-rank adapters of a domain: what `sgtm adapt` does.

The base is mostly a run that never saw the domain; the adapters are trained on the domain's text, and removing the
domain is leaving them out (the baseline FT-LoRA of GRAM, "Modular Pretraining Enables Access Control", ICML 2026). The
loss of a step is loss(forget) + retain_weight * loss(retain), means over targets, and A and B alone learn
(sgtm/model/adapters.py).

The new directory is as sgtm/unlearning/derived.py has it, its record adapted.json; its checkpoint holds the source's
weights as they are and the adapters (sgtm/run/adapters.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from sgtm.data.trained import trained_tokens
from sgtm.masking.strategy import removal_tables
from sgtm.model.adapters import attach, new_adapters, parameter_count
from sgtm.run.adapted import described_adapters, seen_sentence, write_adapted
from sgtm.run.adapters import DomainAdapters, adapted_domain, weights_of
from sgtm.run.checkpoint import open_run, read_manifest
from sgtm.run.evaluate import open_run_corpus
from sgtm.run.weights_only import save_weights
from sgtm.unlearning.derived import check_out, domain_of, new_run, open_model, own_config, read_text, source_record
from sgtm.unlearning.loop import descend
from sgtm.unlearning.text import Loss, mean_loss

RANK, ALPHA, RETAIN_WEIGHT = 16, 32.0, 1.0
"""The learning rate is the run's own peak. The paper's is 2e-4 for GPT-2 medium and large (table 11), and GPT-3 was
pretrained at 3e-4 and 2.5e-4 in these sizes (arXiv 2005.14165, table 2.1)."""


def adapt_run(
    run: str | Path,
    out: str | Path,
    *,
    domain: str | None = None,
    rank: int = RANK,
    alpha: float = ALPHA,
    retain_weight: float = RETAIN_WEIGHT,
    steps: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    data: str | None = None,
) -> Path:
    """Train adapters of a domain on the newest checkpoint of a run and write the run directory `out`; returns it.

    domain         None: the run's only one. Forget text is that of its categories, retain text that of categories
                   labelled `retain`, both of the split train
    rank, alpha    of the adapters: their product is scaled by alpha / rank
    retain_weight  of the loss on retain text; with 0 none is read
    steps          None: one pass over the forget text; lr: None: the run's peak learning rate
    seed           of A, and of the order of the sequences
    data           `data.path` to take, of the same corpus; None: that of the run

    Raises ValueError before any step for an `out` that exists and is not empty, a domain that there is not, a folder
    that is no run, a checkpoint that is damaged or has adapters already, a rank that a matrix cannot have, data that
    are gone or another corpus, a category without text; and where the training diverges. Then there is no `out`.
    """
    run, out = Path(run), Path(os.path.abspath(out))
    check_out(out)
    config, checkpoint = open_run(run, data)
    if (earlier := adapted_domain(checkpoint)) is not None:
        raise ValueError(f"{run} has adapters already, of {earlier}; adapt the run that it was made from")
    domain, manifest = domain_of(config, domain, run), read_manifest(checkpoint)
    corpus = open_run_corpus(config, run, manifest)
    forget, forget_text = read_text(corpus, config, f"forget:{domain}", seed)
    retain, retain_text = read_text(corpus, config, "retain", seed, read=retain_weight > 0)
    assert forget_text is not None  # it is read
    weights = weights_of(checkpoint)
    adapters = new_adapters(weights, rank, seed)
    if steps is None:
        steps = -(-len(forget_text) // forget_text.size)
        print(f"one pass over {domain}: {len(forget_text):,} sequences, {steps:,} steps of {forget_text.size}")
    lr = lr or config.optimizer.lr
    tokens = {"forget": 0, "retain": 0}
    record = {
        "domain": domain,
        "forget": forget,
        "retain": retain,
        "options": {"rank": rank, "alpha": alpha, "retain_weight": retain_weight},
        "steps": steps,
        "lr": lr,
        "seed": seed,
        "batch": forget_text.size,
        "parameters": parameter_count(adapters),
        "tokens": tokens,
        "seen": f"forget:{domain}" in trained_tokens(corpus, config),
        "source": source_record(run, config, checkpoint),
    }
    if record["seen"]:
        remedy = ", ".join(f"{category}: 0" for category in forget)
        print(f"warning: {seen_sentence(record).replace('`', '')} Train one with", file=sys.stderr)
        print(f"  --masking.strategy none --data.upsample '{{{remedy}}}'", file=sys.stderr)
    own, model = own_config(config, corpus, out), open_model(config, checkpoint)
    learning = attach(model, adapters, alpha / rank)
    device, tables = next(model.parameters()).device, removal_tables(config.space, ())

    def loss_of(step: int) -> Loss:
        total, parts = torch.zeros((), device=device), {}
        for name, sequences, weight in (("forget", forget_text, 1.0), ("retain", retain_text, retain_weight)):
            if sequences is not None:
                text = sequences.text(step, device, tables)
                loss = mean_loss(model, text)
                tokens[name] += int(text.chosen.sum())
                total, parts[f"loss/{name}"] = total + weight * loss, loss.detach()
        return Loss(total, parts)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with new_run(out, own, steps) as (folder, log):
        descend(parameters, loss_of, kind="adapt", what="adapters", steps=steps, lr=lr, log=log)
        of_domain = DomainAdapters(domain, alpha, learning)
        save_weights(folder, weights, own, step=manifest["step"], corpus=manifest["corpus"], adapters=of_domain)
        write_adapted(folder, record)
    print(described_adapters(record).replace("`", ""), file=sys.stderr)
    return out
