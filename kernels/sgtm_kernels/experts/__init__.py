from sgtm_kernels.experts.op import experts, route

__all__ = ["experts", "route"]
