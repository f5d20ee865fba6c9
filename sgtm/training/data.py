"""The corpus of a run, opened so that every rank reads the same and no node reads what is damaged."""

from __future__ import annotations

import socket

from sgtm.config import Config
from sgtm.data.open import open_corpus
from sgtm.data.store import Corpus
from sgtm.distributed.agree import on_every_rank, on_rank_zero, together
from sgtm.process.ranks import Launch


def open_everywhere(config: Config, launch: Launch) -> Corpus:
    """The corpus on every rank, after rank 0 has written it where it is a synthetic one and not there yet.

    The first rank of every node reads all files and checks their hashes, as nodes may have copies of their own; the
    other ranks check the sizes. Every rank raises ValueError, with the rank and its host, where one finds it missing or
    damaged, or has another corpus than rank 0.
    """
    on_rank_zero(lambda: str(open_corpus(config).path))
    if launch.world_size == 1:
        return open_corpus(config, "sizes")  # the hashes have just been checked
    checks = launch.local_rank == 0 and launch.rank != 0

    def opened() -> Corpus:
        try:
            return open_corpus(config, "hashes" if checks else "sizes")
        except ValueError as error:
            raise ValueError(f"on host {socket.gethostname()}: {error}") from error

    corpus = together(opened)
    found = on_every_rank(lambda: (corpus.fingerprint, socket.gethostname()))

    def compare() -> None:
        for rank, (fingerprint, host) in enumerate(found):
            if fingerprint != found[0][0]:
                raise ValueError(
                    f"{corpus.path} is another corpus on host {host} (rank {rank}, {fingerprint[:16]}...) than on host "
                    f"{found[0][1]} (rank 0, {found[0][0][:16]}...); copy the same to every node"
                )

    on_rank_zero(compare)
    return corpus
