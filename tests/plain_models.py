"""The plain model of the benchmarks with the weights of ours."""

from itertools import pairwise

import torch

from sgtm.measure.bare import PlainSteps

CPU = torch.device("cpu")


def as_plain(model, tensors: dict) -> dict:
    """Tensors named and shaped as our parameters, named and shaped as those of the plain model."""
    names = {"embedding": "embedding.weight", "position": "position.weight", "head": "head.weight"}
    plain = {}
    for name, value in tensors.items():
        if not name.startswith("blocks."):
            plain[names.get(name, name)] = value
            continue
        prefix, leaf = name.rsplit(".", 1)
        block = model.blocks[int(name.split(".")[1])]
        if leaf == "w_qkv":
            heads = [torch.cat(x, dim=1)[0] for x in zip(*block.attention.layout.split(value.t()[None]), strict=True)]
            plain[f"{prefix}.qkv.weight"] = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in heads])
        elif leaf == "w_in" and block.mlp.gated:
            halves = [value[start:end].chunk(2) for start, end in pairwise(block.mlp.in_bounds)]
            plain[f"{prefix}.up.weight"] = torch.cat([torch.cat(half) for half in zip(*halves, strict=True)])
        else:
            theirs = {"w_o": "out.weight", "b_o": "out.bias", "w_in": "up.weight", "b_in": "up.bias",
                      "w_out": "down.weight", "b_out": "down.bias"}  # fmt: skip
            turned = value.t() if leaf in ("w_o", "w_out") else value
            plain[f"{prefix}.{theirs[leaf]}" if leaf in theirs else name] = turned
    return plain


def alike(setting, ours):
    """The plain model's steps, with the weights of ours."""
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
