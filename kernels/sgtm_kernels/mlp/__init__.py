from sgtm_kernels.mlp.op import gelu, linear_gelu, swiglu

__all__ = ["gelu", "linear_gelu", "swiglu"]
