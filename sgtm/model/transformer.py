"""The transformer: pre-norm blocks of attention and MLP, or experts, in the GPT-Neo, Llama and Mixtral family.

Groups of heads and neurons are row ranges of the weights (see `sgtm.model.rows`); every parameter is used through a
masked op inside the `forward` of the module that owns it, which is what ZeRO-3's gathering hooks need. Activations are
[B, S, D] (batch, sequence, hidden size).

The gradients of parameters whose use depends on the labels of a micro-batch are complete at the same moment for all
labels (`complete_together`). ZeRO 2 and 3 reduce gradients in the order in which they are complete: with another order
on another rank, the gradients of different parameters would be added up, and no error shows it
(tests/unit/test_gradient_order.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgtm.masking.partition import LayerPartition, Partition
from sgtm.model.balance import Balance
from sgtm.model.domain_embedding import add_domains, head_of, subsets
from sgtm.model.domain_parts import domain_parts
from sgtm.model.experts import Experts
from sgtm.model.rows import Rows, group_rows, head_row_bounds, joint_rows, mlp_in_bounds, qkv_bounds
from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.autograd import captured
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.dispatch import load
from sgtm_kernels.embedding import embedding
from sgtm_kernels.graph import positions
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.mlp import linear_gelu, swiglu
from sgtm_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from sgtm_kernels.plan import MaskPlan

if TYPE_CHECKING:
    from sgtm.masking.shape import ModelShape
    from sgtm.model.output_norms import OutputNorms
    from sgtm.model.steering import Steering


class Norm(nn.Module):
    """LayerNorm (gpt_neo) or RMSNorm. `kind`: who may update it, or None in a layer without groups."""

    def __init__(self, config: ModelShape, kind: str | None, backend: str):
        super().__init__()
        self.eps, self.kind, self.backend = config.norm_eps, kind, backend
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.family == "gpt_neo" else None

    def forward(self, x: torch.Tensor, plan: MaskPlan, residual: torch.Tensor | None = None):
        """The norm of x [B, S, D]; with a residual: the sum of x and residual, and its norm."""
        if self.bias is None:
            if residual is None:
                return rms_norm(x, self.weight, self.eps, plan, self.kind, self.backend)
            return add_rms_norm(x, residual, self.weight, self.eps, plan, self.kind, self.backend)
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps, plan, self.kind, self.backend)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, plan, self.kind, self.backend)


class Attention(nn.Module):
    """`first`: in the first layer, if no group's parameters are below it. (In a layer without groups every row of the
    projection learns, so that nothing is left out either way.)"""

    def __init__(self, config: ModelShape, layer: LayerPartition, window: int | None, backend: str, first: bool):
        super().__init__()
        head_dim, self.first = config.size_per_head, first
        self.layout = HeadLayout(layer.heads, layer.kv_heads, head_dim)
        self.in_bounds, self.out_bounds = qkv_bounds(layer, head_dim), head_row_bounds(layer, head_dim)
        self.window, self.backend = window, backend
        neo = config.family == "gpt_neo"
        self.scale = 1.0 if neo else head_dim**-0.5
        self.w_qkv = nn.Parameter(torch.empty(self.in_bounds[-1], config.hidden_size))
        self.w_o = nn.Parameter(torch.empty(self.out_bounds[-1], config.hidden_size))
        self.b_o = nn.Parameter(torch.zeros(config.hidden_size)) if neo else None

    def forward(self, x: torch.Tensor, plan: MaskPlan, rotary, norms: OutputNorms | None = None) -> torch.Tensor:
        qkv = linear_in(x, self.w_qkv, None, plan, "attn_in", self.in_bounds, self.backend, overwrite=True)
        heads = attention(
            qkv, self.layout, plan, scale=self.scale, window=self.window, rotary=rotary, overwrite=True,
            below=captured() or not self.first or self._learns_below(plan), backend=self.backend,
        )  # fmt: skip
        out = linear_out(heads, self.w_o, self.b_o, plan, "attn_out", self.out_bounds, self.backend)
        if norms is not None:
            norms.outputs("attention", out, heads, self.w_o, self.b_o, self.out_bounds)
        return out

    def _learns_below(self, plan: MaskPlan) -> bool:
        """Whether a token updates a parameter below the projections. A graph, one for all plans, does not ask."""
        return any(plan.joint(kind).slices for kind in ("embedding", "position", "norm"))


class MLP(nn.Module):
    def __init__(self, config: ModelShape, layer: LayerPartition, backend: str):
        super().__init__()
        self.gated = config.family == "llama"
        self.in_bounds, self.bounds, self.backend = mlp_in_bounds(layer, self.gated), layer.neuron_bounds, backend
        self.w_in = nn.Parameter(torch.empty(self.in_bounds[-1], config.hidden_size))
        self.b_in = None if self.gated else nn.Parameter(torch.zeros(self.in_bounds[-1]))
        self.w_out = nn.Parameter(torch.empty(self.bounds[-1], config.hidden_size))
        self.b_out = None if self.gated else nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: torch.Tensor, plan: MaskPlan, norms: OutputNorms | None = None) -> torch.Tensor:
        if self.b_in is None:  # gated
            pre = linear_in(x, self.w_in, None, plan, "mlp_in", self.in_bounds, self.backend, overwrite=True)
            hidden = swiglu(pre, plan, self.bounds, self.backend)
        else:
            hidden = linear_gelu(x, self.w_in, self.b_in, plan, self.bounds, self.backend)
        out = linear_out(hidden, self.w_out, self.b_out, plan, "mlp_out", self.bounds, self.backend)
        if norms is not None:
            norms.outputs("mlp", out, hidden, self.w_out, self.b_out, self.bounds)
        return out


class Block(nn.Module):
    def __init__(self, config: ModelShape, partition: Partition, index: int, backend: str):
        super().__init__()
        layer = partition.layers[index]
        kind = "norm" if partition.masked(index) else None
        self.attention_norm = Norm(config, kind, backend)
        first = index == 0 and partition.embedding == "none"
        self.attention = Attention(config, layer, config.window_of(index), backend, first)
        self.mlp_norm = Norm(config, kind, backend)
        self.mlp = (Experts if config.experts else MLP)(config, layer, backend)

    def forward(
        self,
        x: torch.Tensor,
        plan: MaskPlan,
        rotary,
        norms: OutputNorms | None = None,
        balance: Balance | None = None,
    ) -> torch.Tensor:
        x, normed = self.mlp_norm(x, plan, self.attention(self.attention_norm(x, plan), plan, rotary, norms))
        return x + (self.mlp(normed, plan, norms) if balance is None else self.mlp(normed, plan, norms, balance))


class Blocks(nn.ModuleList):
    """A module list that yields blocks to type checkers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...


