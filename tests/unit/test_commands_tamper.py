"""`sgtm tamper`: what its options become, and in which order things happen."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from signatures import as_called

from sgtm.commands.main import main
from sgtm.config.load import load_config, save_config
from sgtm.evaluation.tampering import Attack, Reached

ATTACK = Attack("forget", (("es",),), 1e-3, "constant", 1, 0, 64, (0, 1))
PLAN = SimpleNamespace(domains=("es",), forget=("es",), retain=("en",))


@pytest.fixture
def events(monkeypatch, tmp_path):
    """Calls of the functions behind the command, in order; the runs `a`, `b` and `c` are in the working directory."""
    noted: list[tuple] = []

    def noting(name, result):
        def note(*args, **options):
            noted.append((name, args, options))
            return result(*args) if callable(result) else result

        return note

    def opened(folder, data):
        return SimpleNamespace(
            run=folder,
            config=SimpleNamespace(name=folder.name),
            corpus=SimpleNamespace(path="corpus"),
            removed=lambda domains: () if folder.name == "b" else domains,
        )

    curve = [Reached(ATTACK, 0, 5.0), Reached(ATTACK, 1, 4.0)]
    modules = {
        "opened": {
            "open_with_corpus": opened,
            "check_control": None,
            "check_same_sequences": None,
            "knowing_control": "it knows the domain",
        },
        "tamper_plan": {"make_plan": PLAN},
        "evaluate": {"check_sample": None},
        "tampering": {"attack_run": curve, "full_loss": 4.5},
    }
    stand_ins = {}
    for module, results in modules.items():
        real = import_module(f"sgtm.run.{module}")
        stand_ins[module] = {
            name: as_called(getattr(real, name), noting(name, result)) for name, result in results.items()
        }
    for module, functions in stand_ins.items():
        real = vars(import_module(f"sgtm.run.{module}"))
        monkeypatch.setitem(sys.modules, f"sgtm.run.{module}", SimpleNamespace(**real | functions))
    for name in "abc":
        (tmp_path / name).mkdir()
        save_config(load_config("debug"), tmp_path / name / "config.yaml")
    monkeypatch.chdir(tmp_path)
    return noted


def test_defaults_are_those_of_the_grid(events, capsys):
    assert main(["tamper", "a"]) == 0
    assert [name for name, _, _ in events] == ["open_with_corpus", "make_plan", "attack_run"]
    assert events[0][1] == (Path("a"), None)
    assert events[1][2] == {"adjacent": []}
    assert events[2][2] == {"again": False, "note": print}
    assert "a (without es): lowest" in capsys.readouterr().out


def test_options_reach_the_grid(events):
    Path("moved").mkdir()
    options = "--domain es --lr 0.5 2 --schedule cosine --steps 3 9 --tokens 64 --warmup 0 --weight-decay 0.1 --seed 3"
    assert main(["tamper", "a", *options.split(), "--data", "forget", "--again", "--data.path", "moved"]) == 0
    assert events[0][1] == (Path("a"), "moved")
    assert events[1][2] == {
        "domains": ["es"], "data": ["forget"], "adjacent": [], "multiples": [0.5, 2], "schedules": ["cosine"],
        "budgets": [3, 9], "tokens": 64, "warmup": 0, "weight_decay": 0.1, "seed": 3,
    }  # fmt: skip
    assert events[2][2]["again"] is True


def test_adjacent_categories_are_attacked_with_too(events):
    assert main(["tamper", "a", "--adjacent", "news", "web"]) == 0
    assert events[1][2] == {"data": ["forget", "forget+retain", "adjacent"], "adjacent": ["news", "web"]}


def test_a_sample_that_was_asked_for_must_be_in_the_split(events):
    assert main(["tamper", "a", "--sequences", "9"]) == 0
    assert events[1][2]["sequences"] == 9
    assert events[2][0] == "check_sample" and events[2][1][2:] == (
        "test",
        ("es", "en"),
        9,
        "--sequences",
        "leave it out for up to 64",
    )


def test_control_and_baseline_are_checked_before_anything_is_trained(events, capsys):
    assert main(["tamper", "a", "--against", "b", "--baseline", "c"]) == 0
    assert [(name, args[0].name if name == "open_with_corpus" else None) for name, args, _ in events][:3] == [
        ("open_with_corpus", "a"), ("open_with_corpus", "b"), ("open_with_corpus", "c"),
    ]  # fmt: skip
    assert [name for name, _, _ in events][3:] == [
        "check_control", "check_same_sequences", "make_plan", "knowing_control", "full_loss",
        "attack_run", "attack_run",
    ]  # fmt: skip
    assert [args[0].run.name for name, args, _ in events if name == "attack_run"] == ["a", "b"]
    assert [args[0].run.name for name, args, _ in events if name == "full_loss"] == ["c"]
    assert [args[0].run.name for name, args, _ in events if name == "knowing_control"] == ["b"]
    out, err = capsys.readouterr()
    assert "warning: it knows the domain" in err
    assert "difference: from b (full) under the same attacks" in out
    assert "a (without es) reaches the loss of c (full), 4.500, by step 1 (not by step 0)" in out


def test_a_target_loss(events, capsys):
    assert main(["tamper", "a", "--target-loss", "3.5"]) == 0
    assert "a (without es) does not reach the target loss, 3.500, within 1 step\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "--lr", "0"], "argument --lr: expected a number above 0, got '0'"),
        (["a", "--lr", "-1"], "argument --lr"),
        (["a", "--steps", "0"], "argument --steps: expected a whole number above 0, got '0'"),
        (["a", "--data", "retain"], "argument --data: invalid choice: 'retain'"),
        (["a", "--schedule", "linear"], "argument --schedule: invalid choice: 'linear'"),
        (["a", "--baseline", "b", "--target-loss", "1"], "not allowed with argument"),
    ],
)
def test_mistakes_in_options_end_the_command(events, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["tamper", *options])
    assert exit.value.code == 2 and not events
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["", "--against", "--baseline"])
def test_a_folder_that_is_no_run_is_refused_first(events, capsys, option):
    assert main(["tamper", "a", option, "nope"] if option else ["tamper", "nope"]) == 2
    assert not events and "nope" in capsys.readouterr().err
