from sgtm_kernels.adamw.op import Slice, Tensors, Update, adamw, prepare

__all__ = ["Slice", "Tensors", "Update", "adamw", "prepare"]
