from sgtm_kernels.norm.op import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
