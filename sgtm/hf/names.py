"""Parameter names of Hugging Face beside ours, by family; what a family does not list here cannot cross over.

With shared experts the family mixtral has those of granitemoeshared.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """One of our block parameters and what Hugging Face makes of it.

    theirs      names there; several where we fuse them
    owners      who owns the rows of each: `heads`, `kv_heads`, `neurons` or `experts`; empty for a joint parameter
    transposed  stored there as [out, in], here as [in, out]
    shared      name of the shared experts' tensor, where there are some; those of the others are then stacked in one.
                With `{}` in `theirs` each expert has tensors of its own (sgtm/hf/experts.py)
    """

    ours: str
    theirs: tuple[str, ...]
    owners: tuple[str, ...] = ()
    transposed: bool = False
    shared: str = ""

    @property
    def each_expert(self) -> bool:
        return "{}" in self.theirs[0]

    @property
    def has_experts(self) -> bool:
        return self.each_expert or bool(self.shared)


@dataclass(frozen=True)
class Names:
    """Parameter names of a family: `outer` outside the blocks, `weights` inside block `block.format(i)`."""

    outer: dict[str, str]
    block: str
    weights: tuple[Weight, ...]


LLAMA_OUTER = {"embedding": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
LLAMA_BLOCK = "model.layers.{}."
LLAMA_BESIDE_MLP = (
    Weight("attention_norm.weight", ("input_layernorm.weight",)),
    Weight("attention.w_qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), ("heads", "kv_heads", "kv_heads")),
    Weight("attention.w_o", ("self_attn.o_proj.weight",), ("heads",), transposed=True),
    Weight("mlp_norm.weight", ("post_attention_layernorm.weight",)),
)
MOE, EACH = "block_sparse_moe.", "block_sparse_moe.experts.{}."

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
        LLAMA_OUTER,
        LLAMA_BLOCK,
        (
            *LLAMA_BESIDE_MLP,
            Weight("mlp.router", (f"{MOE}gate.weight",), ("experts",)),
            Weight("mlp.w_in", (f"{EACH}w1.weight", f"{EACH}w3.weight"), ("experts",)),
            Weight("mlp.w_out", (f"{EACH}w2.weight",), ("experts",), transposed=True),
        ),
    ),
    "granitemoeshared": Names(
        LLAMA_OUTER,
        LLAMA_BLOCK,
        (
            *LLAMA_BESIDE_MLP,
            Weight("mlp.router", (f"{MOE}router.layer.weight",), ("experts",)),
            Weight("mlp.w_in", (f"{MOE}input_linear.weight",), ("experts",), shared="shared_mlp.input_linear.weight"),
            Weight(
                "mlp.w_out",
                (f"{MOE}output_linear.weight",),
                ("experts",),
                transposed=True,
                shared="shared_mlp.output_linear.weight",
            ),
        ),
    ),
}
HEAD = "lm_head.weight"
# Not weights: constants that older versions of transformers saved beside them.
BUFFERS = (".attn.attention.bias", ".attn.attention.masked_bias", ".rotary_emb.inv_freq")


def names_of(family: str, shared_experts: int) -> Names:
    return NAMES["granitemoeshared" if shared_experts else family]
