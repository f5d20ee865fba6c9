"""Parameter names of Hugging Face beside ours, by family; what a family does not list here cannot cross over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """One of our block parameters and what Hugging Face makes of it.

    theirs      names there; several where we fuse them
    owners      who owns the rows of each: `heads`, `kv_heads` or `neurons`; empty for a joint parameter
    transposed  stored there as [out, in], here as [in, out]
    """

    ours: str
    theirs: tuple[str, ...]
    owners: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Names:
    """Parameter names of a family: `outer` outside the blocks, `weights` inside block `block.format(i)`."""

    outer: dict[str, str]
    block: str
    weights: tuple[Weight, ...]


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
        {"embedding": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"},
        "model.layers.{}.",
        (
            Weight("attention_norm.weight", ("input_layernorm.weight",)),
            Weight(
                "attention.w_qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), ("heads", "kv_heads", "kv_heads")
            ),
            Weight("attention.w_o", ("self_attn.o_proj.weight",), ("heads",), transposed=True),
            Weight("mlp_norm.weight", ("post_attention_layernorm.weight",)),
            Weight("mlp.w_in", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("neurons", "neurons")),
            Weight("mlp.w_out", ("mlp.down_proj.weight",), ("neurons",), transposed=True),
        ),
    ),
}
HEAD = "lm_head.weight"
# Not weights: constants that older versions of transformers saved beside them.
BUFFERS = (".attn.attention.bias", ".attn.attention.masked_bias", ".rotary_emb.inv_freq")
