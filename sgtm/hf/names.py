"""Parameter names of Hugging Face beside ours, by family; what a family does not list here cannot cross over.

With shared experts the family mixtral has those of qwen2_moe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """One of our block parameters and what Hugging Face makes of it.

    theirs      names there; several where we fuse them
    owners      who owns the rows of each: `heads`, `kv_heads`, `neurons` or `experts`; empty for a joint parameter
    transposed  stored there as [out, in], here as [in, out]
    shared      names of the shared experts' parts. Where there are some, or `{}` in `theirs`, each expert has tensors
                of its own (sgtm/hf/experts.py)
    """

    ours: str
    theirs: tuple[str, ...]
    owners: tuple[str, ...] = ()
    transposed: bool = False
    shared: tuple[str, ...] = ()

    @property
    def each_expert(self) -> bool:
        return "{}" in self.theirs[0]


@dataclass(frozen=True)
class Names:
    """Parameter names of a family: `outer` outside the blocks, `weights` inside block `block.format(i)`."""

    outer: dict[str, str]
    block: str
    weights: tuple[Weight, ...]


def _of_experts(moe: str, gate: str, up: str, down: str, shared: bool) -> tuple[Weight, ...]:
    each, always = "experts.{}.", f"{moe}shared_expert."
    beside = {name: (f"{always}{name}.weight",) if shared else () for name in (gate, up, down)}
    return (
        Weight("mlp.router", (f"{moe}gate.weight",), ("experts",)),
        Weight(
            "mlp.w_in",
            (f"{moe}{each}{gate}.weight", f"{moe}{each}{up}.weight"),
            ("experts",),
            shared=beside[gate] + beside[up],
        ),
        Weight("mlp.w_out", (f"{moe}{each}{down}.weight",), ("experts",), transposed=True, shared=beside[down]),
    )


LLAMA_OUTER = {"embedding": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
LLAMA_BLOCK = "model.layers.{}."
LLAMA_BESIDE_MLP = (
    Weight("attention_norm.weight", ("input_layernorm.weight",)),
    Weight("attention.w_qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), ("heads", "kv_heads", "kv_heads")),
    Weight("attention.w_o", ("self_attn.o_proj.weight",), ("heads",), transposed=True),
    Weight("mlp_norm.weight", ("post_attention_layernorm.weight",)),
)
SHARED_GATE = "mlp.shared_expert_gate.weight"
"""Inside a block of Qwen2-MoE; it has no place here (sgtm/hf/experts.py)."""

NAMES = {
    "gpt_neo": Names(
        {
            "embedding": "transformer.wte.weight",
            "position": "transformer.wpe.weight",
            "final_norm.weight": "transformer.ln_f.weight",
            "final_norm.bias": "transformer.ln_f.bias",
        },
        "transformer.h.{}.",
        (
            Weight("attention_norm.weight", ("ln_1.weight",)),
            Weight("attention_norm.bias", ("ln_1.bias",)),
            Weight(
                "attention.w_qkv",
                tuple(f"attn.attention.{x}_proj.weight" for x in "qkv"),
                ("heads", "kv_heads", "kv_heads"),
            ),
            Weight("attention.w_o", ("attn.attention.out_proj.weight",), ("heads",), transposed=True),
            Weight("attention.b_o", ("attn.attention.out_proj.bias",)),
            Weight("mlp_norm.weight", ("ln_2.weight",)),
            Weight("mlp_norm.bias", ("ln_2.bias",)),
            Weight("mlp.w_in", ("mlp.c_fc.weight",), ("neurons",)),
            Weight("mlp.b_in", ("mlp.c_fc.bias",), ("neurons",)),
            Weight("mlp.w_out", ("mlp.c_proj.weight",), ("neurons",), transposed=True),
            Weight("mlp.b_out", ("mlp.c_proj.bias",)),
        ),
    ),
    "llama": Names(
        LLAMA_OUTER,
        LLAMA_BLOCK,
        (
            *LLAMA_BESIDE_MLP,
            Weight("mlp.w_in", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("neurons", "neurons")),
            Weight("mlp.w_out", ("mlp.down_proj.weight",), ("neurons",), transposed=True),
        ),
    ),
    "mixtral": Names(
        LLAMA_OUTER, LLAMA_BLOCK, LLAMA_BESIDE_MLP + _of_experts("block_sparse_moe.", "w1", "w3", "w2", shared=False)
    ),
    "qwen2_moe": Names(
        LLAMA_OUTER,
        LLAMA_BLOCK,
        LLAMA_BESIDE_MLP + _of_experts("mlp.", "gate_proj", "up_proj", "down_proj", shared=True),
    ),
}
HEAD = "lm_head.weight"
# Not weights: constants that older versions of transformers saved beside them.
BUFFERS = (".attn.attention.bias", ".attn.attention.masked_bias", ".rotary_emb.inv_freq")


def names_of(family: str, shared_experts: int) -> Names:
    return NAMES["qwen2_moe" if shared_experts else family]
