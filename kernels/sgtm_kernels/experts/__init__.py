from sgtm_kernels.experts.op import balance, choices, experts, route

__all__ = ["balance", "choices", "experts", "route"]
