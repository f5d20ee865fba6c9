"""Weights to start from: a Hugging Face folder, into the groups of a run's partition.

Promises that the model computes what the folder's does in evaluation (`tests/unit/test_pretrained.py`): whatever
differs between the two is refused by name, but for a shorter context. Dropout, which training here does not have, is
left out with a warning.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sgtm.config.schema import ModelConfig
from sgtm.data.store import Corpus
from sgtm.data.tokenizer import load_tokenizer
from sgtm.hf.config import model_config_from_hf
from sgtm.hf.experts import folder_state
from sgtm.hf.weights import from_hf_state
from sgtm.masking.partition import Partition

WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
# Keys of ModelConfig that shape no function: how weights are drawn, and what is recomputed.
FREE = {"init_std", "activation_checkpointing"}


def load_pretrained(folder: Path | str, config: ModelConfig, partition: Partition) -> dict[str, Tensor]:
    """State of our model from a folder with config.json and safetensors, in the dtype that they have there.

    The folder is what `save_pretrained` and `sgtm export` write, of GPT-Neo, Llama, Mixtral, Mistral without a sliding
    window, or Granite MoE without multipliers. Its context may be longer than that of `config`; learned positions
    beyond are left out.

    Raises ValueError for a folder that is none, for a model that `config` does not describe, naming every key that
    differs, and for tensors that are missing, too many, or not of the shape in config.json.
    """
    folder = Path(folder)
    try:
        theirs, described = _read_config(folder)
        _compare(described, config)
        weights = _read_weights(folder)
        _check_shapes(weights, theirs)
        state = from_hf_state(weights, theirs, partition)
    except ValueError as error:
        raise ValueError(f"train.init_from {folder}: {error}") from None
    if "position" in state:
        state["position"] = state["position"][: config.context]
    return state


def check_tokenizer(folder: Path | str, corpus: Corpus) -> None:
    """Raises ValueError where the folder has a tokenizer in which an id of the corpus stands for another token.

    Vocabularies of one size pass for one another everywhere else, and the weights would read gibberish.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER).is_file():
        return
    theirs = {i: token for token, i in load_tokenizer(folder).get_vocab(with_added_tokens=True).items()}
    ours = corpus.tokenizer.get_vocab(with_added_tokens=True)
    other = sorted((i, token) for token, i in ours.items() if theirs.get(i, token) != token)
    if other:
        i, token = other[0]
        raise ValueError(
            f"train.init_from {folder} has another tokenizer than the corpus {corpus.path}: {len(other)} ids stand for "
            f"other tokens, {i} for {theirs[i]!r} there and {token!r} in the corpus; prepare the data with "
            f"--tokenizer {folder}"
        )


def _read_config(folder: Path) -> tuple[PretrainedConfig, ModelConfig]:
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"it is a run directory; export it first: sgtm export {folder} --out FOLDER")
    if not folder.exists():
        raise ValueError("there is no such folder; names of the Hugging Face hub are not looked up")
    if not (folder / "config.json").is_file():
        raise ValueError("no config.json there; give a folder written by `save_pretrained` or `sgtm export`")
    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers does not check types, and huggingface_hub has errors of its own
        raise ValueError(f"its config.json cannot be read: {error}") from None
    try:
        return theirs, model_config_from_hf(theirs)
    except KeyError as error:
        raise ValueError(f"its config.json has no {error}; give a folder written by `save_pretrained`") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"its config.json cannot be read: {error}") from None


def _compare(theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises ValueError that lists the keys in which the models are not the same function."""
    their_values, our_values = _function(theirs), _function(ours)
    if theirs.context >= ours.context:
        their_values["context"] = ours.context
    different = [key for key in our_values if their_values[key] != our_values[key]]
    if different:
        lines = "\n".join(
            f"  model.{key}: {their_values[key]} there, {our_values[key]} in the config" for key in different
        )
        raise ValueError(f"it is another model than the config's; what differs:\n{lines}")


def _function(config: ModelConfig) -> dict:
    """The keys that say what a model computes, defaults resolved."""
    keys = config.model_dump(exclude=FREE) | {"kv_heads": config.num_kv_heads, "head_dim": config.size_per_head}
    unused = {"rope_theta": config.family == "gpt_neo", "window": config.layers == 1}
    return {key: None if unused.get(key) else value for key, value in keys.items()}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        else:
            files = [WEIGHTS]
        return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    except FileNotFoundError as error:
        raise ValueError(f"no weights as safetensors ({error})") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights are damaged ({error})") from None


def _check_shapes(weights: dict[str, Tensor], config: PretrainedConfig) -> None:
    with torch.device("meta"):
        expected = folder_state(AutoModelForCausalLM.from_config(config).state_dict(), config.model_type)
    wrong = [name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape]
    if wrong:
        shapes = ", ".join(f"{name} is {list(weights[name].shape)}" for name in sorted(wrong)[:3])
        raise ValueError(f"the weights do not have the shapes of config.json ({shapes}); copy both from one model")
