"""The log of a run on a disk that is full, and with a line that is damaged."""

from __future__ import annotations

import math

import pytest
from many_domains import summary
from tiny import tiny_config

from sgtm.config import load_config
from sgtm.config.sections import WandbConfig
from sgtm.run.metrics import REFUSAL, MetricsLog, _start_wandb, read_metrics

LINE = {"step": 1, "seconds": 1.0, "loss": 2.0, "tokens_per_second": 3.0}


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    log = MetricsLog(tmp_path, tiny_config(), rank=0, start=0)
    log.open()
    with pytest.raises(OSError) as full, log:
        log.step(LINE)
        log.file.close()
        log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        log.step({**LINE, "step": 2})
    assert str(full.value).startswith(f"{tmp_path / 'metrics.jsonl'} could not be written: No space left on device;")
    assert str(full.value).endswith(f". Fix the disk, then resume: sgtm train {tmp_path} --resume")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


DAMAGES = {  # the first bytes of a line, and what is said of them
    "another encoding": (b'{"kind": "st\xe9p", "step": 2}', r"""not UTF-8: '{"kind": "st\xe9p", "step": 2}'"""),
    "cut short": (b'{"kind": "st', 'not a JSON object: \'{"kind": "st\''),
    "zeros": (b"\0\0", r"not a JSON object: '\x00\x00'"),
    "a number": (b"2", "not a line of a log: '2'"),
    "no step": (b'{"kind": "step"}', 'not a line of a log: \'{"kind": "step"}\''),
    "no kind": (b'{"step": 2}', "not a line of a log: '{\"step\": 2}'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_told_with_the_remedy_or_left_out_at_the_end(tmp_path, damage):
    data, problem = DAMAGES[damage]
    whole = b'{"kind": "step", "step": 1}\n'
    (file := tmp_path / "metrics.jsonl").write_bytes(whole + data + b"\n" + whole)
    with pytest.raises(ValueError) as raised:
        read_metrics(file)
    assert str(raised.value) == f"{file}, line 2: {problem}; delete the line, or put back a copy of the file"
    file.write_bytes(whole + data)
    assert read_metrics(file) == [{"kind": "step", "step": 1}]


def test_skipped_steps_are_told_where_one_watches(tmp_path, capsys):
    """Also where no step of an interval had a loss."""
    log = MetricsLog(tmp_path, tiny_config(), rank=0, start=0)
    log.open()
    with log:
        log.step({**LINE, "skipped_steps": 0, "loss/retain": 2.0})
        log.step({**LINE, "skipped_steps": 9, "loss": math.nan})
    first, second = (line.strip() for line in capsys.readouterr().out.splitlines())
    assert "loss 2.000  (retain 2.000)  3 tokens/s" in first and "skipped" not in first
    assert "loss nan  9 skipped  3 tokens/s" in second


@pytest.mark.parametrize(
    ("sequences", "text"),
    [("null", "on up to 64 sequences each"), (1, "on up to 1 sequence each"), ("all", "on all sequences")],
)
def test_an_evaluation_names_its_sample(tmp_path, capsys, sequences, text):
    log = MetricsLog(tmp_path, load_config("debug", [f"--train.eval_sequences={sequences}"]), rank=0, start=0)
    log.open()
    with log:
        log.evaluation(4, {"full": {"en": 2.0}}, {}, {})
    assert f"eval at step 4, {text}: full: en 2.000" in capsys.readouterr().out


def test_an_evaluation_that_is_not_finite_is_a_warning(tmp_path, capsys):
    log = MetricsLog(tmp_path, tiny_config(), rank=0, start=0)
    log.open()
    with log:
        log.evaluation(3, {"full": {"en": 2.0, "es": math.nan}, "without es": {"en": math.inf, "es": math.nan}}, {}, {})
        log.evaluation(4, {"full": {"en": 2.0}}, {}, {})
    lines = capsys.readouterr().out.splitlines()
    assert "eval at step 4, on up to 64 sequences each: full: en 2.000" in lines
    warnings = [line for line in lines if "warning" in line]
    bad = "es (full); en, es (without es)"
    assert warnings == [f"warning: step 3: not finite: the loss of {bad}; the model has diverged"]


@pytest.mark.parametrize(
    ("reason", "refused"),
    [
        ("permission denied", True),
        ("entity no-such-team not found during upsertBucket", True),
        ("response error 403: forbidden", True),
        ("dial tcp 10.0.0.1:40412: connect: connection refused", False),
        ("lookup api.wandb.ai: host not found", False),
        ("context deadline exceeded", False),
    ],
)
def test_a_server_out_of_reach_is_no_refusal(reason, refused):
    assert bool(REFUSAL.search(reason)) == refused


@pytest.mark.parametrize(("keys", "warned"), [({}, False), ({"project": "mine"}, True), ({"entity": "team"}, True)])
def test_keys_of_wandb_without_a_mode_are_warned_of(tmp_path, keys, warned):
    lines = []
    config = tiny_config().model_copy(update={"wandb": WandbConfig(**keys)})
    assert _start_wandb(tmp_path, config, [], lines.append) == (None, {})
    assert ["wandb.mode is off" in line for line in lines] == [True] * warned


@pytest.mark.parametrize("count", [4, 50])
def test_the_terminal_has_a_few_lines_of_many_domains(tmp_path, capsys, count):
    log = MetricsLog(tmp_path, tiny_config(), rank=0, start=0)
    log.open()
    of = summary(count)
    losses, sample = of["losses"], {key: of[key] for key in ("true_labels", "measured")}
    with log:
        log.step({**LINE, "loss/retain": 2.0, **{f"loss/forget:d{i}": 3.0 + i for i in range(1, count + 1)}})
        log.evaluation(1, losses, {}, sample)
    step, full, each, every = (line.strip() for line in capsys.readouterr().out.splitlines())
    of_domains = f"{count} domains {3.5 + count / 2:.3f} (4.000 to {3 + count:.3f})"
    assert (f"(retain 2.000  {of_domains})" in step) == (count > 4) and ("forget:d4 7.000" in step) == (count == 4)
    assert full.startswith("eval at step 1, on up to") and "full: en 2.000, fr 2.100, d1 2.200" in full
    assert each.startswith(f"Removing one of {count} domains") and every.startswith(f"Without all {count} domains")
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["losses"] == losses
