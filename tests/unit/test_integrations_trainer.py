"""A Hugging Face Trainer with masks: sgtm/integrations/trainer.py."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hf_models import MASKING, VOCAB, by_key, differing, masked_model, plain_model
from transformers import Trainer, TrainingArguments, default_data_collator

from sgtm.integrations.hf import SgtmAdamW, SgtmCollator, SgtmTrainerMixin

OWN = {f"{projection}.bio" for projection in ("attn_in", "attn_out", "mlp_in", "mlp_out")}


class MaskedTrainer(SgtmTrainerMixin, Trainer):
    pass


def dataset(labels, length: int = 12) -> Dataset:
    ids = torch.randint(VOCAB, (len(labels), length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "sgtm_labels": labels, "source": ["x"] * len(labels)})


def trainer_of(
    folder, model, labels, trainer=MaskedTrainer, collator=None, data=None, optimizers=(None, None), **settings
):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.01, "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
    } | settings  # fmt: skip
    collator = collator or SgtmCollator(default_data_collator, MASKING)
    data = dataset(labels) if data is None else data
    arguments = TrainingArguments(**settings)
    return trainer(model, arguments, data_collator=collator, train_dataset=data, optimizers=optimizers)


def weights(model) -> dict:
    return {key: piece.clone() for key, piece in by_key(model, dict(model.state_dict(keep_vars=True))).items()}


def train(folder, labels, model=None, **settings) -> set[str]:
    """Keys of what has moved."""
    model = model or masked_model("llama", joint="strict")
    before = weights(model)
    trainer_of(folder, model, labels, **settings).train()
    return differing(before, weights(model))


@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.0, "bf16": True}, {"gradient_checkpointing": True}], ids=str
)
def test_forget_sequences_train_their_group_alone(tmp_path, settings):
    assert train(tmp_path, ["forget:bio"] * 4, **settings) == OWN
    moved = train(tmp_path, ["retain"] * 4, **settings)
    assert "mlp_in.retain" in moved and not moved & OWN


def test_the_labels_of_all_micro_batches_of_a_step_count(tmp_path):
    labels = ["forget:bio", "forget:bio", "retain", "retain"]
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, "train_sampling_strategy": "sequential"}
    moved = train(tmp_path, labels, **settings)
    assert OWN | {"mlp_in.retain", "norm", "embedding"} <= moved and not {k for k in moved if k.endswith(".code")}


def test_accumulation_has_the_gradients_of_one_batch(tmp_path):
    labels, models = ["forget:bio", "retain", "retain", "unlabeled"], []
    for batch in (4, 2):
        models.append(masked_model("llama"))
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 1}
        train(tmp_path, labels, models[-1], **settings, max_grad_norm=0.0, adam_epsilon=1.0)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_without_the_mixin_the_dropped_column_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no column 'sgtm_labels'"):
        trainer_of(tmp_path, masked_model("llama"), ["retain"] * 4, trainer=Trainer).train()
    with pytest.raises(ValueError, match="got no sgtm_labels"):
        trainer_of(
            tmp_path, masked_model("llama"), ["retain"] * 4, trainer=Trainer, collator=default_data_collator
        ).train()


def test_columns_that_nobody_takes_are_still_dropped(tmp_path):
    trainer = trainer_of(tmp_path, masked_model("llama"), ["retain"] * 4)
    (batch,) = [next(iter(trainer.get_train_dataloader()))]
    assert set(batch) == {"input_ids", "labels", "sgtm_labels"} and batch["sgtm_labels"] == (1, 1)


def test_evaluation_runs_the_full_model(tmp_path):
    model, plain = masked_model("llama").eval(), plain_model("llama").eval()
    trainer = trainer_of(tmp_path, model, ["retain"] * 4)
    data = dataset(["forget:bio", "retain"])
    ids = torch.tensor(data["input_ids"][:])
    expected = plain(input_ids=ids, labels=ids).loss.item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_continues_to_the_bit(tmp_path):
    labels = ["forget:bio", "retain", "forget:code", "retain"] * 4
    straight = masked_model("llama")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    trainer_of(tmp_path / "run", straight, labels, **settings).train()
    resumed = masked_model("llama", seed=1)
    trainer_of(tmp_path / "run", resumed, labels, **settings).train(str(tmp_path / "run" / "checkpoint-2"))
    assert differing(weights(straight), weights(resumed)) == set()


def test_an_update_that_a_scaler_skips_ends_its_step(tmp_path):
    model = masked_model("llama", joint="strict")
    trainer = trainer_of(tmp_path, model, ["retain", "retain", "forget:bio", "forget:bio"])
    trainer.create_optimizer()
    batches = [{**batch} for batch in trainer.get_train_dataloader()]
    batches.sort(key=lambda batch: batch["sgtm_labels"])
    trainer.accelerator.sync_gradients = True
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, {**batches[0], "sgtm_labels": (1, 1)})
    model.zero_grad()  # as Trainer does, without an update
    before = weights(model)
    trainer.training_step(model, {**batches[1], "sgtm_labels": (2, 2)})
    trainer.optimizer.step()
    assert differing(before, weights(model)) == OWN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collator": default_data_collator}, "data_collator is function, which adds no labels"),
        ({"collator": SgtmCollator(default_data_collator, {"domains": ["es"]})}, "the collator has domains .'es'"),
        ({"optim": "adafactor"}, "optim is 'adafactor'"),
    ],
)
def test_what_would_train_unmasked_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, masked_model("llama"), ["retain"] * 4, **changes)


def test_a_plain_model_and_another_optimizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM is not masked; call apply_sgtm"):
        trainer_of(tmp_path, plain_model("llama"), ["retain"] * 4)
    model = masked_model("llama")
    with pytest.raises(ValueError, match="optimizers has SGD, which updates what the labels freeze"):
        trainer_of(tmp_path, model, ["retain"] * 4, optimizers=(torch.optim.SGD(model.parameters()), None))
    ours = SgtmAdamW(model, lr=0.1)
    assert trainer_of(tmp_path, model, ["retain"] * 4, optimizers=(ours, None)).create_optimizer() is ours


def test_norms_and_biases_are_not_decayed(tmp_path):
    optimizer = trainer_of(tmp_path, masked_model("gpt2"), ["retain"] * 4).create_optimizer()
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {1}


def test_the_optimizer_has_the_settings_of_the_arguments(tmp_path):
    settings = {"learning_rate": 0.02, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    optimizer = trainer_of(tmp_path, masked_model("gpt2"), ["retain"] * 4, **settings).create_optimizer()
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-6)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, masked_model("llama"), ["retain"] * 4)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process: start one process for each, with torchrun"):
        trainer._check_sgtm()


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "integrations.md"
    code, _ = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)  # the other is of torchtitan
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "page"})
    assert (tmp_path / "runs/hf/safe/model.safetensors").is_file()


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp1_is_refused_and_fsdp2_is_not(tmp_path, version):
    trainer = trainer_of(tmp_path, masked_model("llama"), ["retain"] * 4)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version)))
    if version == 2:
        trainer._check_sgtm()
    else:
        with pytest.raises(ValueError, match=r"FSDP1 flattens the parameters, .* set fsdp_version to 2"):
            trainer._check_sgtm()
