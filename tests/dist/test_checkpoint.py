"""Checkpoints: bitwise continuation in every stage, and nothing lost when one is damaged or the disk is full."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from tiny import FORGET, MIXED, tiny_config, tiny_model, tiny_step

from sgtm.distributed.testing import run_ranks
from sgtm.model.rows import live_keys

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


def train(engine, steps) -> list[float]:
    losses = []
    for step in steps:
        labels = (FORGET,) * 8 if step % 2 else MIXED
        total = torch.zeros(())
        for batch in tiny_step(engine.config, step, labels, engine.rank, engine.world_size):
            loss, _ = engine(*batch)
            total += loss.detach()
            engine.backward(loss)
        engine.step(live_keys(engine.config.tables, labels), 1e-2)
        losses.append(float(total))
    return losses


def fingerprint(engine) -> str:
    """Every bit of this rank's weights, moments and counts."""
    digest = hashlib.sha256(json.dumps(engine.optimizer.steps).encode())
    for tensor in engine.optimizer.tables:
        for part in (tensor, *(engine.optimizer.state[tensor][name] for name in ("exp_avg", "exp_avg_sq"))):
            digest.update(part.detach().contiguous().numpy().tobytes())
    for parameter in engine.module.parameters():
        data = getattr(parameter, "ds_tensor", parameter).detach()
        digest.update(data.float().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def new_engine(config, seed: int = 0):
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    init_distributed(config)
    return Engine(tiny_model(config, seed), config)


def continue_everywhere(folder: str) -> None:
    """Save at 2, go on to 4; another engine with other weights that has run a dry step resumes and does the same."""
    from sgtm.distributed.storage import consolidate
    from sgtm.train.checkpoint import find_latest, load_checkpoint, save_checkpoint

    for stage, precision in CASES:
        case, run = f"ZeRO {stage} {precision}", Path(folder, f"{stage}-{precision}")
        config = tiny_config(stage, precision)
        engine = new_engine(config)
        train(engine, (0, 1))
        torch.rand(1 + engine.rank)  # as a rank's own draws would
        saved = save_checkpoint(engine, run, 2, config, progress=f"of rank {engine.rank}")
        torch.rand(3)
        masters = {f.name: [] for f in engine.fragments}
        for f in engine.fragments:
            part = f.tensor.detach().reshape(-1)[f.offset : f.offset + f.end - f.start].clone()
            masters[f.name].append((f.start, part))
        losses, expected = train(engine, (2, 3)), fingerprint(engine)

        other = new_engine(config, seed=7)
        for batch in tiny_step(config, 9, MIXED, other.rank, other.world_size):
            other.backward(other(*batch)[0])
        other.step(frozenset(), 0.0)
        assert load_checkpoint(other, find_latest(run), config) == (2, f"of rank {other.rank}")
        torch.rand(3)
        assert train(other, (2, 3)) == losses, f"{case}: resumed losses differ"
        assert fingerprint(other) == expected, f"{case}: the resumed run is another one"

        whole = consolidate(saved)
        shapes = {name: tensor.shape for name, tensor in tiny_model(config).state_dict().items()}
        assert {name: tensor.shape for name, tensor in whole.items()} == shapes
        for name, pieces in masters.items():
            for start, part in pieces:
                assert torch.equal(whole[name].flatten()[start : start + part.numel()], part), f"{case}: {name}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, world_size):
    run_ranks(continue_everywhere, world_size, str(tmp_path))


def message_of(action) -> str:
    """The error of this rank, after making sure that all ranks have the same."""
    with pytest.raises((ValueError, OSError)) as caught:
        action()
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, str(caught.value))
    assert len(set(everyone)) == 1, everyone
    return everyone[0]


def alone(action) -> None:
    """Run `action` on rank 0 while no rank does anything else."""
    from sgtm.distributed.agree import on_rank_zero

    torch.distributed.barrier()
    on_rank_zero(action)


