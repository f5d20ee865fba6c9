"""Ways to tamper with an exported folder, and what an audit reports of each."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import torch
from audited import change_json, change_record, change_tensors, relist

from sgtm.hf.card import RECORD
from sgtm.hf.export import CARD, CONFIG, export_run
from sgtm.run.evaluate import load_run_model

WEIGHTS = "model.safetensors"


def extra_file(folder: Path, run: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"moments")


def hidden_file(folder: Path, run: Path) -> None:
    (folder / ".full").write_bytes(b"weights")


def listed_extra_file(folder: Path, run: Path) -> None:
    extra_file(folder, run)
    relist(folder)


def subfolder(folder: Path, run: Path) -> None:
    (folder / "original").mkdir()
    shutil.copy(folder / WEIGHTS, folder / "original" / WEIGHTS)


def link(folder: Path, run: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def missing_file(folder: Path, run: Path) -> None:
    (folder / "generation_config.json").unlink()


def truncated(folder: Path, run: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def truncated_and_listed(folder: Path, run: Path) -> None:
    truncated(folder, run)
    relist(folder)


def flipped_bit(folder: Path, run: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def flipped_bit_and_listed(folder: Path, run: Path) -> None:
    flipped_bit(folder, run)
    relist(folder)


def metadata(folder: Path, run: Path) -> None:
    change_tensors(folder, lambda tensors: None, {"format": "pt", "note": "a" * 999})


def trailing_bytes(folder: Path, run: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"weights")
    relist(folder)


def padded_header(folder: Path, run: Path) -> None:
    """A key twice: readers take the second."""
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].replace(b'{"format":"pt"}', b'{"format":"weights","format":"pt"}', 1)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    relist(folder)


def rows_of_es(run: Path, name: str) -> torch.Tensor:
    model = load_run_model(run)
    rows = model.parameter_rows()[name]
    ((start, end),) = [
        (a, b) for key, a, b in zip(rows.keys, rows.bounds[:-1], rows.bounds[1:], strict=True) if key.endswith(".es")
    ]
    return dict(model.named_parameters())[name][start:end].detach()


def extra_tensor(folder: Path, run: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update(extra=rows_of_es(run, "blocks.0.mlp.w_in")))


def removed_column_put_back(folder: Path, run: Path) -> None:
    """In the place of another neuron of the matrix, which would then do its work."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        ends = ("c_proj.weight", "down_proj.weight", "w2.weight", "moe.output_linear.weight")
        name = next(name for name in tensors if name.endswith(ends))
        matrix = tensors[name][0] if tensors[name].dim() == 3 else tensors[name]
        matrix[:, 5] = rows_of_es(run, "blocks.0.mlp.w_out")[0]

    change_tensors(folder, change)


def missing_tensor(folder: Path, run: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))


