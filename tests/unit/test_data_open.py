"""From a config to its corpus: a folder, or the embedded one among the runs."""

import pytest
from corpora import build, config_for, mixed_records

from sgtm.data.open import open_corpus


def test_the_folder_that_the_config_names_is_opened_and_checked_as_asked(tmp_path):
    corpus = build(tmp_path / "corpus", mixed_records(4))
    config = config_for(path=str(tmp_path / "corpus"))
    assert open_corpus(config).fingerprint == corpus.fingerprint
    shard = tmp_path / "corpus/shards/00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert open_corpus(config, "sizes").vocab_size == 257
    with pytest.raises(ValueError, match=r"00000\.bin was changed"):
        open_corpus(config)


def test_a_folder_that_is_missing_or_unfinished_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no corpus at {tmp_path}/no"):
        open_corpus(config_for(path=str(tmp_path / "no")))
    (build(tmp_path / "corpus", mixed_records(4)).path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        open_corpus(config_for(path=str(tmp_path / "corpus")))


@pytest.mark.parametrize("write", [True, False])
def test_synthetic_is_that_of_the_runs_and_the_vocabulary(monkeypatch, write):
    opened = []
    monkeypatch.setattr("sgtm.data.open.open_synthetic", lambda *args, **options: opened.append((args, options)))
    config = config_for(path="synthetic").model_copy(update={"runs": "deep/runs"})
    open_corpus(config, "sizes", write=write)
    assert opened == [(("deep/runs", 257, "sizes"), {"write": write})]
