"""Convert an exported folder to GGUF, for llama.cpp, with llama.cpp's own converter.

    python examples/gguf/to_gguf.py LLAMA_CPP FOLDER OUT.gguf [f32|f16|bf16|q8_0] [--pre NAME]

LLAMA_CPP is a checkout of llama.cpp (0.5.0; older ones may lack what this imports). The converter needs PyYAML, tqdm
and requests beside what SGTM needs. It is run on exports of the families llama and mixtral, with three corrections:

- It recognises how a tokenizer cuts words by a hash of what it makes of a test text, and refuses a newly trained one.
  A tokenizer that `sgtm prepare` has trained cuts words as GPT-2's does, which this script finds in tokenizer.json.
  Of another one the converter may still know the hash; else `--pre` names what llama.cpp shall do, as `llama-bpe`.
- Neither BOS nor EOS is added to a text, as in training. As an export names no BOS, llama.cpp would take token 11 for
  it; the EOS stands there instead.
- The vocabulary is that of tokenizer.json, also where its size is one by which the converter recognises CodeLlama.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = ("f32", "f16", "bf16", "q8_0")
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "GraniteMoeSharedForCausalLM")
RECORD, TOKENIZER = "sgtm_export.json", "tokenizer.json"
PLAIN = {"continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token", "byte_fallback"}
"""Settings of a BPE that llama.cpp does not have."""


def check(folder: Path, out: Path) -> None:
    """Raises ValueError where llama.cpp cannot compute the folder's model from its text, or `out` exists."""
    if out.exists():
        raise ValueError(f"{out} exists; give a new file")
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has no {RECORD}: no export of SGTM; run llama.cpp's converter itself on it")
    (architecture,) = read(folder / "config.json")["architectures"]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{folder / 'config.json'}: llama.cpp has no {architecture}; it runs exports of the families llama and "
            f"mixtral ({', '.join(ARCHITECTURES)})"
        )
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{folder} has no {TOKENIZER}, and a GGUF needs one; export where the corpus can be read")
    state = read(path)
    model = state["model"]
    if model["type"] != "BPE" or any(model.get(setting) for setting in PLAIN):
        settings = ", ".join(sorted(setting for setting in PLAIN if model.get(setting)))
        raise ValueError(
            f"{path}: the model is {model['type']}{settings and f' with {settings}'}; only byte-level BPE can be "
            f"converted, such as `sgtm prepare` trains"
        )
    if not model["merges"]:
        raise ValueError(f"{path}: no merges, and llama.cpp loads no BPE without; its bytes alone are no vocabulary")
    if pieces := control_pieces(state):
        raise ValueError(
            f"{path}: the text {pieces[0]!r} is spelled out in training and export, but llama.cpp would make a control "
            f"token of it, because the BPE has it as a piece; such a tokenizer cannot be converted"
        )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def control_pieces(state: Mapping[str, Any]) -> list[str]:
    """Control tokens that the BPE of a tokenizer.json makes of their text."""
    model = state["model"]
    pieces = {"".join(merge) for merge in model["merges"]}
    if model.get("ignore_merges"):
        pieces |= model["vocab"].keys()
    return [token["content"] for token in state["added_tokens"] if token["special"] and token["content"] in pieces]


def words_of(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how the tokenizer cuts words: `gpt-2`; None for other words than GPT-2's."""
    cut = state["pre_tokenizer"] or {}
    plain = state["normalizer"] is None and not state["model"].get("ignore_merges")
    gpt_2 = cut.get("type") == "ByteLevel" and not cut["add_prefix_space"] and cut.get("use_regex", True)
    return "gpt-2" if plain and gpt_2 else None


def correct(words: str | None) -> None:
    """Change llama.cpp's converter, which is on the path, as the docstring of this file has it."""
    from conversion.base import TextModel
    from conversion.llama import LlamaModel

    if words:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: words

    def set_vocab(self):
        self._set_vocab_gpt2()
        self.gguf_writer.add_bos_token_id(self.hparams["eos_token_id"])
        self.gguf_writer.add_add_bos_token(False)
        self.gguf_writer.add_add_eos_token(False)

    LlamaModel.set_vocab = set_vocab


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", nargs="?", choices=KINDS, default="f32")
    parser.add_argument("--pre")
    args = parser.parse_args(arguments)
    script = args.llama_cpp / "convert_hf_to_gguf.py"
    try:
        check(args.folder, args.out)
        if not (args.llama_cpp / "conversion" / "base.py").is_file():
            raise ValueError(f"{args.llama_cpp} has no conversion/base.py; give a checkout of llama.cpp 0.5.0 or later")
        sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
        correct(args.pre or words_of(read(args.folder / TOKENIZER)))
        sys.argv = [str(script), str(args.folder), "--outfile", str(args.out), "--outtype", args.kind]
        runpy.run_path(str(script), run_name="__main__")
    except NotImplementedError as error:
        sys.exit(f"error: {str(error).strip().splitlines()[0]}; name the words of the tokenizer with --pre")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
