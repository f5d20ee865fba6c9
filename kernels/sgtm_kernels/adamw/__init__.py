from sgtm_kernels.adamw.op import Update, adamw

__all__ = ["Update", "adamw"]
