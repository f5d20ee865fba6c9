from sgtm_kernels.mlp.op import gelu, swiglu

__all__ = ["gelu", "swiglu"]
