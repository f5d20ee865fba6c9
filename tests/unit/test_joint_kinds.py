"""Every kind of `update_joint` masks its own parameters and no others.

One kind at a time is masked for a domain's tokens, on a step of such tokens alone: the gradient of exactly that kind's
parameters must be 0, and every other one must keep every bit. A tied matrix is of two kinds, and what each contributes
is what an untied twin with the same weights gets.
"""

from fnmatch import fnmatch

import pytest
import torch
from families import BIO, FAMILIES, SPACE, gradients, model_of, random_step

from sgtm.masking.strategy import build_tables
from sgtm.model.rows import live_keys
from sgtm_kernels.plan import JOINT_KINDS
from sgtm_kernels.testing import EXACT

PARAMETERS = {
    "attn_out_bias": "blocks.*.attention.b_o",
    "mlp_out_bias": "blocks.*.mlp.b_out",
    "norm": "blocks.*_norm.*",
    "final_norm": "final_norm.*",
    "embedding": "embedding",
    "position": "position",
    "head": "head",
    "head_bias": "head_bias",
}
BATCHES = random_step("step", seed=1, label=BIO)

by_backend = pytest.mark.parametrize("backend", EXACT)
by_family = pytest.mark.parametrize("family", FAMILIES)


def tables(*masked: str):
    return build_tables(SPACE, "none", overrides={f"update_joint.forget:bio.{kind}": 0 for kind in masked})


def twins(family: str, backend: str):
    """Models of equal weights, the head of one being its embedding."""
    tied = model_of(family, backend, tie_embeddings=True)
    untied = model_of(family, backend, tie_embeddings=False)
    untied.load_state_dict(tied.state_dict() | {"head": tied.embedding.detach().clone()})
    return tied, untied


def assert_frozen_rows_are_those_without_gradient(model, grads: dict[str, torch.Tensor], *masked: str) -> None:
    live = live_keys(tables(*masked), [BIO])
    for name, rows in model.parameter_rows().items():
        assert bool((grads[name] != 0).any()) == any(key in live for key in rows.keys), name


def test_every_kind_is_here():
    assert set(PARAMETERS) == set(JOINT_KINDS)


@by_backend
@by_family
@pytest.mark.parametrize("kind", JOINT_KINDS)
def test_a_kind_masks_its_parameters_and_no_others(kind, family, backend):
    _, model = twins(family, backend)
    before, after = (gradients(model, BATCHES, tables(*masked)) for masked in ((), (kind,)))
    mine = {name for name in before if fnmatch(name, PARAMETERS[kind])}
    assert bool(mine) == (family == "gpt_neo" or kind in ("norm", "final_norm", "embedding", "head"))
    for name, gradient in before.items():
        assert bool((gradient != 0).any()), name
        assert torch.equal(after[name], torch.zeros_like(gradient) if name in mine else gradient), name
    assert_frozen_rows_are_those_without_gradient(model, after, kind)


@by_backend
@by_family
@pytest.mark.parametrize("masked", [("embedding",), ("head",), ("embedding", "head")], ids="+".join)
def test_a_tied_matrix_is_embedding_and_head(masked, family, backend):
    tied, untied = twins(family, backend)
    parts = gradients(untied, BATCHES, tables())
    left = [parts[kind] for kind in ("embedding", "head") if kind not in masked]
    before, after = (gradients(tied, BATCHES, tables(*kinds)) for kinds in ((), masked))
    assert torch.equal(after["embedding"], sum(left, torch.zeros_like(parts["head"])))
    for name in before.keys() - {"embedding"}:
        assert torch.equal(after[name], before[name]), name
    assert_frozen_rows_are_those_without_gradient(tied, after, *masked)
