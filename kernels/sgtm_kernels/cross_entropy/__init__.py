from sgtm_kernels.cross_entropy.op import linear_cross_entropy
from sgtm_kernels.cross_entropy.reference import kept_losses

__all__ = ["kept_losses", "linear_cross_entropy"]