class Transformer(nn.Module):
    """Decoder-only language model; weights ~ N(0, init_std), biases 0, norms 1.

    The token embedding and the head belong to this module and not to submodules: a tied matrix is used at both ends of
    its forward.
    """

    def __init__(self, config: ModelShape, partition: Partition, backend: str = "torch"):
        super().__init__()
        load(backend)
        self.compiled = False
        """Whether the blocks are compiled (sgtm/model/compile.py)."""
        self.steering: Steering | None = None
        """What is added to the residual stream of the tokens that the tables steer."""
        self.config, self.partition, self.backend = config, partition, backend
        size = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(size))
        neo = config.family == "gpt_neo"
        self.position = nn.Parameter(torch.empty(config.context, config.hidden_size)) if neo else None
        self.blocks = Blocks(Block(config, partition, i, backend) for i in range(config.layers))
        self.final_norm = Norm(config, "final_norm", backend)
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(size))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        self.domain_parts = domain_parts(partition, *size, config.tie_embeddings)
        for part in self.domain_parts:
            self.register_parameter(part.name, nn.Parameter(torch.zeros(part.shape)))
        self._parts: dict[str, torch.Tensor] = {}  # those of the forward pass in progress
        own = {part.name for part in self.domain_parts}
        for name, parameter in self.named_parameters():
            if name in own:
                continue
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.init_std)
            elif not name.endswith("norm.weight"):
                nn.init.zeros_(parameter)
        for name in sorted(own):  # last: all other weights are those of a model without them
            if name.endswith("_rows"):
                nn.init.normal_(getattr(self, name), std=config.init_std)

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        plan: MaskPlan,
        scale: float,
        norms: OutputNorms | None = None,
        balance: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a micro-batch: `scale` times the sum of its token losses, and the unscaled sums by applied label.

        input_ids, targets  int64 [B, S], S <= context; targets -100 are ignored
        norms               takes the norms of what the layers compute, if given; the result is the same to the bit
        balance             weight of the loss that balances the experts (sgtm/model/balance.py), whose gradient is
                            added to that of the loss; the value of the loss is without it
        Returns a scalar (fp32) and [labels] (fp32, detached).
        """
        if norms is not None:
            norms.begin(plan, targets)
        balanced = Balance(targets) if balance else None
        x = self._hidden(input_ids, plan, norms, balanced)
        if norms is not None:
            norms.end()
        loss, sums = self.loss(x, targets, plan, scale)
        return (loss if balanced is None else balanced.added(loss, balance * scale)), sums

    def loss(
        self, x: torch.Tensor, targets: torch.Tensor, plan: MaskPlan, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` returns, from the last hidden states [B, S, D]. Part of it, for ZeRO-3: not to be called."""
        if not self.domain_parts:
            return linear_cross_entropy(x, self._head, self.head_bias, targets, plan, scale, self.backend)
        parts, self._parts = self._parts, {}  # held no longer than the forward pass: ZeRO 3 frees what they view
        head: torch.Tensor = self._head
        bias: torch.Tensor | None = self.head_bias
        if bias is not None:  # or which of the two is complete first would depend on the labels
            x, head, bias = complete_together(x, head, bias)
        by_subset = []
        for subset in subsets(plan, x.device):
            hidden, goals = x, targets
            if subset.index is not None:
                hidden, goals = x.flatten(0, 1)[subset.index][None], targets.flatten()[subset.index][None]
            weight = head_of(head, parts, self.head is None, subset)
            by_subset.append(linear_cross_entropy(hidden, weight, bias, goals, subset.plan, scale, self.backend))
        losses, sums = zip(*by_subset, strict=True)
        return sum(losses), sum(sums)

    def embed(self, input_ids: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
        """[B, S, D] embeddings of tokens and, in the GPT-Neo family, positions. Part of `forward` too.

        Isolated documents each begin at position 0, as they do when the model is used.
        """
        if self.head is None and not captured() and not plan.joint("embedding").slices:
            # No token updates it here: its gradient is the head's alone, and still complete after that of x.
            x = embedding(input_ids, self.embedding.detach(), plan, "embedding", self.backend)
            x = ordered_after(x, self.embedding)
        else:
            x = embedding(input_ids, self.embedding, plan, "embedding", self.backend)
        if self.domain_parts:
            names = [part.name for part in self.domain_parts]
            x, *parts = complete_together(x, *(getattr(self, name) for name in names))
            self._parts = dict(zip(names, parts, strict=True))
            x = add_domains(x, self._parts, input_ids, plan)
        if self.position is None:
            return x
        return x + embedding(positions(input_ids, plan), self.position, plan, "position", self.backend)

    def logits(self, input_ids: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
        """[B, S, V] next-token logits."""
        x = self._hidden(input_ids, plan)
        if not self.domain_parts:
            return nn.functional.linear(x, self._head, self.head_bias)
        parts, self._parts = self._parts, {}
        logits = x.new_empty(plan.tokens, self.config.vocab_size)
        for subset in subsets(plan, x.device):
            index = slice(None) if subset.index is None else subset.index
            logits[index] = nn.functional.linear(
                x.flatten(0, 1)[index], head_of(self._head, parts, self.head is None, subset), self.head_bias
            )
        return logits.view(*input_ids.shape, -1)

    def last_hidden(
        self, input_ids: torch.Tensor, plan: MaskPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states [B, S, D] after the final norm, and weight [V, D] and bias [V] of the head that reads them.

        Raises ValueError where labels of the micro-batch read different heads.
        """
        x = self._hidden(input_ids, plan)
        if not self.domain_parts:
            return x, self._head, self.head_bias
        parts, self._parts = self._parts, {}
        heads = subsets(plan, x.device)
        if len(heads) > 1:
            raise ValueError("labels with different heads in one micro-batch: evaluate one category at a time")
        return x, head_of(self._head, parts, self.head is None, heads[0]), self.head_bias

    @property
    def _head(self) -> nn.Parameter:
        return self.embedding if self.head is None else self.head

    def _hidden(
        self,
        input_ids: torch.Tensor,
        plan: MaskPlan,
        norms: OutputNorms | None = None,
        balance: Balance | None = None,
    ) -> torch.Tensor:
        seq_len = input_ids.shape[1]
        if seq_len > self.config.context:
            raise ValueError(f"sequence of {seq_len} tokens is longer than model.context {self.config.context}")
        x, rotary = self.embed(input_ids, plan), None
        if self.position is None:
            rotary = rotary_tables(seq_len, self.config.size_per_head, self.config.rope_theta, x.device)
        inside = None if self.compiled else norms  # a graph would have to be compiled with and without
        if norms is not None:
            norms.residual(x)
        steering = self.steering
        steered = None if steering is None else self.blocks[steering.layer]
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, plan, rotary, inside, balance, use_reentrant=False)
            else:
                x = block(x, plan, rotary, inside, balance)
            if steering is not None and block is steered:
                x = steering.add(x, plan, norms)
            if norms is not None:
                norms.residual(x)
        return self.final_norm(x, plan)

    def parameter_rows(self) -> dict[str, Rows]:
        """Who owns which rows of each parameter; names as in `named_parameters()`."""
        groups, rows = self.partition.groups, {}
        for i, block in enumerate(self.blocks):
            masked, prefix = self.partition.masked(i), f"blocks.{i}"
            attn, mlp = block.attention, block.mlp
            rows[f"{prefix}.attention.w_qkv"] = group_rows("attn_in", groups, attn.in_bounds)
            rows[f"{prefix}.attention.w_o"] = group_rows("attn_out", groups, attn.out_bounds)
            rows[f"{prefix}.attention.b_o"] = joint_rows("attn_out_bias", self.config.hidden_size, masked)
            if isinstance(mlp, Experts):
                rows[f"{prefix}.mlp.router"] = group_rows("mlp_in", groups, mlp.expert_bounds)
            rows[f"{prefix}.mlp.w_in"] = group_rows("mlp_in", groups, mlp.in_bounds)
            rows[f"{prefix}.mlp.b_in"] = group_rows("mlp_in", groups, mlp.in_bounds, decay=False)
            rows[f"{prefix}.mlp.w_out"] = group_rows("mlp_out", groups, mlp.bounds)
            rows[f"{prefix}.mlp.b_out"] = joint_rows("mlp_out_bias", self.config.hidden_size, masked)
            for norm in ("attention_norm", "mlp_norm"):
                for leaf in ("weight", "bias"):
                    rows[f"{prefix}.{norm}.{leaf}"] = joint_rows("norm", self.config.hidden_size, masked)
        for leaf in ("weight", "bias"):
            rows[f"final_norm.{leaf}"] = joint_rows("final_norm", self.config.hidden_size)
        tied = "embedding+head" if self.head is None else "embedding"
        rows["embedding"] = joint_rows(tied, self.config.vocab_size, decay=True)
        rows["head"] = joint_rows("head", self.config.vocab_size, decay=True)
        rows["position"] = joint_rows("position", self.config.context, decay=True)
        rows["head_bias"] = joint_rows("head_bias", self.config.vocab_size)
        for part in self.domain_parts:
            rows[part.name] = Rows((part.key,), (0, part.shape[0]), decay=True)
        return {name: rows[name] for name, _ in self.named_parameters()}


def rotary_tables(seq_len: int, head_dim: int, theta: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of rotary position embedding, fp32 [seq_len, head_dim]: a head's halves turn by the same angles."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(seq_len, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def complete_together(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors; their gradients are complete at once, when that of the activations x is, and are never None."""
    return _CompleteTogether.apply(x, *parameters)


def ordered_after(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """x; the gradient of the parameter, to which x adds nothing, is complete after that of x, as if x came from it.

    x must need no gradient: none flows on from here.
    """
    assert not x.requires_grad
    return _OrderedAfter.apply(x, parameter)


class _CompleteTogether(torch.autograd.Function):
    """The same tensors. A gradient that does not arrive is one of zeros, as always in a Function."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class _OrderedAfter(torch.autograd.Function):
    """x, with a parameter for its only input in the graph."""

    @staticmethod
    def forward(ctx, x, parameter):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None, None
