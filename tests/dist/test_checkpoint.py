"""Checkpoints: bitwise continuation in every stage, and nothing lost when one is damaged or the disk is full."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from engines import new_engine, save, train
from ranks import run_ranks
from tiny import MIXED, tiny_config, tiny_model, tiny_step
from waiting import wait_until

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


def fingerprint(engine) -> str:
    """Every bit of this rank's weights, moments and counts; padding belongs to no weight."""
    digest = hashlib.sha256(json.dumps(engine.optimizer.steps).encode())
    parameters = dict(engine.module.named_parameters())
    for f in engine.fragments:
        state, numel = engine.optimizer.state[f.tensor], f.end - f.start
        for part in (f.tensor, state["exp_avg"], state["exp_avg_sq"]):
            digest.update(part.detach().reshape(-1)[f.offset : f.offset + numel].numpy().tobytes())
        sharded = getattr(parameters[f.name], "ds_tensor", None)
        if sharded is not None:
            digest.update(sharded.detach().reshape(-1)[:numel].float().numpy().tobytes())
    for parameter in parameters.values():
        if not hasattr(parameter, "ds_tensor"):
            digest.update(parameter.detach().float().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def load(engine, run: Path, config) -> tuple[int, list]:
    from sgtm.run.resume import find_whole, load_checkpoint

    step, progress, reshaped = load_checkpoint(engine, find_whole(run, engine.rank, engine.world_size, print), config)
    assert reshaped == ""
    return step, progress


def hold_back(engine) -> threading.Event:
    """Nothing is written by this engine before the event is set."""
    event, inner = threading.Event(), engine._writer._write

    def write():
        event.wait()
        inner()

    engine._writer._write = write
    return event


def written(writer):
    """The checkpoint in the making, as a loop that polls after each step gets it."""
    saved = []
    wait_until(lambda: bool(saved.append(writer.poll()) or saved[-1]))
    return saved[-1]


def continue_everywhere(folder: str) -> None:
    """Save at 2 and, with nothing written yet, go on to 4; another engine with other weights that has run a dry step
    resumes at 2 and does the same."""
    from sgtm.distributed.storage import stored_weights
    from sgtm.run.saving import CheckpointWriter

    for stage, precision in CASES:
        case, run = f"ZeRO {stage} {precision}", Path(folder, f"{stage}-{precision}")
        config = tiny_config(stage, precision)
        engine = new_engine(config)
        train(engine, (0, 1))
        torch.rand(1 + engine.rank)  # as a rank's own draws would
        writer = CheckpointWriter(engine, run, config)
        hold = hold_back(engine)
        assert writer.start(2, f"of rank {engine.rank}") == []
        torch.rand(3)
        masters = {f.name: [] for f in engine.fragments}
        for f in engine.fragments:
            part = f.tensor.detach().reshape(-1)[f.offset : f.offset + f.end - f.start].clone()
            masters[f.name].append((f.start, part))
        losses, expected = train(engine, (2, 3)), fingerprint(engine)
        assert engine.saving and writer.poll() is None, f"{case}: training has waited for the disk"
        if engine.rank == 0 and engine.world_size > 1:  # the others still write
            hold.set()
            wait_until(lambda engine=engine: not engine.saving)
        assert engine.world_size == 1 or writer.poll() is None, f"{case}: published before all have written"
        hold.set()
        saved = written(writer)
        assert (saved.path, saved.step) == (run / "checkpoints/step_00000002", 2)
        assert saved.bytes == sum(file.stat().st_size for file in saved.path.glob("*.pt"))
        copies = [buffer.data_ptr() for buffer in engine._writer._copies._buffers]
        assert len(copies) > 3 or engine.rank, "in ZeRO 0 rank 0 writes everything"
        assert writer.start(4) == [] and writer.close().step == 4
        assert copies == [buffer.data_ptr() for buffer in engine._writer._copies._buffers], "one copy, used again"
        alone(lambda run=run: shutil.rmtree(run / "checkpoints/step_00000004"))

        other = new_engine(config, seed=7)
        for batch in tiny_step(config, 9, MIXED, other.rank, other.world_size):
            other.backward(other(*batch)[0])
        other.step(frozenset(), 0.0)
        assert load(other, run, config) == (2, [f"of rank {rank}" for rank in range(other.world_size)])
        torch.rand(3)
        assert train(other, (2, 3)) == losses, f"{case}: resumed losses differ"
        assert fingerprint(other) == expected, f"{case}: the resumed run is another one"

        whole = stored_weights(saved.path)
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
    from sgtm.distributed.on_ranks import on_rank_zero

    torch.distributed.barrier()
    on_rank_zero(action)


CONFIG = tiny_config(2, "bf16")
OLDER, NEWEST = "checkpoints/step_00000001", "checkpoints/step_00000002"
FIRST_SHARD, SHARD = (f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))


def save_twice(folder: str) -> None:
    from sgtm.run.checkpoint import find_latest

    run, engine = Path(folder), new_engine(CONFIG)
    assert find_latest(run) is None
    assert [save(engine, run, step, CONFIG) for step in (1, 2)] == [run / OLDER, run / NEWEST]
    assert find_latest(run) == run / NEWEST and (run / "checkpoints/latest").read_text() == "step_00000002\n"


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory) -> Path:
    """A run with two checkpoints, of two ranks under ZeRO-2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(save_twice, 2, str(run))
    return run


@pytest.fixture
def run(saved_run, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved_run, tmp_path / "run")


def whole(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that two ranks would resume from, and what they print."""
    from sgtm.run.resume import find_whole

    messages: list[str] = []
    return find_whole(run, torch.distributed.get_rank(), 2, messages.append), messages


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "truncated": [
        (SHARD, lambda content: content[:-100], "bytes"),
        (FIRST_SHARD, lambda content: content[:-1], "bytes"),  # the first of all files
        ("mp_rank_00_model_states.pt", lambda content: b"", "has 0 of "),
        ("manifest.json", lambda content: content[:50], "is damaged"),
    ],
    "flipped": [(SHARD, flip_a_bit, "SHA-256")],
    "missing": [(SHARD, None, "is missing"), ("manifest.json", None, "is missing")],
}
"""Files of a checkpoint with what is done to their bytes, None for a removal, and words of the message."""


