"""The steps of an unlearning on a small model: what they change, raise and log."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from corpora import build, config_for, mixed_records
from random_models import moved_model

from sgtm.config.schema import Config
from sgtm.masking.strategy import removal_tables
from sgtm.unlearning.loop import unlearn
from sgtm.unlearning.methods import METHODS
from sgtm.unlearning.text import Sequences, mean_loss


def config(masking: dict | None = None, **model) -> Config:
    values = config_for(context=32, micro_batch=4).model_dump(exclude_unset=True)
    sections = {"model": {**values["model"], "layers": 4, **model}, "masking": {**values["masking"], **(masking or {})}}
    return Config.model_validate({**values, **sections})


CONFIG = config()
TABLES = removal_tables(CONFIG.space, ())


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    corpus = build(tmp_path_factory.mktemp("loop") / "corpus", mixed_records())
    return moved_model(CONFIG, 0.05), *(Sequences(corpus, CONFIG, [name], 0) for name in ("es", "en"))


def after(setting, method: str, steps: int = 4, lr: float = 1e-3, tables=TABLES, **options):
    """The model, and the lines of the log."""
    model, forget, retain = setting
    model, lines, of_method = deepcopy(model), [], METHODS[method]
    texts = forget if of_method.forget else None, retain if of_method.retain else None
    all_options = of_method.options | options
    unlearn(model, method, *texts, tables, options=all_options, steps=steps, lr=lr, log=lines.append)
    return model, lines


def loss(model, sequences: Sequences) -> float:
    with torch.no_grad():
        return sum(float(mean_loss(model, sequences.text(i, torch.device("cpu"), TABLES))) for i in range(6)) / 6


def test_gradient_ascent_raises_the_forget_loss(setting):
    model, forget, _ = setting
    assert loss(after(setting, "gradient_ascent", 6, lr=3e-3)[0], forget) > loss(model, forget) + 0.1


@pytest.mark.parametrize("method", ["grad_diff", "npo", "simnpo"])
def test_the_forget_loss_rises_above_the_retain_loss(setting, method):
    """The texts differ in a few letters alone: both losses may fall."""
    _, forget, retain = setting
    options = {"forget_weight": 1.0} if method == "simnpo" else {}
    gaps = [
        loss(model, forget) - loss(model, retain)
        for model in (setting[0], after(setting, method, 12, 3e-3, **options)[0])
    ]
    assert gaps[1] > gaps[0] + 0.01


def test_finetuning_lowers_the_retain_loss(setting):
    model, _, retain = setting
    assert loss(after(setting, "finetune", 6, lr=3e-3)[0], retain) < loss(model, retain) - 0.01


def test_rmu_moves_forget_states_to_the_target_and_changes_the_named_layers_alone(setting):
    before = setting[0].state_dict()
    model, lines = after(setting, "rmu", 8, lr=1e-2, layer=2, alpha=1.0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"blocks.{i}.mlp.w_out" for i in (0, 1, 2)}
    assert lines[-1]["distance/forget"] < lines[0]["distance/forget"] and lines[0]["distance/retain"] == 0


@pytest.mark.parametrize("method", list(METHODS))
def test_the_same_steps_give_the_same_bits_and_the_log_of_every_step(setting, method):
    (model, lines), (again, _) = after(setting, method, 3), after(setting, method, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [(line["kind"], line["step"], line["lr"]) for line in lines] == [("unlearn", i, 1e-3) for i in (1, 2, 3)]
    kind = "distance" if method == "rmu" else "loss"
    parts = {f"{kind}/forget": METHODS[method].forget, f"{kind}/retain": METHODS[method].retain}
    for line in lines:
        assert {key for key in line if "/" in key} == {key for key, read in parts.items() if read}
        assert line["grad_norm"] > 0


@pytest.mark.parametrize(
    "other",
    [
        config(family="llama", tie_embeddings=False),
        config({"domain_embedding": 4, "forget_heads": 1}),
        config({"domain_embedding": "full"}),
        config(activation_checkpointing=True),
    ],
    ids=["llama", "low-rank", "full-embedding", "checkpointing"],
)
@pytest.mark.parametrize("method", list(METHODS))
def test_every_kind_of_model_learns_by_every_method(setting, method, other: Config):
    model = moved_model(other, 0.05)
    changed, lines = after((model, *setting[1:]), method, 2, tables=removal_tables(other.space, ()))
    assert any(not torch.equal(a, b) for a, b in zip(changed.parameters(), model.parameters(), strict=True))
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_losses_of_the_log_are_those_before_the_step(setting):
    model, forget, retain = setting
    (line, *_) = after(setting, "npo", 1)[1]
    for sequences, name in ((forget, "forget"), (retain, "retain")):
        with torch.no_grad():
            expected = float(mean_loss(model, sequences.text(0, torch.device("cpu"), TABLES)))
        assert line[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_stays_as_it_was(setting):
    losses = [line["loss"] for line in after(setting, "npo", 4, retain_weight=0.0)[1]]
    assert losses[0] == pytest.approx(20 * math.log(2), rel=1e-4) and losses[3] < losses[0] - 0.5


def test_steps_are_those_of_adamw(setting):
    """Loshchilov and Hutter (2019), algorithm 2, on gradients of a norm above 1, clipped."""
    model, forget, retain = deepcopy(setting[0]), *setting[1:]
    lr, weights = 1e-3, list(model.parameters())
    before = [weight.detach().clone() for weight in weights]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in (1, 2, 3):
        texts = [sequences.text(step - 1, torch.device("cpu"), TABLES) for sequences in (forget, retain)]
        gradients = torch.autograd.grad(4.0 * mean_loss(model, texts[1]) - mean_loss(model, texts[0]), weights)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 1.2, norm
        with torch.no_grad():
            for weight, gradient, m, v in zip(weights, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * gradient / norm)
                v.mul_(0.999).add_(0.001 * (gradient / norm).square())
                update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                weight.mul_(1 - lr * 0.01).sub_(lr * update)
    parameters = list(after(setting, "grad_diff", 3, lr, retain_weight=4.0)[0].parameters())
    moved, expected = (
        torch.cat([(a - b).flatten() for a, b in zip(c, before, strict=True)]) for c in (parameters, weights)
    )
    assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_what_is_not_finite_ends_it_with_a_remedy(setting):
    with pytest.raises(
        ValueError, match=r"gradient_ascent: not finite in step 2: loss, .*take a lower --lr than 1e\+30"
    ):
        after(setting, "gradient_ascent", 3, lr=1e30)
