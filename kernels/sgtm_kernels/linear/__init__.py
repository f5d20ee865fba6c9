from sgtm_kernels.linear.op import linear_in, linear_out

__all__ = ["linear_in", "linear_out"]
