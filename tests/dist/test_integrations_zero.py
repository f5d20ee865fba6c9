"""Masked Hugging Face models on two ranks, under DDP and DeepSpeed: exact freeze and the gradients of one process."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hf_models import MASKING, differing, masked_model, plain_model, random_ids
from hf_steps import OPTIONS, OWN, STEPS, STRICT, one_process, pieces_of
from ranks import run_ranks
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from sgtm.integrations.hf import SgtmAdamW, SgtmCollator, SgtmTrainerMixin, apply_sgtm

# Accelerate looks for them, and then uses the process group that is there.
LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def deepspeed_config(stage: int, micro_batch: int = 2) -> dict:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": None,
    }


def zero_model(family: str, stage: int):
    """Masked before `deepspeed.initialize`; built under zero.Init for ZeRO 3, so that it never had whole weights."""
    import deepspeed

    source = plain_model(family)
    config = source.config.from_dict(source.config.to_dict())
    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(3)) if stage == 3 else nullcontext()
    with init:
        model = AutoModelForCausalLM.from_config(config)
    weights = dict(source.named_parameters())
    with (
        deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0, enabled=stage == 3),
        torch.no_grad(),
    ):
        for name, parameter in model.named_parameters():
            if parameter.numel():
                parameter.copy_(weights[name])
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    return apply_sgtm(model.train(), STRICT)


def gathered(model, stage: int) -> dict:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return pieces_of(model, dict(model.named_parameters()))


def under_deepspeed(family: str, stage: int) -> list[dict]:
    import deepspeed

    rank, model = torch.distributed.get_rank(), zero_model(family, stage)
    optimizer = SgtmAdamW(model, **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(stage))
    ids = random_ids(2)
    if stage:
        loss = engine(input_ids=ids, labels=ids, sgtm_labels=STEPS[0][rank]).loss
        engine.backward(loss)
        with pytest.raises(RuntimeError, match=r"call bind\(engine.optimizer\)"):
            engine.step()
        del engine, model, optimizer, loss
        model = zero_model(family, stage)
        optimizer = SgtmAdamW(model, **OPTIONS)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(stage))
        optimizer.bind(engine.optimizer)
    history = [gathered(model, stage)]
    for number, labels in enumerate(STEPS):
        ids = random_ids(2, 10 * number + rank)
        engine.backward(engine(input_ids=ids, labels=ids, sgtm_labels=labels[rank]).loss)
        engine.step()
        history.append(gathered(model, stage))
    return history


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_updates_what_one_process_does(family, stage):
    expected = one_process(family)
    for history in run_ranks(under_deepspeed, 2, family, stage):
        assert differing(history[0], expected[0]) == set()
        for after, ours in zip(history[1:], expected[1:], strict=True):
            for key, piece in after.items():
                assert torch.allclose(piece, ours[key], atol=2e-5), key
        assert differing(history[2], history[3]) == OWN  # the last step has bio's tokens alone


def resumed(folder: str, stage: int) -> tuple[list[dict], list[dict]]:
    """Steps counted and weights after three steps: without a pause, and resumed after the first two."""
    import deepspeed

    rank, results = torch.distributed.get_rank(), []
    for begin in (0, 2):
        model = zero_model("gpt2", stage)
        optimizer = SgtmAdamW(model, **OPTIONS)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(stage))
        optimizer.bind(engine.optimizer)
        if begin:
            engine.load_checkpoint(folder)
        for number, labels in enumerate(STEPS[begin:], begin):
            ids = random_ids(2, 10 * number + rank)
            engine.backward(engine(input_ids=ids, labels=ids, sgtm_labels=labels[rank]).loss)
            engine.step()
            if number == 1:
                engine.save_checkpoint(folder)
        results.append((dict(optimizer.param_groups[0]["steps"]), gathered(model, stage)))
    return results


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_of_deepspeed_resumes_to_the_bit(tmp_path, stage):
    for (steps, straight), (again, weights) in run_ranks(resumed, 2, str(tmp_path), stage):
        assert steps == again and len(set(steps.values())) > 1
        assert differing(straight, weights) == set()


def after_a_skipped_step(stage: int) -> tuple[list[dict], str]:
    """Weights after a step on retain data, one that DeepSpeed skips, and one on bio's; then an error without labels."""
    import deepspeed

    model = zero_model("llama", stage)
    config = deepspeed_config(stage)
    if stage:
        config |= {"bf16": {"enabled": True, "check_grad_overflow": True}}
        model = model.bfloat16() if stage < 3 else model
    optimizer = SgtmAdamW(model, **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.bind(engine.optimizer)
    ids, history = random_ids(2), []
    for label, factor in (("retain", 1.0), ("retain", float("inf")), ("forget:bio", 1.0)):
        if stage or factor == 1:
            engine.backward(engine(input_ids=ids, labels=ids, sgtm_labels=[label] * 2).loss * factor)
            engine.step()
        history.append(gathered(model, stage))
    engine.eval()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    with pytest.raises(ValueError, match="no forward pass since the last step had sgtm_labels") as raised:
        engine.step()
    return history, str(raised.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_that_is_skipped_leaves_no_label_to_the_next(stage):
    ((retain, skipped, bio), _), *_ = run_ranks(after_a_skipped_step, 2, stage)
    assert differing(retain, skipped) == set() and differing(skipped, bio) == OWN


class MaskedTrainer(SgtmTrainerMixin, Trainer):
    pass


def in_a_trainer(folder: str, config: dict | None) -> list[dict]:
    """Weights before, after retain data alone, and after bio's alone, each a run of two steps."""
    from datasets import Dataset

    model = masked_model("llama", joint="strict")
    stage = config["zero_optimization"]["stage"] if config else 0
    history = [pieces_of(model, dict(model.named_parameters()))]
    for label in ("retain", "forget:bio"):
        ids = random_ids(8).tolist()
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=0.01, weight_decay=0.1,
            deepspeed=config, max_grad_norm=1.0,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": ids, "labels": ids, "sgtm_labels": [label] * 8})
        collator = SgtmCollator(default_data_collator, STRICT)
        MaskedTrainer(model, arguments, data_collator=collator, train_dataset=data).train()
        history.append(gathered(model, stage))
    return history


@pytest.mark.parametrize("stage", [None, 2, 3], ids=str)
def test_a_trainer_on_two_ranks_freezes(tmp_path, stage):
    config = None
    if stage is not None:
        config = deepspeed_config(stage) | {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    first, second = run_ranks(in_a_trainer, 2, str(tmp_path), config, env=LAUNCHED)
    for before, after, ours in zip(first, first[1:], second[1:], strict=False):
        assert differing(after, ours) == set() and differing(before, after)
    assert not differing(first[0], first[1]) & OWN and differing(first[1], first[2]) == OWN


def with_an_optimizer_section(folder: str) -> str:
    model = masked_model("llama")
    config = deepspeed_config(2) | {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    arguments = TrainingArguments(folder, per_device_train_batch_size=2, use_cpu=True, report_to=[], deepspeed=config)
    try:
        MaskedTrainer(model, arguments, data_collator=SgtmCollator(default_data_collator, MASKING), train_dataset=[])
    except ValueError as error:
        return str(error)
    return ""


def test_a_deepspeed_optimizer_is_refused(tmp_path):
    (message,) = run_ranks(with_an_optimizer_section, 1, str(tmp_path), env=LAUNCHED)
    assert "the DeepSpeed config has a section 'optimizer'" in message