def damage(folder: str) -> None:
    """Everything that can be wrong with a checkpoint, on two ranks under ZeRO-2."""
    from sgtm.train.checkpoint import find_latest, load_checkpoint, remove_unfinished, save_checkpoint, verify

    config, run = tiny_config(2, "bf16"), Path(folder)
    engine = new_engine(config)
    assert find_latest(run) is None
    older, newest = (save_checkpoint(engine, run, step, config) for step in (1, 2))
    assert find_latest(run) == newest and (run / "checkpoints/latest").read_text() == "step_00000002\n"
    verify(newest)

    def message(now=config):
        return message_of(lambda: load_checkpoint(engine, newest, now))

    def spoiled(name: str, change) -> str:
        """The error when a file of the newest checkpoint is changed by `change(bytes)`, None removing it."""
        path = newest / name
        whole = path.read_bytes()
        changed = change(whole)
        alone(lambda: path.unlink() if changed is None else path.write_bytes(changed))
        text = message()
        alone(lambda: path.write_bytes(whole))
        return text

    shard = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    flipped = bytearray((newest / shard).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for name, change, words in [
        (shard, lambda whole: whole[:-100], "bytes"),
        (shard, lambda whole: bytes(flipped), "SHA-256"),
        (shard, lambda whole: None, "is missing"),
        ("mp_rank_00_model_states.pt", lambda whole: b"", "has 0 bytes"),
    ]:
        text = spoiled(name, change)
        assert str(newest / name) in text and words in text and str(older) in text, text
    assert "manifest.json is missing" in spoiled("manifest.json", lambda whole: None)
    assert "manifest.json is damaged" in spoiled("manifest.json", lambda whole: whole[:50])

    for section, key, value in [
        ("model", "norm_eps", 1e-3),
        ("masking", "joint", "free"),
        ("data", "seed", 5),
        ("optimizer", "lr", 0.5),
        ("train", "tokens_per_step", 96),
        ("train", "micro_batch", 4),
        ("train", "precision", "fp32"),
        ("distributed", "zero_stage", 3),
    ]:
        other = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
        assert f"{section}.{key}: {getattr(getattr(config, section), key)} in the checkpoint, {value}" in message(other)
    os.environ["SGTM_KERNELS"] = "reference"
    assert "kernels.backend: runs in the checkpoint, reference now by SGTM_KERNELS" in message()
    del os.environ["SGTM_KERNELS"]
    same = config.model_copy(update={"name": "x", "train": config.train.model_copy(update={"log_every": 3})})
    assert load_checkpoint(engine, newest, same)[0] == 2

    manifest = json.loads((newest / "manifest.json").read_text())
    alone(lambda: (newest / "manifest.json").write_text(json.dumps(manifest | {"ranks": 8})))
    command = f"torchrun --standalone --nproc_per_node 8 -m sgtm train {run} --resume"
    assert f"ranks: 8 in the checkpoint, 2 now; start it with: {command}" in message()

    (run / f"checkpoints/.tmp-step_0000000{5 + engine.rank}").mkdir()
    alone(lambda: remove_unfinished(run))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", older.name, newest.name]
    alone(lambda: shutil.rmtree(newest))
    assert find_latest(run) == older


def full_disk(stage: int, run: Path) -> None:
    """Rank 1 cannot write more than a few kilobytes: both ranks say so, and the last checkpoint is still there."""
    from sgtm.train.checkpoint import find_latest, load_checkpoint, save_checkpoint, verify

    config = tiny_config(stage, train={"keep_last": 2})
    engine = new_engine(config)
    first = save_checkpoint(engine, run, 1, config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    text = message_of(lambda: save_checkpoint(engine, run, 2, config))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000002 could not be saved" in text and "pp_rank_1" in text and "File too large" in text, text
    assert f"the last whole one is {first}" in text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert find_latest(run) == first
    verify(first)
    train(engine, (0,))
    for step in (2, 3, 3):  # the disk is free again; the same step twice, as a resumed run may
        save_checkpoint(engine, run, step, config)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000003"], "keep_last: 2"
    again = new_engine(config, seed=3)
    assert load_checkpoint(again, find_latest(run), config)[0] == 3


def damage_and_full_disk(folder: str) -> None:
    damage(f"{folder}/damaged")
    for stage in (1, 3):
        full_disk(stage, Path(folder, f"full{stage}"))


def test_damaged_foreign_and_unfinished_checkpoints(tmp_path):
    run_ranks(damage_and_full_disk, 2, str(tmp_path))