def damage(folder: str, kind: str) -> None:
    run = Path(folder)
    older, newest = run / OLDER, run / NEWEST
    quarantined = newest.with_name(f"damaged-{newest.name}")
    assert whole(run) == (newest, [])
    for name, change, words in DAMAGE[kind]:
        path, content = newest / name, (newest / name).read_bytes()
        changed = None if change is None else change(content)
        alone(lambda path=path, changed=changed: path.unlink() if changed is None else path.write_bytes(changed))
        checkpoint, (text,) = whole(run)
        assert checkpoint == older and not newest.exists() and quarantined.is_dir()
        assert str(path) in text and words in text, text
        assert text.endswith(f"; quarantined as {quarantined.name}, resuming from {older.name}")
        alone(lambda name=name, content=content: (quarantined / name).write_bytes(content))
        alone(lambda: quarantined.rename(newest))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_quarantined(run, kind):
    run_ranks(damage, 2, str(run), kind)


def damage_all(folder: str) -> None:
    run = Path(folder)
    assert whole(run / "none") == (None, [])
    older, newest = run / OLDER, run / NEWEST
    original = (older / SHARD).read_bytes()
    for directory in (older, newest):
        alone(lambda directory=directory: (directory / SHARD).write_bytes(b"no"))
    text = message_of(lambda: whole(run))
    assert text.startswith("no checkpoint is valid:\n  ") and f"{newest / SHARD} has 2 of " in text, text
    assert f"{older / SHARD} has 2 of " in text and older.is_dir() and newest.is_dir()
    alone(lambda: (older / SHARD).write_bytes(original))
    assert whole(run)[0] == older


def test_without_a_valid_checkpoint_nothing_is_quarantined(run):
    run_ranks(damage_all, 2, str(run))


def changed(section: str, key: str, value):
    return CONFIG.model_copy(update={section: getattr(CONFIG, section).model_copy(update={key: value})})


def refuse_other_settings(folder: str) -> None:
    from sgtm.run.resume import load_checkpoint

    def message(now) -> str:
        return message_of(lambda: load_checkpoint(None, Path(folder, NEWEST), now))  # refused before an engine is used

    for section, key, value in [
        ("model", "norm_eps", 1e-3),
        ("masking", "joint", "free"),
        ("data", "seed", 5),
        ("optimizer", "lr", 0.5),
        ("train", "tokens_per_step", 96),
        ("train", "precision", "fp32"),
    ]:
        text = message(changed(section, key, value))
        assert f"{section}.{key}: {getattr(getattr(CONFIG, section), key)} in the checkpoint, {value}" in text
    os.environ["SGTM_KERNELS"] = "reference"
    assert "kernels.backend: torch in the checkpoint, reference now by SGTM_KERNELS" in message(CONFIG)


def test_other_settings_are_refused(saved_run):
    run_ranks(refuse_other_settings, 2, str(saved_run))


def resume_otherwise(folder: str) -> None:
    from sgtm.run.resume import load_checkpoint

    engine, newest = new_engine(CONFIG), Path(folder, NEWEST)
    same = CONFIG.model_copy(update={"name": "x", "train": CONFIG.train.model_copy(update={"log_every": 3})})
    assert load_checkpoint(engine, newest, same) == (2, [None, None], "")
    other = "same data in the same order, sums in another (train.micro_batch: 2 in the checkpoint, 4 now)"
    assert load_checkpoint(engine, newest, changed("train", "micro_batch", 4)) == (2, [None, None], other)
    *_, other = load_checkpoint(engine, newest, changed("distributed", "communication", "bf16"))
    assert "(distributed.communication: fp32 in the checkpoint, bf16 now)" in other


def test_another_shape_is_resumed_and_reported(saved_run):
    run_ranks(resume_otherwise, 2, str(saved_run))


def test_unfinished_checkpoints_are_removed(run):
    from sgtm.run.checkpoint import remove_unfinished

    for name in (".tmp-step_00000005", ".tmp-step_00000006", "damaged-step_00000004"):
        (run / "checkpoints" / name).mkdir()
    remove_unfinished(run)
    assert names(run) == ["damaged-step_00000004", "latest", "step_00000001", "step_00000002"]


def full_disk(stage: int, folder: str) -> None:
    """Rank 1 cannot write more than a few kilobytes."""
    from sgtm.run.checkpoint import find_latest, verify

    run, config = Path(folder), tiny_config(stage, train={"keep_last": 2})
    engine = new_engine(config)
    first = save(engine, run, 1, config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    text = message_of(lambda: save(engine, run, 2, config))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000002 could not be saved" in text and "pp_rank_1" in text and "File too large" in text, text
    assert f"the last checkpoint is {first}" in text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert find_latest(run) == first
    verify(first)
    train(engine, (0,))
    for step in (2, 3, 3):  # the disk is free again; the same step twice, over one that was not whole
        save(engine, run, step, config)
    wait_until(lambda: names(run) == ["latest", "step_00000002", "step_00000003"])
    again = new_engine(config, seed=3)
    assert load(again, run, config)[0] == 3


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("stage", [1, 3])
def test_the_last_checkpoint_outlives_a_full_disk(tmp_path, stage):
    run_ranks(full_disk, 2, stage, str(tmp_path / "run"))
