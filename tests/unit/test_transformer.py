"""The model families as a whole: sgtm/model/transformer.py."""

import pytest
import torch
from families import (
    CONTEXT,
    DENSE,
    FAMILIES,
    MIXINGS,
    SPACE,
    STRATEGIES,
    UNLABELED,
    VOCAB,
    by_key,
    gradients,
    model_of,
    plan_of,
    random_step,
)

from sgtm.data.batch import IGNORE
from sgtm.masking.strategy import removal_tables
from sgtm_kernels.plan import LabelRun, MaskPlan
from sgtm_kernels.testing import EXACT, assert_accurate, poisoned_memory

by_family = pytest.mark.parametrize("family", FAMILIES)
by_mixing = pytest.mark.parametrize("mixing", MIXINGS)
by_backend = pytest.mark.parametrize("backend", EXACT)


def plain_plan(ids: torch.Tensor, removed: tuple[str, ...] = ()) -> MaskPlan:
    return MaskPlan.uniform(removal_tables(SPACE, removed), UNLABELED, *ids.shape)


def random_ids(batch: int = 3, seq_len: int = CONTEXT) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(4))


@by_backend
@by_family
@by_mixing
@pytest.mark.parametrize("strategy", ["sgtm+masked", "gradient_routing"])
def test_checkpointing_leaves_every_bit_of_the_gradients(strategy, mixing, family, backend):
    tables, batches = STRATEGIES[strategy](), random_step(mixing, seed=1)
    expected = gradients(model_of(family, backend), batches, tables)
    again = gradients(model_of(family, backend, activation_checkpointing=True), batches, tables)
    for name, gradient in expected.items():
        assert torch.equal(gradient, again[name]), name


@by_family
@by_mixing
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if not name.startswith("no_")])
def test_runs_are_the_reference_in_fp64(strategy, mixing, family):
    tables, batches = STRATEGIES[strategy](), random_step(mixing, seed=2)
    theirs = gradients(model_of(family, "reference").double(), batches, tables)
    with poisoned_memory():
        ours = gradients(model_of(family, "torch").double(), batches, tables)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), *((family, torch.bfloat16) for family in DENSE)],
)
def test_runs_are_as_accurate_as_torch(family, dtype):
    """A whole model adds up the rounding of many ops, so four times torch's own error is allowed.

    In bf16 experts with nearly equal logits change places: tests/kernels/test_experts.py fixes the choice.
    """
    tables, batches = STRATEGIES["sgtm"](), random_step("sequence", seed=3)
    exact = gradients(model_of(family, "reference").double(), batches, tables)
    theirs, ours = (
        gradients(model_of(family, backend).to(dtype), batches, tables) for backend in ("reference", "torch")
    )
    for name in exact:
        assert_accurate(ours[name], theirs[name], exact[name], name, factor=4)


@by_backend
@by_family
@by_mixing
def test_loss_and_its_sums_by_label(mixing, family, backend):
    """Against cross-entropy of the model's own logits, token by token."""
    model, tables = model_of(family, backend), STRATEGIES["sgtm"]()
    for batch in random_step(mixing, seed=4):
        plan = plan_of(batch, tables)
        loss, sums = model(batch.input_ids, batch.targets, plan, 0.25)
        logits = model.logits(batch.input_ids, plan)
        assert logits.shape == (*batch.input_ids.shape, VOCAB)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), reduction="none", ignore_index=IGNORE
        )
        want = torch.zeros(4)
        for label, token_losses in zip(batch.labels, losses.split(batch.lengths), strict=True):
            want[label] += token_losses.sum().detach()
        torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, 0.25 * losses.sum(), rtol=1e-5, atol=1e-5)
        assert loss.dtype == sums.dtype == torch.float32 and not sums.requires_grad


@by_backend
@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("removed", SPACE.removals()[1:])
def test_ablation_is_zeroing_the_weights_of_the_group(removed, family, backend):
    model, ids = model_of(family, backend), random_ids()
    with torch.no_grad():
        ablated, full = model.logits(ids, plain_plan(ids, removed)), model.logits(ids, plain_plan(ids))
        for (key, _, _), piece in by_key(model, {n: p.data for n, p in model.named_parameters()}).items():
            if key.split(".")[-1] in removed:
                piece.zero_()
        zeroed = model.logits(ids, plain_plan(ids))
    assert torch.equal(ablated, zeroed)
    assert (ablated - full).abs().max() > 1e-3


