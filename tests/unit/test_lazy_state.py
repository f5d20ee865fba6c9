"""sgtm/model/lazy_state.py: a mapping that reads, and keeps nothing."""

import pytest
import torch

from sgtm.model.lazy_state import LazyState


def test_a_tensor_is_read_whenever_it_is_taken_and_only_then():
    read: list[str] = []

    def tensor_of(name: str) -> torch.Tensor:
        read.append(name)
        return torch.full((2,), float(len(name)))

    state = LazyState(["a", "bb"], tensor_of)
    assert list(state) == ["a", "bb"] and len(state) == 2 and "a" in state and "c" not in state
    assert read == []
    assert state["bb"].tolist() == [2, 2] and dict(state)["a"].tolist() == [1, 1]
    assert read == ["bb", "a", "bb"]
    with pytest.raises(KeyError, match="c"):
        state["c"]


def test_a_module_loads_it():
    module = torch.nn.Linear(2, 3)
    state = module.state_dict()
    other = torch.nn.Linear(2, 3)
    other.load_state_dict(LazyState(state, state.__getitem__))
    assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)
