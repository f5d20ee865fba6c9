"""A domain at a strength from 0 to 1: the model whose output rows of the domain's group are multiplied by it.

Strength 1 is the full model and 0 the one without the domain, bit for bit; in between, the weights of such a model are
a straight line, which sgtm/evaluation/pair.py continues to the full model.
"""

from __future__ import annotations

import pytest
import torch
from families import CONTEXT, FAMILIES, SPACE, VOCAB, model_of

from sgtm.evaluation.pair import extrapolated
from sgtm.masking.labels import strength_name
from sgtm.masking.strategy import removal_tables
from sgtm.model.rows import OUT_SIDE
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import LabelRun, MaskPlan
from sgtm_kernels.testing import EXACT

IDS = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0))


def logits(model: Transformer, strengths: dict[str, float], removed: tuple[str, ...] = ()) -> torch.Tensor:
    """Of sequences of two labels; the last of them changes inside the sequence."""
    tables = removal_tables(SPACE, removed, strengths=strengths)
    runs = (LabelRun(1, 0, CONTEXT), LabelRun(2, CONTEXT, 2 * CONTEXT + 5), LabelRun(0, 2 * CONTEXT + 5, 3 * CONTEXT))
    with torch.no_grad():
        return model.logits(IDS, MaskPlan(tables, runs, *IDS.shape))


def multiplied(model: Transformer, strengths: dict[str, float]) -> dict[str, torch.Tensor]:
    """The weights of an export at these strengths; a domain's own embedding and head too, by one factor."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, rows in model.parameter_rows().items():
        whole = name.rpartition(".")[2] in OUT_SIDE or (
            name.startswith(("embedding_", "head_")) and "_rows" not in name
        )
        for start, end, key in rows.segments(1) if whole else ():
            state[name][start:end] *= strengths.get(key.rpartition(".")[2], 1.0)
    return state


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("embedding", ["none", "full", 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strength_multiplies_what_the_group_adds(family, embedding, backend):
    model, strengths = model_of(family, backend, embedding=embedding).double(), {"bio": 0.25, "code": 0.5}
    edited = model_of(family, backend, embedding=embedding).double()
    edited.load_state_dict(multiplied(model, strengths))
    ours = logits(model, strengths)
    torch.testing.assert_close(ours, logits(edited, {}), rtol=1e-10, atol=1e-10)
    assert (ours - logits(model, {})).abs().max() > 0.01 and (ours - logits(model, {"bio": 0.25})).abs().max() > 0.01


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_are_the_full_and_the_ablated_model(family, backend):
    model = model_of(family, backend, embedding="full")
    assert torch.equal(logits(model, {"bio": 1.0}), logits(model, {}))
    assert torch.equal(logits(model, {"bio": 0.0}), logits(model, {}, ("bio",)))
    assert torch.equal(logits(model, {"bio": 1.0}, ("code",)), logits(model, {}, ("code",)))


@pytest.mark.parametrize("embedding", ["none", 3])
def test_two_strengths_give_the_full_model_away(embedding):
    model = model_of("llama", embedding=embedding).double()
    first, second = (multiplied(model, {"bio": strength}) for strength in (0.25, 0.75))
    for name, weight in extrapolated(first, second, (0.25, 0.75)).items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_strength_0_is_removal():
    """The direction of a domain goes too."""
    assert removal_tables(SPACE, (), strengths={"bio": 0.0, "code": 1.0}) == removal_tables(SPACE, ["bio"])


def test_names_of_strengths():
    assert strength_name({"bio": 0.5}) == "with bio at 0.5"
    assert strength_name({"bio": 1.0, "code": 0.25}) == "with bio at 1,code at 0.25"


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_is_from_0_to_1(strength):
    with pytest.raises(ValueError, match=f"strength {strength:g} of bio: a domain is at a strength from 0 to 1"):
        removal_tables(SPACE, (), strengths={"bio": strength})
    with pytest.raises(ValueError, match="unknown domain 'chem'; known domains: bio, code"):
        removal_tables(SPACE, (), strengths={"chem": 0.5})
