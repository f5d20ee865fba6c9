"""examples/gguf without llama.cpp: what is refused, how words are cut, and the weights of shared experts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from exports import GPT_NEO, LLAMA, SHARED_EXPERTS
from safetensors.torch import load_file
from story_exports import VOCABULARY, export_of_stories
from tokenizer_folders import byte_level
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

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


def test_shared_experts_without_a_gate_compute_the_same(tmp_path):
    """Granite's MoE of transformers has the computation of llama.cpp's: no gate, and weights that add up to 1."""
    folder = export_of_stories(tmp_path, SHARED_EXPERTS)
    qwen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors").items()
    state = {name: part for key, tensor in tensors for name, part in to_gguf.of_granite(key, tensor)}
    config = qwen.config
    granite = GraniteMoeSharedForCausalLM(
        GraniteMoeSharedConfig(
            num_hidden_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size,
            shared_intermediate_size=config.shared_expert_intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            attention_multiplier=(config.hidden_size // config.num_attention_heads) ** -0.5,
        )
    )
    granite.load_state_dict(fused(state, config.num_experts))
    ids = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad():
        ours, theirs = qwen(ids).logits, granite(ids).logits
        qwen.set_experts_implementation("eager")  # the other one has no fp64
        exact = qwen.double()(ids).logits
    assert (theirs - exact).abs().max() <= 2 * (ours - exact).abs().max()


def fused(state: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """Names and shapes of transformers' Granite, which holds gate and up in one tensor."""
    rest = {name: tensor for name, tensor in state.items() if ".block_sparse_moe." not in name and ".mlp." not in name}
    for name in [name for name in state if name.endswith(".mlp.gate.weight")]:
        block = name.removesuffix(".mlp.gate.weight")
        of = [f"{block}.block_sparse_moe.experts.{number}" for number in range(experts)]
        moe, shared = f"{block}.block_sparse_moe", f"{block}.mlp.shared_expert"
        rest[f"{moe}.router.weight"] = state[name]
        rest[f"{moe}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([state[f"{expert}.{matrix}.weight"] for matrix in ("w1", "w3")]) for expert in of]
        )
        rest[f"{moe}.experts.down_proj"] = torch.stack([state[f"{expert}.w2.weight"] for expert in of])
        both = [state[f"{shared}.{matrix}_proj.weight"] for matrix in ("gate", "up")]
        rest[f"{block}.shared_mlp.input_linear.weight"] = torch.cat(both)
        rest[f"{block}.shared_mlp.output_linear.weight"] = state[f"{shared}.down_proj.weight"]
    return rest


def test_a_gate_that_depends_on_the_token_is_refused():
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    assert list(to_gguf.of_granite(name, torch.zeros(1, 4))) == []
    with pytest.raises(ValueError, match=f"{name} is not 0"):
        list(to_gguf.of_granite(name, torch.tensor([[0.0, 1e-9]])))


class Written(dict):
    """A writer of GGUF metadata: what was written last, by the name of its method."""

    def __getattr__(self, name):
        return lambda value: self.update({name: value})


@pytest.fixture
def converter(monkeypatch) -> SimpleNamespace:
    """The parts of llama.cpp's converter that the script changes."""
    registered: dict[str, type] = {}

    class ModelBase:
        @staticmethod
        def register(name):
            return lambda model: registered.setdefault(name, model)

    class TextModel(ModelBase):
        def __init__(self, hparams):
            self.hparams, self.gguf_writer = hparams, Written()

        def get_vocab_base_pre(self, tokenizer):
            raise NotImplementedError

        def _set_vocab_gpt2(self):
            self.gguf_writer.add_tokenizer_pre(self.get_vocab_base_pre(None))

    class LlamaModel(TextModel):
        def set_gguf_parameters(self):
            self.gguf_writer.add_feed_forward_length(self.hparams["intermediate_size"])

    gguf = SimpleNamespace(MODEL_ARCH=SimpleNamespace(GRANITE_MOE="granitemoe"))
    base = SimpleNamespace(LazyTorchTensor=None, ModelBase=ModelBase, TextModel=TextModel)
    modules = {"gguf": gguf, "conversion": ModuleType("conversion"), "conversion.base": base}
    modules |= {"conversion.llama": SimpleNamespace(LlamaModel=LlamaModel), "conversion.qwen": SimpleNamespace()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(LlamaModel=LlamaModel, registered=registered)


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


def test_shared_experts_are_written_as_granite(converter):
    to_gguf.correct("gpt-2")
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48}
    model = converter.registered["Qwen2MoeForCausalLM"]({"norm_topk_prob": True, "intermediate_size": 99, **sizes})
    model.set_gguf_parameters()
    written = {"add_feed_forward_length": 24, "add_expert_shared_feed_forward_length": 48, "add_logit_scale": 1.0}
    assert model.model_arch == "granitemoe" and model.gguf_writer == written
    with pytest.raises(ValueError, match="norm_topk_prob is false"):
        converter.registered["Qwen2MoeForCausalLM"]({"norm_topk_prob": False, **sizes})
