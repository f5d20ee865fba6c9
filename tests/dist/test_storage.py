"""A checkpoint of any stage and number of ranks resumes in any other, and as DeepSpeed's universal checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from engines import assemble, new_engine, save, train
from ranks import run_ranks
from tiny import tiny_config, tiny_model

from sgtm.distributed.storage import STATE_TENSORS, Stored

STAGES = (0, 1, 2, 3)
BOUND = {"fp32": 1e-5, "bf16": 1e-3}


def whole_state(engine) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and both moments of every parameter, flattened, put together from all ranks."""
    state = {"fp32": assemble(engine, lambda f: f.tensor.detach().reshape(-1))}
    for part in STATE_TENSORS[1:]:
        state[part] = assemble(engine, lambda f, part=part: engine.optimizer.state[f.tensor][part].reshape(-1))
    return state


def module_weights(engine) -> dict[str, torch.Tensor]:
    """What the model computes with: whole parameters, or this rank's part."""
    return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in engine.module.named_parameters()}


def save_all(folder: str) -> None:
    """Two steps, a checkpoint, two more, in every stage and precision."""
    for precision in BOUND:
        for stage in STAGES:
            config, run = tiny_config(stage, precision), Path(folder, f"{precision}-{stage}")
            engine = new_engine(config)
            train(engine, (0, 1))
            save(engine, run, 2, config, progress=engine.rank)
            state = whole_state(engine)
            losses = [float(engine.all_reduce_sum(torch.tensor(loss))) for loss in train(engine, (2, 3))]
            if engine.rank == 0:
                torch.save((state, losses, engine.optimizer.steps), run / "expected")


def load_all(folder: str, saved_by: int) -> None:
    from sgtm.run.resume import find_whole, load_checkpoint

    for precision, bound in BOUND.items():
        for source in STAGES:
            run = Path(folder, f"{precision}-{source}")
            expected, losses, steps = torch.load(run / "expected")
            for stage in STAGES if precision == "fp32" else (1, 3):
                case = f"{precision}: ZeRO {source} of {saved_by} ranks into {stage}"
                config = tiny_config(stage, precision)
                engine = new_engine(config, seed=7)
                directory = find_whole(run, engine.rank, engine.world_size, pytest.fail)
                done, progress, changes = load_checkpoint(engine, directory, config)
                assert done == 2 and progress == list(range(saved_by))
                assert f"ranks: {saved_by} in the checkpoint, {engine.world_size} now" in changes
                assert (f"distributed.zero_stage: {source}" in changes) == (stage != source)
                state = whole_state(engine)
                for part in STATE_TENSORS:
                    for name, values in expected[part].items():
                        assert torch.equal(state[part][name], values), f"{case}: {part} of {name}"
                check_module(engine, expected["fp32"], case)
                again = [float(engine.all_reduce_sum(torch.tensor(loss))) for loss in train(engine, (2, 3))]
                assert again == pytest.approx(losses, rel=bound), case
                assert engine.optimizer.steps == {key: steps[key] for key in steps}, case


def check_module(engine, weights: dict[str, torch.Tensor], case: str) -> None:
    starts = {f.name: (f.start, f.end) for f in engine.fragments}
    for name, parameter in engine.module.named_parameters():
        weight, expected = parameter.detach().flatten(), weights[name]
        if hasattr(parameter, "ds_tensor"):
            start, end = starts.get(name, (0, 0))
            weight, expected = parameter.ds_tensor.detach().flatten()[: end - start], expected[start:end]
        assert torch.equal(weight, expected.to(weight.dtype)), f"{case}: module's {name}"


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run_ranks(save_all, 4, str(folder))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_goes_on_in_every_other(of_four_ranks: Path, ranks: int):
    run_ranks(load_all, ranks, str(of_four_ranks), 4)


def convert(source: Path, out: Path) -> None:
    """By DeepSpeed's own converter."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        argparse.Namespace(input_folder=str(source), output_folder=str(out), inject_missing_state=False, **options)
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_universal_checkpoint_is_deepspeeds(of_four_ranks: Path, tmp_path: Path, stage: int):
    """Tensor by tensor as DeepSpeed's converter writes it; of ZeRO 3 that one leaves out the shape."""
    from sgtm.distributed.universal import write_universal

    source = of_four_ranks / f"fp32-{stage}" / "checkpoints" / "step_00000002"
    convert(source, tmp_path / "theirs")
    write_universal(source, tmp_path / "ours")
    shapes = {name: p.shape for name, p in tiny_model(tiny_config()).named_parameters()}
    for name, shape in shapes.items():
        for part in STATE_TENSORS:
            file = Path("zero", name, f"{part}.pt")
            theirs = torch.load(tmp_path / "theirs" / file)
            theirs = theirs if isinstance(theirs, torch.Tensor) else theirs["param"]
            ours = torch.load(tmp_path / "ours" / file)
            assert ours["param"].shape == shape and torch.equal(ours["param"].flatten(), theirs.flatten()), file
    with pytest.raises(FileExistsError, match="ours exists"):
        write_universal(source, tmp_path / "ours")
    assert not list(tmp_path.glob(".*")), "what it began is not left behind"


def load_by_deepspeed(folder: str, expected: str, precision: str) -> None:
    """DeepSpeed's own loader of universal checkpoints, in ZeRO 1 and 2."""
    from sgtm.distributed import engine as module

    original = module.deepspeed_config
    for stage in (1, 2):
        module.deepspeed_config = lambda *args: original(*args) | {"checkpoint": {"load_universal": True}}
        engine = new_engine(tiny_config(stage, precision), seed=7)
        module.deepspeed_config = original
        with module._quiet():
            engine._deepspeed.load_checkpoint(str(Path(folder).parent), tag=Path(folder).name)
        state, (weights, _, _) = whole_state(engine), torch.load(expected)
        assert all(torch.equal(state["fp32"][name], values) for name, values in weights["fp32"].items()), stage


@pytest.mark.parametrize("precision", list(BOUND))
def test_deepspeed_loads_the_universal_checkpoint(of_four_ranks: Path, tmp_path: Path, precision: str):
    from sgtm.distributed.universal import write_universal

    run = of_four_ranks / f"{precision}-3"
    write_universal(run / "checkpoints" / "step_00000002", tmp_path / "universal")
    run_ranks(load_by_deepspeed, 2, str(tmp_path / "universal"), str(run / "expected"), precision)


def test_a_gap_is_an_error(of_four_ranks: Path):
    stored = Stored(of_four_ranks / "bf16-2" / "checkpoints" / "step_00000002")
    name = next(iter(stored.shapes))
    stored._pieces[name] = stored._pieces[name][1:]
    with pytest.raises(ValueError, match=rf"holds \d+ of elements 0:\d+ of exp_avg of '{name}'"):
        stored.read(name, "exp_avg")
