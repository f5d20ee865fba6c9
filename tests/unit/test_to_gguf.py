"""examples/gguf without llama.cpp: what is refused, how words are cut, and which tokens are added."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from exports import GPT_NEO, LLAMA
from story_exports import export_of_stories
from tokenizer_folders import byte_level
from tokenizers import Tokenizer, models

from sgtm.data.tokenizer import train_bpe

SCRIPT = Path(__file__).parents[2] / "examples" / "gguf" / "to_gguf.py"
spec = importlib.util.spec_from_file_location("to_gguf", SCRIPT)
assert spec is not None and spec.loader is not None
to_gguf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(to_gguf)


@pytest.mark.parametrize("kind", ["ours", "bos", "eos", "bos-and-eos", "not-declared"])
def test_words_are_those_of_gpt_2_whatever_is_added_to_a_text(tmp_path, kind):
    folder = export_of_stories(tmp_path, LLAMA, kind)
    to_gguf.check(folder, tmp_path / "safe.gguf")
    assert to_gguf.words_of(to_gguf.read(folder / "tokenizer.json")) == "gpt-2"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
    ids=str,
)
def test_other_words_are_left_to_the_converter(changes):
    state = json.loads(byte_level().to_str())
    assert to_gguf.words_of(state) == "gpt-2"
    assert to_gguf.words_of(state | changes) is None
    assert to_gguf.words_of(state | {"model": state["model"] | {"ignore_merges": True}}) is None


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("unigram", "the model is Unigram; only byte-level BPE can be converted"),
        ("merged-piece", r"the text '<\|endoftext\|>' is spelled out in training .* the BPE has it as a piece"),
        ("whole-piece", r"the text '<\|endoftext\|>' is spelled out in training .* the BPE has it as a piece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path, kind, problem):
    folder = export_of_stories(tmp_path, LLAMA, kind)
    with pytest.raises(ValueError, match=rf"out/tokenizer\.json: {problem}"):
        to_gguf.check(folder, tmp_path / "safe.gguf")


def test_bytes_without_merges_or_with_a_fallback_are_refused(tmp_path):
    folder = export_of_stories(tmp_path, LLAMA)
    (folder / "tokenizer.json").write_text(train_bpe([], 257).to_str())
    with pytest.raises(ValueError, match="no merges"):
        to_gguf.check(folder, tmp_path / "safe.gguf")
    fallback = Tokenizer(models.BPE({"a": 0, "<0x00>": 1}, [], byte_fallback=True, unk_token="a"))
    (folder / "tokenizer.json").write_text(fallback.to_str())
    with pytest.raises(ValueError, match="the model is BPE with byte_fallback, unk_token; only byte-level BPE"):
        to_gguf.check(folder, tmp_path / "safe.gguf")


def test_what_is_no_export_or_has_no_form_is_refused_and_files_stay(tmp_path):
    out = tmp_path / "safe.gguf"
    folder = export_of_stories(tmp_path / "neo", GPT_NEO)
    with pytest.raises(ValueError, match=r"llama\.cpp has no GPTNeoForCausalLM; it runs exports of the families llama"):
        to_gguf.check(folder, out)
    folder = export_of_stories(tmp_path / "llama", LLAMA)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"out has no tokenizer\.json"):
        to_gguf.check(folder, out)
    (folder / "sgtm_export.json").unlink()
    with pytest.raises(ValueError, match="no export of SGTM"):
        to_gguf.check(folder, out)
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"safe\.gguf exists; give a new file"):
        to_gguf.check(folder, out)
    assert out.read_text() == "mine"


def test_errors_are_one_line(tmp_path):
    folder = export_of_stories(tmp_path, LLAMA)
    with pytest.raises(SystemExit, match=r"^error: .*nothing has no conversion/base\.py; give a checkout"):
        to_gguf.main([str(tmp_path / "nothing"), str(folder), str(tmp_path / "safe.gguf")])


class Written(dict):
    """A writer of GGUF metadata: what was written last, by the name of its method."""

    def __getattr__(self, name):
        return lambda value: self.update({name: value})


@pytest.fixture
def converter(monkeypatch) -> SimpleNamespace:
    """The parts of llama.cpp's converter that the script changes."""

    class TextModel:
        def __init__(self, hparams):
            self.hparams, self.gguf_writer = hparams, Written()

        def get_vocab_base_pre(self, tokenizer):
            raise NotImplementedError

        def _set_vocab_gpt2(self):
            self.gguf_writer.add_tokenizer_pre(self.get_vocab_base_pre(None))

    class LlamaModel(TextModel):
        pass

    modules = {"conversion": ModuleType("conversion"), "conversion.base": SimpleNamespace(TextModel=TextModel)}
    modules |= {"conversion.llama": SimpleNamespace(LlamaModel=LlamaModel)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(LlamaModel=LlamaModel)


def test_no_token_is_added_to_a_text_and_the_eos_stands_for_the_bos(converter):
    """llama.cpp takes token 11 for the BOS of such a tokenizer where none is named."""
    to_gguf.correct("gpt-2")
    model = converter.LlamaModel({"eos_token_id": 256, "vocab_size": 32016})  # by this size it recognises CodeLlama
    model.set_vocab()
    no_tokens = {"add_add_bos_token": False, "add_add_eos_token": False}
    assert model.gguf_writer == {"add_tokenizer_pre": "gpt-2", "add_bos_token_id": 256, **no_tokens}


def test_the_converter_names_words_that_are_not_given(converter):
    to_gguf.correct(None)
    with pytest.raises(NotImplementedError):
        converter.LlamaModel({"eos_token_id": 0}).set_vocab()


def test_unknown_words_end_in_one_line_that_names_the_option(tmp_path, converter, monkeypatch):
    folder, out = export_of_stories(tmp_path, LLAMA), tmp_path / "safe.gguf"
    checkout = tmp_path / "llama.cpp"
    (checkout / "conversion").mkdir(parents=True)
    (checkout / "conversion" / "base.py").touch()
    (checkout / "convert_hf_to_gguf.py").write_text("raise NotImplementedError('not recognized\\nsecond line')")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["to_gguf.py"])
    with pytest.raises(SystemExit, match=r"^error: not recognized; name the words of the tokenizer with --pre$"):
        to_gguf.main([str(checkout), str(folder), str(out), "q8_0", "--pre", "qwen2"])
    assert sys.argv[1:] == [str(folder), "--outfile", str(out), "--outtype", "q8_0"]
    assert converter.LlamaModel({}).get_vocab_base_pre(None) == "qwen2"
