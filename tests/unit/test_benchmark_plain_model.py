"""The plain model of the benchmarks computes our function, and trains alike, so that their times may be compared."""

from itertools import pairwise

import pytest
import torch

CPU = torch.device("cpu")
tiny_shapes = pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
pytestmark = pytest.mark.usefixtures("benchmarks")


def as_plain(model, tensors: dict) -> dict:
    """Tensors named and shaped as our parameters, named and shaped as those of the plain model."""
    names = {"embedding": "embedding.weight", "position": "position.weight", "head": "head.weight"}
    found = {}
    for name, value in tensors.items():
        if not name.startswith("blocks."):
            found[names.get(name, name)] = value
            continue
        prefix, leaf = name.rsplit(".", 1)
        block = model.blocks[int(name.split(".")[1])]
        if leaf == "w_qkv":
            heads = [torch.cat(x, dim=1)[0] for x in zip(*block.attention.layout.split(value.t()[None]), strict=True)]
            found[f"{prefix}.qkv.weight"] = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in heads])
        elif leaf == "w_in" and block.mlp.gated:
            halves = [value[start:end].chunk(2) for start, end in pairwise(block.mlp.in_bounds)]
            found[f"{prefix}.up.weight"] = torch.cat([torch.cat(half) for half in zip(*halves, strict=True)])
        else:
            theirs = {"w_o": "out.weight", "b_o": "out.bias", "w_in": "up.weight", "b_in": "up.bias",
                      "w_out": "down.weight", "b_out": "down.bias"}  # fmt: skip
            turned = value.t() if leaf in ("w_o", "w_out") else value
            found[f"{prefix}.{theirs[leaf]}" if leaf in theirs else name] = turned
    return found


def alike(setting, ours):
    """The plain model's steps, with the weights of ours."""
    from sgtm.measure.bare import PlainSteps

    plain = PlainSteps(setting, CPU, torch.float32)
    with torch.no_grad():
        for name, p in ours.mixed.model.named_parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and norms too
            ours.mixed.masters[name].copy_(p)
        weights = as_plain(ours.mixed.model, ours.mixed.masters)
        assert weights.keys() == plain.mixed.masters.keys()
        for name, master in plain.mixed.masters.items():
            master.copy_(weights[name])
            plain.mixed.parameters[name].copy_(weights[name])
    return plain


@tiny_shapes
@pytest.mark.parametrize("compiled", [False, True])
def test_the_plain_model_is_our_function(name, compiled, ours):
    """Loss and gradients; and it is one graph for torch.compile, through which its hooks gather gradients."""
    from sgtm.measure.cases import NONE, cases, random_batches

    setting, trained = ours(name)
    plain = alike(setting, trained)
    function = (
        torch.compile(plain.model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else plain.model
    )
    unmasked = cases(setting)[NONE]
    batch = random_batches(unmasked.batches, setting.model, CPU)[0]
    arguments = (batch.input_ids, batch.targets)
    theirs = function(*arguments, 0.01)
    loss, _ = trained.mixed.model(*arguments, batch.plan(unmasked.tables), 0.01)
    torch.testing.assert_close(theirs, loss, rtol=1e-5, atol=0)
    theirs.backward()
    loss.backward()
    wanted = as_plain(trained.mixed.model, {name: m.grad for name, m in trained.mixed.masters.items()})
    for key, master in plain.mixed.masters.items():
        largest = wanted[key].abs().max().item()
        assert largest > 0
        torch.testing.assert_close(master.grad, wanted[key], rtol=0, atol=2e-5 * largest)


@tiny_shapes
def test_both_train_alike(name, ours):
    """Three steps of two micro-batches, AdamW included: the same master weights, and far from where they began."""
    from dataclasses import replace

    from sgtm.measure.cases import NONE, cases, random_batches

    setting, trained = ours(name)
    setting = replace(setting, micro_batch=2, accumulation=2)
    plain, unmasked = alike(setting, trained), cases(setting)[NONE]
    start = {key: master.clone() for key, master in plain.mixed.masters.items()}
    for _ in range(3):
        batches = random_batches(unmasked.batches, setting.model, CPU)
        trained.step("torch", unmasked.tables, batches)
        plain.step(batches)
        torch.testing.assert_close(plain.loss, trained.loss, rtol=1e-5, atol=0)
    wanted = as_plain(trained.mixed.model, trained.mixed.masters)
    for key, master in plain.mixed.masters.items():
        moved = (master - start[key]).abs().max().item()
        assert moved > 2e-4  # three steps of 1e-4
        torch.testing.assert_close(master, wanted[key], rtol=0, atol=0.1 * moved)
        assert (master - wanted[key]).abs().mean() < 1e-3 * moved
