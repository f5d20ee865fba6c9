"""A user's mistake is one message of one rank, and never a traceback; a bug of ours is not dressed up as one."""

import sys
from types import SimpleNamespace

import pytest

from sgtm.commands.errors import OPTIONS
from sgtm.commands.main import _parser, main

MISTAKES = {
    "preset": (["train", "debgu"], "error: unknown preset 'debgu'"),
    "key": (["train", "debug", "--train.step", "3"], "error: debug: train.step: unknown key"),
    "both": (
        ["train", "debug", "--resume", "--overwrite"],
        "error: --resume continues a run and --overwrite deletes it",
    ),
    "no run": (["eval", "no/such"], "error: no/such: not a run directory (no config.yaml in it)"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_a_message_and_status_2(case, capsys, monkeypatch):
    monkeypatch.delenv("SGTM_TRACEBACK", raising=False)
    arguments, expected = MISTAKES[case]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(expected)
    assert "Traceback" not in printed.err and not printed.out


@pytest.mark.parametrize("values", [["bio", "es"], ["[bio,", "es]"]])
def test_a_list_that_the_shell_cut_up_is_recognized(values, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "debug", "--masking.domains", *values])
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"unrecognized arguments: {values[1]}; a list or mapping is one argument, in quotes: --" in error


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--resmue", "; did you mean --resume?"),
        ("--steps=5", "; did you mean --train.steps?"),
        ("--warmup-steps=5", "; did you mean --optimizer.warmup_steps?"),
        ("--seed=5", "; did you mean --data.seed or --train.seed?"),
        ("--xyzzy", ""),
        ("-train.steps", "; write --train.steps VALUE"),
        ("train.lr=5", "; a list or mapping is one argument, in quotes: --masking.domains '[bio, chem]'"),
        ("train.steps=5", "; write --train.steps 5"),
        ("--train={steps: 3}", "; train is a section; write its keys one by one: --train.steps VALUE"),
    ],
)
def test_the_key_that_an_unknown_option_may_mean(argument, hint, capsys):
    unknown_option("train", argument, hint, capsys)


@pytest.mark.parametrize(
    ("command", "argument", "hint"),
    [
        ("bench", "--round=5", "; did you mean --rounds?"),
        ("profile", "--step=5", "; did you mean --steps or --train.steps?"),
        ("profile", "--resmue", ""),
    ],
)
def test_an_option_of_its_own_that_a_command_may_mean(command, argument, hint, capsys):
    unknown_option(command, argument, hint, capsys)


def test_a_second_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "debug", "quickstart"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: quickstart; train takes one preset or file\n")


def unknown_option(command, argument, hint, capsys):
    with pytest.raises(SystemExit):
        main([command, "debug", "--train.steps", "3", argument])
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {argument}{hint}\n")


def raising(monkeypatch, error):
    def train(*args, **options):
        raise error

    monkeypatch.setitem(sys.modules, "sgtm.training.loop", SimpleNamespace(train=train))
    return main(["train", "debug"])


def test_errors_of_the_system_are_named_by_file(monkeypatch, capsys):
    assert raising(monkeypatch, OSError(28, "No space left on device", "runs/debug/model.pt")) == 2
    assert capsys.readouterr().err == "error: runs/debug/model.pt: No space left on device\n"


def test_another_broken_pipe_is_told(monkeypatch, capfd):
    assert raising(monkeypatch, BrokenPipeError(32, "Broken pipe")) == 2
    assert capfd.readouterr().err == "error: Broken pipe\n"


def test_interrupt_and_own_bugs_are_not_dressed_up(monkeypatch, capsys):
    assert raising(monkeypatch, KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError):
        raising(monkeypatch, RuntimeError("a bug"))


def test_ranks_speak_once_about_the_config_and_each_for_itself_otherwise(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "debgu"]) == 2
    assert capsys.readouterr().err == ""
    assert raising(monkeypatch, ValueError("shard 2: hash differs")) == 2
    assert capsys.readouterr().err == "error: rank 3: shard 2: hash differs\n"
    together = ValueError("shard 2: hash differs")
    for together.rank, expected in ((2, ""), (3, "error: rank 3: shard 2: hash differs\n")):
        assert raising(monkeypatch, together) == 2
        assert capsys.readouterr().err == expected


def test_ranks_under_srun_speak_once_too(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for rank, expected in (("0", 1), ("1", 0)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert main(["train", "debgu"]) == 2
        assert capsys.readouterr().err.count("error: rank 0: unknown preset 'debgu'") == expected


def test_torchrun_ends_its_output_with_our_error(tmp_path, monkeypatch, capfd):
    """Read back by torch, beside a rank that it has ended for it: thirty lines of traceback come before."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "debug", "--train.steps", "-1"]) == 2
    assert capfd.readouterr().err == "", "rank 0 prints it"
    ended, failed = ProcessFailure(0, 100, -15, "<N/A>"), ProcessFailure(1, 101, 2, str(file))
    *_, last, border = str(ChildFailedError("sgtm", {0: ended, 1: failed})).splitlines()
    assert last.startswith("  traceback : error: rank 1: debug: train.steps: found -1") and set(border) == {"="}


def test_the_options_that_hints_know_are_those_of_the_parsers():
    parser, _ = _parser()
    commands = next(action for action in parser._actions if action.dest == "run" or action.choices).choices
    for command, options in OPTIONS.items():
        takes = {flag[2:] for flag in commands[command]._option_string_actions if flag.startswith("--")}
        assert takes - {"help", "preset"} == set(options), command
