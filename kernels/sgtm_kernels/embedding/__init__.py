from sgtm_kernels.embedding.op import embedding

__all__ = ["embedding"]
