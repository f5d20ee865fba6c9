from sgtm_kernels.adamw.op import Tensors, Update, WeightSlice, adamw, prepare

__all__ = ["Tensors", "Update", "WeightSlice", "adamw", "prepare"]
