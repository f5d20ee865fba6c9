"""Steps of two ranks on masked Hugging Face models, and the weights that one process has after each."""

from __future__ import annotations

from hf_models import MASKING, by_key, masked_model, random_ids

from sgtm.integrations.hf import SgtmAdamW

OWN = {f"{projection}.bio" for projection in ("attn_in", "attn_out", "mlp_in", "mlp_out")}
STRICT = MASKING | {"joint": "strict"}
# What the two ranks train on in each step: together, then apart, then no token of retain.
STEPS = [
    (["retain", "forget:bio"], ["forget:code", "unlabeled"]),
    (["retain", "retain"], ["forget:bio", "forget:bio"]),
    (["forget:bio", "forget:bio"], ["forget:bio", "forget:bio"]),
]
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-4}


def one_process(family: str, masking: dict = STRICT) -> list[dict]:
    """Weights by piece, before the first step and after each: what all ranks together must reach."""
    model = masked_model(family, **masking)
    optimizer = SgtmAdamW(model, **OPTIONS)
    history = [pieces_of(model, dict(model.named_parameters()))]
    for number, labels in enumerate(STEPS):
        for rank in range(2):
            ids = random_ids(2, 10 * number + rank)
            (model(input_ids=ids, labels=ids, sgtm_labels=labels[rank]).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(pieces_of(model, dict(model.named_parameters())))
    return history


def pieces_of(model, tensors) -> dict:
    return {key: piece.detach().clone() for key, piece in by_key(model, tensors).items()}
