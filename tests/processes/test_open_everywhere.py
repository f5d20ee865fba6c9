"""The corpus of a run on several nodes, each with files of its own: two ranks with a folder each stand for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from corpora import build, config_for, record
from ranks import run_ranks


def open_on_nodes(folder: str, changes: list[str]) -> list[str]:
    """What this rank is told after each change to the second node's copy; each is undone."""
    from sgtm.distributed.on_ranks import on_rank_zero
    from sgtm.process.ranks import RankInfo
    from sgtm.training.start import open_everywhere

    rank = int(os.environ["RANK"])
    os.chdir(Path(folder, f"node{rank}"))
    config, launch = config_for(path="corpus"), RankInfo("env", rank, 2, 0)
    outcomes = []
    for change in changes:
        shard = Path("corpus/shards/00000.bin")
        before = shard.read_bytes()
        if rank == 1:
            if change == "damaged":
                shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            elif change == "missing":
                shard.unlink()
            elif change == "another":
                Path("corpus").rename("aside")
                Path("other").rename("corpus")
        try:
            outcomes.append(f"opened {len(open_everywhere(config, launch).documents)}")
        except ValueError as error:
            outcomes.append(f"rank {error.rank}: {error}")
        on_rank_zero(lambda: None)
        if rank == 1 and change != "another":
            shard.write_bytes(before)
    return outcomes


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("nodes")
    records = [record(number, split=split) for number in range(20) for split in ("train", "test")]
    for node in range(2):
        (folder / f"node{node}").mkdir()
        build(folder / f"node{node}" / "corpus", records)
    build(folder / "node1" / "other", records[:-2])
    changes = ["nothing", "damaged", "missing", "another"]
    ranks = run_ranks(open_on_nodes, 2, str(folder), changes)
    return dict(zip(changes, zip(*ranks, strict=True), strict=True))


def test_equal_copies_are_opened(messages):
    assert messages["nothing"] == ("opened 40", "opened 40")


@pytest.mark.parametrize(("change", "what"), [("damaged", "was changed: its SHA-256"), ("missing", "is missing")])
def test_damage_on_one_node_is_an_error_of_all_with_its_rank_and_host(messages, change, what):
    text, other = messages[change]
    assert text == other
    assert text.startswith(f"rank 1: on host {os.uname().nodename}: corpus/shards/00000.bin {what}")


def test_another_corpus_on_one_node_is_named(messages):
    text, other = messages["another"]
    assert text == other
    assert "corpus is another corpus on host" in text and "(rank 1, " in text and "copy the same to every node" in text
