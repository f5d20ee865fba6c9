"""A domain's direction: the difference of mean activations, what `sgtm direction` measures.

    v_l = mean over forget tokens of h_l  -  mean over retain tokens of h_l        (arXiv 2507.21509)

h_l: fp32 residual stream [D] after block l, at every position that has a target. Forget text is that of the domain's
categories, retain text that of the categories labelled `retain`, both of the split `train`: the first sequences of a
shuffled order. All groups are active and no direction is added. Sums are fp64.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sgtm.data.shuffled_sequences import SPLIT
from sgtm.files import sha256_of
from sgtm.masking.strategy import removal_tables
from sgtm.model.direction import write_direction
from sgtm.model.streams import residual_streams
from sgtm.model.transformer import Transformer
from sgtm.run.checkpoint import MANIFEST, open_run, read_manifest
from sgtm.run.evaluate import open_run_corpus
from sgtm.unlearning.derived import domain_of, open_model, read_text
from sgtm.unlearning.text import Sequences
from sgtm.words import listed
from sgtm_kernels.plan import Tables

SEQUENCES = 512


class Means(NamedTuple):
    """Over the tokens of a text that have a target.

    hidden  fp64 [layers, D]: mean residual stream after each block
    norms   fp64 [layers]: mean of its L2 norm
    """

    hidden: torch.Tensor
    norms: torch.Tensor
    tokens: int


def direction_of_text(
    run: str | Path,
    out: str | Path,
    *,
    domain: str | None = None,
    layer: int | None = None,
    sequences: int | None = None,
    data: str | None = None,
) -> dict:
    """Measure a domain's direction in the newest checkpoint of a run, write it to `out` and return its record.

    domain     None: the run's only one
    layer      that `steering.layer: null` takes; None: half of the depth
    sequences  of forget text and of retain text each; None: SEQUENCES, or all where there are fewer
    data       `data.path` to take, of the same corpus; None: that of the run

    Raises ValueError before anything is computed for an `out` that cannot be a file, a domain or layer that the run
    does not have, a folder that is no run, a checkpoint that is damaged, data that are gone or another corpus, a
    category without text, and fewer sequences than `sequences`.
    """
    run, out = Path(run), Path(out)
    if out.suffix != ".safetensors" or out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: give a file in a folder that exists, whose name ends in .safetensors")
    config, checkpoint = open_run(run, data)
    domain = domain_of(config, domain, run)
    layers = config.model.layers
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"--layer {layer}: the model has {layers} blocks, counted from 0")
    manifest = read_manifest(checkpoint)
    corpus = open_run_corpus(config, run, manifest)
    labels = {"forget": f"forget:{domain}", "retain": "retain"}
    read = {name: read_text(corpus, config, label, seed=0) for name, label in labels.items()}
    categories = {name: names for name, (names, _) in read.items()}
    texts = {name: text for name, (_, text) in read.items() if text is not None}
    few = {name: len(text) for name, text in texts.items() if len(text) < (sequences or 0)}
    if few:
        named = listed([f"{count} of {name} text" for name, count in few.items()])
        raise ValueError(
            f"--sequences {sequences}: split {SPLIT} of {corpus.path} has {named}; give at most {min(few.values())}, "
            f"or leave it out for up to {SEQUENCES}"
        )
    model, tables = open_model(config, checkpoint), removal_tables(config.space, ())
    means = {name: mean_hidden(model, text, tables, sequences or SEQUENCES) for name, text in texts.items()}
    vectors = (means["forget"].hidden - means["retain"].hidden).float()
    units = torch.nn.functional.normalize(vectors.double(), dim=1)
    record = {
        "run": config.name,
        "checkpoint": checkpoint.name,
        "step": manifest["step"],
        "manifest_sha256": sha256_of(checkpoint / MANIFEST),
        "domain": domain,
        "layer": layers // 2 if layer is None else layer,
        "split": SPLIT,
        "categories": categories,
        "tokens": {name: of.tokens for name, of in means.items()},
        "norms": {name: of.norms.tolist() for name, of in means.items()},
        "projections": {name: (of.hidden * units).sum(1).tolist() for name, of in means.items()},
    }
    write_direction(out, vectors.numpy(), record)
    return record


@torch.no_grad()
def mean_hidden(model: Transformer, text: Sequences, tables: Tables, limit: int) -> Means:
    """Of the first `limit` sequences of the text, on the model's device, with the masks of these tables."""
    device, left, tokens = next(model.parameters()).device, min(limit, len(text)), 0
    sums = torch.zeros(len(model.blocks), model.config.hidden_size, dtype=torch.float64, device=device)
    norms = torch.zeros(len(model.blocks), dtype=torch.float64, device=device)
    with residual_streams(model) as states:
        for step in range(-(-left // text.size)):
            part = text.text(step, device, tables)
            chosen = part.chosen
            chosen[left - step * text.size :] = False  # the order begins again there
            states.clear()
            model.last_hidden(part.input_ids, part.plan)
            for index, x in enumerate(states):
                hidden = x[chosen].double()
                sums[index] += hidden.sum(0)
                norms[index] += hidden.norm(dim=-1).sum()
            tokens += int(chosen.sum())
    return Means((sums / tokens).cpu(), (norms / tokens).cpu(), tokens)


def described(record: dict) -> str:
    """A table of the layers: norms and projections of both sets, and the length of the difference."""
    lines = [
        f"{record['domain']} in {record['run']} after step {record['step']:,}: {record['tokens']['forget']:,} forget "
        f"tokens, {record['tokens']['retain']:,} retain tokens",
        "layer  |forget|  |retain|  forget on direction  retain on direction  length",
    ]
    columns = (
        (record["norms"][s] for s in ("forget", "retain")),
        (record["projections"][s] for s in ("forget", "retain")),
    )
    for layer, (a, b, p, q) in enumerate(zip(*columns[0], *columns[1], strict=True)):
        chosen = "*" if layer == record["layer"] else " "
        lines.append(f"{layer:4d}{chosen} {a:9.4g} {b:9.4g} {p:20.4g} {q:20.4g} {p - q:7.4g}")
    return "\n".join(lines)
