"""SDPA as torch 2.11 has it on a CPU: without heads it ends the process there; here it raises.

conftest.py imports this; the processes that tests start do so by sitecustomize.py, which Python imports when it starts.
"""

import functools
import importlib.abc
import importlib.util
import sys

NAME = "torch.nn.functional"


def guarded(attention):
    @functools.wraps(attention)
    def scaled_dot_product_attention(query, *arguments, **options):
        if query.dim() == 4 and query.shape[1] == 0:
            raise ZeroDivisionError(f"scaled_dot_product_attention without heads: query {tuple(query.shape)}")
        return attention(query, *arguments, **options)

    return scaled_dot_product_attention


class Finder(importlib.abc.MetaPathFinder):
    """Puts the guard into torch when torch is imported, which not every process does."""

    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        inner = spec.loader.exec_module

        def exec_module(module):
            inner(module)
            module.scaled_dot_product_attention = guarded(module.scaled_dot_product_attention)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