def swapped_tensors(folder: Path, run: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        one, two = (name for name in tensors if name.endswith(("ln_1.weight", "input_layernorm.weight")))
        tensors[one], tensors[two] = tensors[two], tensors[one]

    change_tensors(folder, change)


def other_dtype(folder: Path, run: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name].half()

    change_tensors(folder, change)


def other_shape(folder: Path, run: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        ends = ("c_fc.weight", "up_proj.weight", "w3.weight", "shared_mlp.input_linear.weight")
        name = next(name for name in tensors if name.endswith(ends))
        tensors[name] = torch.cat((tensors[name], rows_of_es(run, "blocks.0.mlp.w_in")[:1]))

    change_tensors(folder, change)


def vocabulary_size(folder: Path, run: Path) -> None:
    change_json(folder / CONFIG, lambda config: config.update(vocab_size=258))
    relist(folder)


def custom_code(folder: Path, run: Path) -> None:
    change_json(folder / CONFIG, lambda config: config.update(auto_map={"AutoModelForCausalLM": "a/b--c.D"}))
    relist(folder)


def generation_settings(folder: Path, run: Path) -> None:
    change_json(folder / "generation_config.json", lambda config: config.update(eos_token_id=7))
    relist(folder)


def tokenizer_entry(folder: Path, run: Path) -> None:
    def swap(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    change_json(folder / "tokenizer.json", swap)
    relist(folder)


def chat_template(folder: Path, run: Path) -> None:
    change_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template="{{ 'x' }}"))
    relist(folder)


def swapped_tokenizer_denied(folder: Path, run: Path) -> None:
    """With a record that says there is none, so that nothing is held against it."""
    tokenizer_entry(folder, run)
    for name in (CONFIG, "generation_config.json"):
        change_json(folder / name, lambda config: config.update(eos_token_id=7))
    change_record(folder, lambda record: record.update(tokenizer=False))


def unlisted_end_of_text(folder: Path, run: Path) -> None:
    """A tokenizer that is taken away, and a token that ends texts all the same."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    change_json(folder / CONFIG, lambda config: config.update(eos_token_id=7))
    change_record(folder, lambda record: record.update(tokenizer=False))


def _hide(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))
    relist(file.parent)


def repeated_key(folder: Path, run: Path) -> None:
    _hide(folder / CONFIG, "{", '{\n  "vocab_size": "AAAA",')


def text_between_keys(folder: Path, run: Path) -> None:
    _hide(folder / "generation_config.json", "{", "{ \t \t ")


def text_in_a_tokenizer(folder: Path, run: Path) -> None:
    _hide(folder / "tokenizer.json", "{", "{ \t \t ")


def text_as_a_version(folder: Path, run: Path) -> None:
    change_json(folder / CONFIG, lambda config: config.update(transformers_version="AAAA"))
    relist(folder)


def title_that_claims(folder: Path, run: Path) -> None:
    text = (folder / CARD).read_text()
    (folder / CARD).write_text(text.replace("# safe", "# Certified safe", 1))
    relist(folder)


def all_losses_left_out(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record.update(losses=None))


def forged_certificate(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record.update(independent_of=["es"]))


def more_removed(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record.update(removed=["es", "fr"]))


def forged_losses(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record["losses"]["rows"][1].update(this=9.0))


def forged_losses_of_another_sample(folder: Path, run: Path) -> None:
    """The run was not evaluated on such a sample, so that nothing but the model contradicts it."""
    change_record(
        folder, lambda record: (record["losses"].update(sequences=2), record["losses"]["rows"][1].update(this=9.0))
    )


def forged_full_loss_of_another_sample(folder: Path, run: Path) -> None:
    """As if the full model were worse than it is."""
    change_record(
        folder, lambda record: (record["losses"].update(sequences=2), record["losses"]["rows"][1].update(full=9.0))
    )


def losses_left_out(folder: Path, run: Path) -> None:
    """Of the safe model."""
    change_record(
        folder,
        lambda record: (
            record["losses"].update(sequences=2),
            [row.update(this=None, this_error=None) for row in record["losses"]["rows"]],
        ),
    )


def row_left_out(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: (record["losses"].update(sequences=2), record["losses"]["rows"].pop(1)))


def forged_label_of_another_sample(folder: Path, run: Path) -> None:
    change_record(
        folder,
        lambda record: (record["losses"].update(sequences=2), record["losses"]["rows"][1].update(true_label="retain")),
    )


def forged_partition(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record["partition"].update(groups=["retain"]))


def forged_recipe(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record.update(recipe="certified"))


def edited_card(folder: Path, run: Path) -> None:
    (folder / CARD).write_text((folder / CARD).read_text() + "\nCertified.\n")
    relist(folder)


def other_checkpoint(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record["checkpoint"].update(manifest_sha256="0" * 64))


def no_such_checkpoint(folder: Path, run: Path) -> None:
    change_record(folder, lambda record: record["checkpoint"].update(name="step_00000009"))


def full_model(folder: Path, run: Path) -> None:
    """With the record of the safe one."""
    record = json.loads((folder / RECORD).read_text())
    shutil.rmtree(folder)
    shutil.copytree(run.parent / "made" / "full", folder)
    change_record(folder, lambda full: (full.clear(), full.update(record)))


def weak_model(folder: Path, run: Path) -> None:
    """The domain at a part of its strength, as if it were removed."""
    record = json.loads((folder / RECORD).read_text())
    shutil.rmtree(folder)
    export_run(run, [], folder, strengths={"es": 0.01})
    change_record(folder, lambda weak: (weak.clear(), weak.update(record)))


TAMPERINGS = {
    extra_file: ("files", "optimizer.pt: sgtm_export.json does not list it (7 bytes)"),
    hidden_file: ("files", ".full: sgtm_export.json does not list it"),
    listed_extra_file: ("files", "optimizer.pt: no export has a file of this name"),
    subfolder: ("files", "original: a folder, which no export has"),
    link: ("files", "model.safetensors: a link to "),
    missing_file: ("files", "generation_config.json: missing"),
    truncated: ("files", "model.safetensors: "),
    truncated_and_listed: ("tensors", "model.safetensors: not a file of weights"),
    flipped_bit: ("files", "model.safetensors: SHA-256 is "),
    flipped_bit_and_listed: ("tensors", "1 of "),
    metadata: ("tensors", "model.safetensors: metadata {"),
    trailing_bytes: ("tensors", "model.safetensors: "),
    padded_header: ("tensors", "model.safetensors: "),
    extra_tensor: ("tensors", "tensor extra: the model has no such tensor"),
    removed_column_put_back: ("removed", " is the removed blocks.0.mlp.w_out row "),
    missing_tensor: ("tensors", "no tensor "),
    swapped_tensors: ("tensors", "elements differ from the checkpoint's, first at [0]"),
    other_dtype: ("tensors", "is torch.float16 ["),
    other_shape: ("tensors", "should be torch.float32 ["),
    vocabulary_size: ("config", "config.json: vocab_size is 258, should be 257"),
    custom_code: ("config", "config.json: auto_map should not be there"),
    generation_settings: ("config", "generation_config.json: eos_token_id is 7, should be "),
    tokenizer_entry: ("tokenizer", "tokenizer.json: model: vocab: a is "),
    chat_template: ("tokenizer", "tokenizer_config.json: chat_template should not be there"),
    swapped_tokenizer_denied: ("files", "tokenizer.json: sgtm_export.json says that there is no tokenizer"),
    unlisted_end_of_text: ("config", "config.json: eos_token_id is 7, should be None"),
    repeated_key: ("config", "config.json: not written as an export writes it"),
    text_between_keys: ("config", "generation_config.json: not written as an export writes it"),
    text_in_a_tokenizer: ("tokenizer", "tokenizer.json: not written as an export writes it"),
    text_as_a_version: ("config", "config.json: transformers_version is 'AAAA', should be "),
    title_that_claims: ("facts", "README.md: its title is 'Certified safe', which is no name of a folder"),
    all_losses_left_out: ("facts", "sgtm_export.json: losses are left out, which the run has"),
    forged_certificate: ("facts", "independent_of is ['es'], should be []"),
    more_removed: ("removed", " is the removed "),
    forged_losses: ("facts", "losses: rows: 1: this is 9.0, should be "),
    forged_losses_of_another_sample: ("losses", "sgtm_export.json: losses: es: this is 9.0, measured "),
    forged_full_loss_of_another_sample: ("losses", "sgtm_export.json: losses: es: full is 9.0, measured "),
    losses_left_out: ("losses", "sgtm_export.json: losses: en: this is None, measured "),
    row_left_out: ("losses", "sgtm_export.json: losses: no row of es"),
    forged_label_of_another_sample: ("losses", "losses: es: true_label is retain, measured forget:es"),
    forged_partition: ("facts", "partition: groups is ['retain'], should be ['retain', 'es', 'fr']"),
    forged_recipe: ("facts", "recipe is 'certified', should be None"),
    edited_card: ("facts", "README.md, line "),
    other_checkpoint: ("checkpoint", "manifest.json: SHA-256 is "),
    no_such_checkpoint: ("checkpoint", "step_00000009: there is no such checkpoint"),
    full_model: ("removed", " is the removed "),
    weak_model: ("tensors", "model.safetensors: tensor "),
}
"""By the function that does it to (folder, run): the check that fails, and a part of its problem."""
