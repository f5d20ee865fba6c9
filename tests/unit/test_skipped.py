"""Skipped steps: what is counted and printed, and when the run ends."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpora import build, config_for, mixed_records

from sgtm.data.loader import Loader
from sgtm.data.store import Corpus
from sgtm.process import ranks
from sgtm.process.ranks import RankInfo
from sgtm.training import skipped


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return build(tmp_path_factory.mktemp("skipped") / "corpus", mixed_records(120))


def tell(
    monkeypatch,
    corpus,
    losses: list[list[float]],
    in_a_row: int = 1,
    limit: int = 3,
    run: str = "none",
    without: tuple[str, ...] = ("retain", "es"),
) -> str:
    """What rank 0 says of step 4 on as many ranks as `losses` has rows."""
    config = config_for(micro_batch=2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_skipped_steps": limit})})
    engine = SimpleNamespace(losses=[], world_size=len(losses), skipped=without)
    monkeypatch.setattr(skipped, "on_every_rank", lambda action: losses)
    monkeypatch.setattr(skipped, "on_rank_zero", lambda action: action())
    loader = Loader(corpus, config, 0, len(losses))
    return skipped.describe_skipped(engine, loader, corpus, config, Path(run), 4, in_a_row)


def named(corpus: Corpus, rank: int, index: int) -> list[str]:
    """The documents of a micro-batch of step 4, as a message names them: every text begins with its number."""
    documents = Loader(corpus, config_for(micro_batch=2)).documents(4, 0, 2 * index + rank)
    categories = list(corpus.categories)
    texts = [corpus.tokenizer.decode(corpus.tokens(document)[:8].tolist()) for document in documents]
    of = [categories[corpus.documents["category"][document]] for document in documents]
    return [f"{document} ({c}, '{t}" for document, c, t in zip(documents, of, texts, strict=True)]


def test_the_worst_micro_batch_of_any_rank_is_named(monkeypatch, corpus):
    line = tell(monkeypatch, corpus, [[1.0, 2.0], [0.5, math.nan]])
    assert line.startswith("step 5: the loss is nan in micro-batch 2 of rank 1, which reads documents ")
    assert all(name in line for name in named(corpus, 1, 1)[:5]) and line.endswith("; nothing was updated")
    assert not any(name in line for name in named(corpus, 0, 1))
    line = tell(monkeypatch, corpus, [[1.0, math.nan]], without=("es",))
    assert line.endswith("; nothing of es was updated")
    line = tell(monkeypatch, corpus, [[1.0, math.inf], [math.nan, 2.0]])
    assert "the loss is inf in micro-batch 2 of rank 0 and 1 more micro-batches, which" in line
    line = tell(monkeypatch, corpus, [[1.0, 3.0], [0.5, 2.0]])
    assert "the gradient is not finite, the losses are; the largest is that of micro-batch 2 of rank 0, which" in line
    assert all(name in line for name in named(corpus, 0, 1)[:5])


def test_so_many_in_a_row_end_the_run_with_what_to_do(monkeypatch, corpus, tmp_path):
    assert "nothing was updated" in tell(monkeypatch, corpus, [[math.nan]] * 2, in_a_row=2)
    with pytest.raises(
        ValueError,
        match=r"^the run ends: 3 steps in a row were skipped \(train.max_skipped_steps\)\nstep 5: the loss is nan",
    ) as stopped:
        tell(monkeypatch, corpus, [[math.nan]] * 2, in_a_row=3)
    assert "no checkpoint was saved before" in str(stopped.value) and "skip past them" not in str(stopped.value)
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000002")
    for local, start in ((2, f"--nproc_per_node 2 -m sgtm train {tmp_path}"), (1, f"with the arguments: {tmp_path}")):
        monkeypatch.setattr(ranks, "detect_launch", lambda local=local: RankInfo("torchrun", 0, 2, 0, local))
        with pytest.raises(ValueError) as stopped:
            tell(monkeypatch, corpus, [[math.nan]] * 2, in_a_row=4, run=str(tmp_path))
        assert f"the last checkpoint is {tmp_path / 'checkpoints' / 'step_00000002'}" in str(stopped.value)
        assert str(stopped.value).endswith(f"{start} --resume --train.max_skipped_steps 0")
    assert "nothing was updated" in tell(monkeypatch, corpus, [[math.nan]], in_a_row=9, limit=0)