@by_backend
@by_family
def test_no_token_sees_the_future(family, backend):
    model, ids = model_of(family, backend), random_ids()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model.logits(i, plain_plan(i)) for i in (ids, other))
    if FAMILIES[family].experts:  # how many tokens are at an expert changes the rounding of its products
        torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(before[:, :7], after[:, :7])
    assert bool((before[:, 7:] != after[:, 7:]).any(-1).all())


@by_backend
def test_windows_on_every_second_layer(backend):
    """Both layers together see everything; through the second alone (the first's output zeroed) only 5 tokens back."""
    model, ids = model_of("gpt_neo", backend), random_ids()
    everything = model_of("gpt_neo", backend, window=None)
    wide = model_of("gpt_neo", backend, window=CONTEXT)
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 1) % VOCAB
    with torch.no_grad():
        narrow = model.logits(ids, plain_plan(ids))
        whole = everything.logits(ids, plain_plan(ids))
        assert torch.equal(whole, wide.logits(ids, plain_plan(ids)))
        torch.testing.assert_close(narrow[:, :5], whole[:, :5], rtol=1e-4, atol=1e-4)
        assert bool(((narrow - whole)[:, 5:].abs().amax(-1) > 1e-5).all())
        assert not torch.equal(narrow[:, -1], model.logits(other, plain_plan(ids))[:, -1]), "layer 0 is global"
        model.blocks[0].attention.w_o.zero_()
        narrow, changed = (model.logits(i, plain_plan(i)) for i in (ids, other))
    differs = (narrow != changed).any(-1).all(0).tolist()
    assert differs == [2 <= position < 2 + 5 for position in range(CONTEXT)]


def test_llama_knows_positions_by_rotation_alone():
    """To one layer a permuted past is the same bag of keys: only rotary positions tell the difference."""
    model, ids = model_of("llama", layers=1), random_ids()
    assert model.position is None
    order = [3, 1, 0, 2, *range(4, CONTEXT)]
    with torch.no_grad():
        straight, permuted = (model.logits(i, plain_plan(i))[:, -1] for i in (ids, ids[:, order]))
    assert (straight - permuted).abs().max() > 1e-4


@by_family
def test_shorter_sequences_are_fine_and_longer_ones_an_error(family):
    model, ids = model_of(family), random_ids()
    with torch.no_grad():
        short = model.logits(ids[:, :5], plain_plan(ids[:, :5]))
        torch.testing.assert_close(short, model.logits(ids, plain_plan(ids))[:, :5], rtol=1e-4, atol=1e-5)
    long = random_ids(1, CONTEXT + 1)
    with pytest.raises(ValueError, match=f"sequence of {CONTEXT + 1} tokens is longer than model.context {CONTEXT}"):
        model(long, long, plain_plan(long), 1.0)


@by_family
def test_every_parameter_has_a_gradient_under_every_label(family):
    """Never None: under ZeRO a gradient that is missing on some ranks only is a hang."""
    model = model_of(family)
    for label in range(4):
        for strategy in ("sgtm+masked", "activation_masking", "gradient_routing"):
            grads = gradients(model, random_step("step", 1, label), STRATEGIES[strategy]())
            assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())


@by_family
def test_initial_weights(family):
    torch.manual_seed(0)
    reference = model_of(family)
    model = type(reference)(reference.config, reference.partition)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(reference.config.init_std, rel=0.25), name
        else:
            assert bool((parameter == float(name.endswith("norm.weight"))).all()), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
@by_family
def test_an_isolated_document_is_computed_as_if_it_were_alone(family, backend):
    """Wherever it lies in its sequence: learned positions restart, rotary ones are relative."""
    model, ids = model_of(family, backend).double(), random_ids(2, CONTEXT)
    tables, documents = (
        removal_tables(SPACE, ()),
        ((0, 3), (3, CONTEXT), (CONTEXT, CONTEXT + 7), (CONTEXT + 7, 2 * CONTEXT)),
    )
    plan = MaskPlan(tables, (LabelRun(UNLABELED, 0, 2 * CONTEXT),), 2, CONTEXT, documents=documents)
    logits = model.logits(ids, plan).flatten(0, 1)
    for start, end in documents:
        alone = ids.flatten()[start:end][None]
        torch.testing.assert_close(
            logits[start:end], model.logits(alone, plain_plan(alone))[0], rtol=0, atol=1e-5
        )  # rotary angles are fp32
