from sgtm_kernels.attention.op import HeadLayout, attention

__all__ = ["HeadLayout", "attention"]
