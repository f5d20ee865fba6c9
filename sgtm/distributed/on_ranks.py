"""Doing something on one rank so that all ranks succeed or fail together.

An error that all ranks raise has the attribute `rank`, of the one that it comes from: that one prints it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
Raised = TypeVar("Raised", bound=Exception)


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 while the others wait; every rank returns its result.

    What it raises for the user (ValueError, OSError) every rank raises: no rank is left waiting in a collective.
    """
    if dist.get_world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = _from_rank(0, error)
    dist.broadcast_object_list(outcome)
    result, problem = outcome
    if problem is not None:
        raise problem
    return result


def together(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; each returns its own result, which stays where it is. Errors as `on_every_rank`."""
    results: list[Result] = []
    on_every_rank(lambda: results.append(action()))
    return results[0]


def on_every_rank(action: Callable[[], Result]) -> list[Result]:
    """Run `action` on every rank; every rank returns the results of all, in order of rank.

    What any of them raises for the user (ValueError, OSError) every rank raises, the lowest rank's first.
    """
    mine: tuple[Any, Exception | None]
    try:
        mine = (action(), None)
    except (ValueError, OSError) as error:
        mine = (None, _from_rank(dist.get_rank(), error))
    everyone: list[tuple[Any, Exception | None]] = [mine] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(everyone, mine)
    errors = [error for _, error in everyone if error is not None]
    if errors:
        raise errors[0]
    return [result for result, _ in everyone]


def check_same(settings: Callable[[], Mapping[str, Any]]) -> None:
    """Every rank raises ValueError where one has other settings than rank 0: its node was started differently."""
    host = socket.gethostname()
    (first_host, first), *others = on_every_rank(lambda: (host, dict(settings())))
    for rank, (their_host, theirs) in enumerate(others, 1):
        for key in first | theirs:
            if first.get(key) != theirs.get(key):
                error = ValueError(
                    f"rank {rank} on {their_host} has {key} {theirs.get(key)}, but rank 0 on {first_host} has "
                    f"{first.get(key)}; start every node with the same command, config and SGTM_ variables"
                )
                raise _from_rank(0, error)


def _from_rank(rank: int, error: Raised) -> Raised:
    error.rank = rank  # type: ignore[attr-defined]  # an attribute of its own, which travels with the pickle
    return error
