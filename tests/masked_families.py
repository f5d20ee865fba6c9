"""What masked models of every family do in the transformers that is imported first: JSON on stdout, by family.

python tests/masked_families.py
"""

from __future__ import annotations

import json

import torch
import transformers
from hf_models import CONFIGS, by_key, differing, gradients_of, masked_model, plain_model, random_ids

from sgtm.integrations.hf import ablate, without_domains

BATCHES = ((["forget:bio"] * 3, random_ids(3)), (["retain"] * 3, random_ids(3, 1)))


def facts_of(family: str) -> dict:
    """version, whether the logits of unlabeled tokens are the plain ones, the keys that bio's tokens and those of
    retain teach, those that a checkpoint changes (by kind), and whether `removed` computes what `ablate` does."""
    model, plain = masked_model(family, joint="strict"), plain_model(family)
    model.config.use_cache = plain.config.use_cache = False
    ids = random_ids(3)
    logits = [model(input_ids=ids, sgtm_labels=[0] * 3).logits, plain(input_ids=ids).logits]
    apart = [by_key(model, gradients_of(model, ids, labels)) for labels, ids in BATCHES]
    taught = [sorted({key[0] for key, gradient in pieces.items() if gradient.any()}) for pieces in apart]
    checkpointed = {kind: changed_by_checkpoint(model, kind, apart) for kind in (True, False)}
    model.eval()
    with torch.no_grad(), ablate(model, ["bio"]):
        ablated = model(input_ids=ids).logits
    return {
        "version": transformers.__version__,
        "same_logits": torch.equal(*logits),
        "taught": taught,
        "checkpointed": [checkpointed[True], checkpointed[False]],
        "removed": torch.equal(without_domains(model, ["bio"])(input_ids=ids).logits, ablated),
    }


def changed_by_checkpoint(model, reentrant: bool, apart: list[dict]) -> list[str]:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [model(input_ids=ids, labels=ids, sgtm_labels=labels).loss for labels, ids in BATCHES]
    changed: set[str] = set()
    for loss, expected in zip(losses, apart, strict=True):
        model.zero_grad()
        loss.backward()
        changed |= differing(expected, by_key(model, {name: p.grad for name, p in model.named_parameters()}))
    model.gradient_checkpointing_disable()
    return sorted(changed)


if __name__ == "__main__":
    print(json.dumps({family: facts_of(family) for family in CONFIGS}))
