"""Losses shipped beside a run, and the tables of sweeps in the documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sgtm.config import load_config
from sgtm.report import baselines
from sgtm.report.baselines import basis, shipped_baselines, with_shipped

ROOT = Path(__file__).parents[2]
HERE = {"device": "a device", "threads": 1, "versions": {"torch": "2"}}
pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_quickstart_ships_its_baselines():
    by_name = shipped_baselines(load_config("quickstart"))
    assert list(by_name) == ["unmasked", "filtered"] and all(set(losses) == {"en", "es"} for losses in by_name.values())
    assert by_name["filtered"]["es"] > by_name["unmasked"]["es"] + 1


@pytest.mark.parametrize(
    "override",
    ["--train.steps=599", "--optimizer.lr=1e-3", "--model.layers=5", "--data.path=data/mine", "--name=mine",
     "--data.upsample={es: 0}", "--data.mixing=token", "--optimizer.group_lr={es: 2}"],
)  # fmt: skip
def test_another_training_has_none(override):
    assert shipped_baselines(load_config("quickstart"))
    assert shipped_baselines(load_config("quickstart", [override])) == {}


def test_what_a_recipe_sets_is_not_of_the_basis():
    assert shipped_baselines(load_config("quickstart", ["--recipe=certified"]))
    assert shipped_baselines(load_config("quickstart", ["--train.seed=7", "--masking.forget_heads=2"]))


@pytest.mark.parametrize(
    ("section", "key", "other"),
    [("model", "experts", 4), ("optimizer", "group_lr", {"es": 2.0}), ("model", "head_bias", True)],
)
def test_a_key_younger_than_the_losses_must_have_its_default(monkeypatch, tmp_path, section, key, other):
    config = load_config("quickstart")
    shipped = json.loads((baselines.FOLDER / "quickstart.json").read_text())
    shipped["basis"][section].pop(key, None)
    (tmp_path / "quickstart.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(baselines, "FOLDER", tmp_path)
    assert shipped_baselines(config)
    changed = getattr(config, section).model_copy(update={key: other})
    assert shipped_baselines(config.model_copy(update={section: changed})) == {}


@pytest.mark.parametrize("name", ["quickstart", "debug"])
@pytest.mark.parametrize("steps", [600, 200])
def test_a_finished_run_of_the_preset_has_them_beside_its_own(name, steps):
    """Whatever command has evaluated it: they are of the end of a training."""
    config, summary = load_config(name), {"steps": steps, "of_steps": 600}
    shipped = {"baselines": shipped_baselines(config)} if (name, steps) == ("quickstart", 600) else {}
    assert with_shipped(summary, config) == summary | shipped


def variant(name: str, tokens: int, retain: float, forget: float, ablated: float | None = None) -> dict:
    four = {"full_retain": retain, "full_forget": forget, "ablated_retain": ablated, "ablated_forget": 9.0}
    losses = {"full": {"en": retain, "es": forget}}
    seeds = [{"run": f"{name}-s{seed}", "seed": seed, **four, "losses": losses} for seed in (0, 1)]
    spread = {f"{key}_sd": 0.01 for key in four}
    return {"variant": name, "finished": 2, "runs": 2, "tokens": tokens, **four, **spread, "seeds": seeds}


def test_compute_ratios_of_a_sweep_are_those_of_a_power_law():
    """Baselines on L = C ** -1/2: a recipe at the loss of 0.81 of the whole is at 0.81, whatever the longest is."""
    from recipes import ratios

    def loss(share: float, factor: float) -> float:
        return factor * share**-0.5

    rows = [
        variant(f"{name}{end}", int(share * tokens), loss(share, factor), loss(share, 2 * factor))
        for name, tokens, factor in (("unmasked", 4000, 3), ("filtered", 3000, 2.5))
        for end, share in (("-500", 0.5), ("", 1), ("-1500", 1.5))
    ]
    mine = variant("mine", 4000, loss(0.81, 3), loss(0.9, 6), loss(0.95, 2.5))
    compute_ratios = ratios(mine, [*rows, mine])
    assert {name: ratio["value"] for name, ratio in compute_ratios.items()} == pytest.approx(
        {"full_retain": 0.81, "full_forget": 0.9, "ablated_retain": 0.95}, abs=1e-3
    )
    assert not any(ratio["extrapolated"] for ratio in compute_ratios.values())
    assert ratios(variant("worse", 4000, 99.0, 99.0), rows)["full_retain"]["extrapolated"]
    assert ratios(mine, rows[:2]) == {}  # two lengths are no curve


TAMPERED = {"tampered": "dual", "seed": 0, "condition": "without es", "curve": []}


def test_losses_to_ship_are_means_over_the_seeds_and_rows_of_other_sweeps_stay(tmp_path, monkeypatch):
    import recipes

    rows = [variant("unmasked", 100, 3.0, 4.0), variant("filtered", 75, 3.5, 9.0), variant("dual", 100, 3.1, 4.1, 3.2)]
    for row in rows:
        row["masks"] = row["variant"] == "dual"
        row["seeds"][1]["losses"] = {"full": {"en": row["full_retain"] + 0.5, "es": row["full_forget"] + 1}}
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in (seed for row in rows for seed in row["seeds"]):
        run, environment = folder / seed["run"], HERE | {"commit": f"c{seed['seed']}", "time": str(seed["seed"])}
        run.mkdir()
        (run / "environment.jsonl").write_text(json.dumps(environment) + "\n")
    file = tmp_path / "tiny.yaml"
    file.write_text(f"base: debug\nruns: {tmp_path / 'runs'}\nvariants: {{unmasked: {{masking.strategy: none}}}}\n")
    monkeypatch.setattr(recipes, "tamper_rows", lambda folder: [TAMPERED])
    monkeypatch.setattr(recipes, "environment", lambda: HERE)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    monkeypatch.setattr(baselines, "FOLDER", tmp_path)
    earlier = [
        variant("other", 100, 3.0, 4.0) | {"sweep": name, "commit": "old", "ratios": {}} for name in ("o", "tiny")
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in earlier))
    options = ["--json", str(tmp_path / "r.jsonl"), "--shipped", "debug"]
    monkeypatch.setattr(sys, "argv", ["recipes.py", str(file), *options])
    recipes.main()
    assert shipped_baselines(load_config("debug")) == {
        "unmasked": {"en": 3.25, "es": 4.5},
        "filtered": {"en": 3.75, "es": 9.5},
    }
    written = [json.loads(line) for line in (tmp_path / "r.jsonl").open()]
    assert written[0] == earlier[0]  # of another sweep
    assert [row["variant"] for row in written[1:4]] == ["unmasked", "filtered", "dual"]
    assert written[3]["sweep"] == "tiny"
    assert [row["masks"] for row in written[1:4]] == [False, False, True]
    assert written[4] == TAMPERED | HERE | {"sweep": "tiny"}
    assert (written[1]["commit"], written[1]["time"], written[1]["device"]) == ("c0, c1", "1", "a device")
    assert "losses" not in written[1]["seeds"][0] and written[1]["seeds"][1]["full_retain"] == 3.0
    assert json.loads((tmp_path / "debug.json").read_text())["basis"] == basis(load_config("debug"))


def test_unfinished_runs_are_collected_only_where_asked(tmp_path, capsys):
    from recipes import finished

    rows = [variant("dual", 100, 3.0, 4.0), variant("paper", 100, 3.0, 4.0) | {"finished": 0}]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"unfinished runs \(paper: 0 of 2\); finish the sweep, or collect with"):
        finished(tmp_path, partial=False)
    assert [row["variant"] for row in finished(tmp_path, partial=True)] == ["dual"]


def seeds_of(name: str, seeds: range, loss: float, **more) -> dict:
    """A collected row."""
    own = [{"seed": seed, "full_retain": loss + seed, "ablated_retain": None} for seed in seeds]
    row = {"sweep": "s", "variant": name, "finished": len(own), "runs": 2, "full_retain": loss, "ablated_retain": None}
    return {**row, "settings": {"train.steps": 9}, "seeds": own, "device": "a", "commit": "c1", "time": "1", **more}


def test_of_an_unfinished_sweep_the_other_rows_stay():
    from recipes import merged

    attack = {"sweep": "s", "tampered": "dual", "seed": 0, "condition": "full"}
    names = ("dual", "paper")
    old = [*(seeds_of(name, range(2), 1.0) for name in names), attack | {"curve": 1}, attack | {"seed": 1, "curve": 1}]
    new = [seeds_of("dual", range(3), 2.0), seeds_of("gram", range(1), 2.0), attack | {"curve": 2}]
    assert merged(old, new) == [new[0], old[1], new[2], old[3], new[1]]


def test_seeds_that_another_machine_has_trained_stay():
    from recipes import merged

    old = seeds_of("dual", range(2), 1.0, settings={"train.steps": 9, "train.seed": 0, "gone": 1}, commit="c1, c2")
    settings = {"train.steps": 9, "train.seed": 1, "came": 1}
    new = seeds_of("dual", range(1, 4), 5.0, settings=settings, device="b", commit="c2, c3", time="2", runs=3)
    (row,) = merged([old], [new])
    assert row["seeds"] == [old["seeds"][0], *new["seeds"]]
    assert (row["full_retain"], row["full_retain_sd"]) == pytest.approx((5.5, 3.109126))  # of 1, 6, 7 and 8
    assert row["ablated_retain"] is row["ablated_retain_sd"] is None
    assert (row["device"], row["commit"], row["time"]) == ("a, b", "c1, c2, c3", "2")
    assert (row["finished"], row["runs"], row["settings"]) == (4, 4, settings)


def test_seeds_of_other_settings_are_no_seeds_of_a_variant():
    from recipes import merged

    old, new = seeds_of("dual", range(2), 1.0), seeds_of("dual", range(2, 3), 1.0, settings={"train.steps": 8})
    with pytest.raises(SystemExit, match=r"variant dual: train.steps was 9 and is 8; collect all seeds without --part"):
        merged([old], [new])
    del old["settings"]
    with pytest.raises(SystemExit, match="variant dual: its earlier row has no settings; collect all seeds"):
        merged([old], [new])
    assert merged([old], [new | {"seeds": [*old["seeds"], *new["seeds"]]}])[0]["settings"] == {"train.steps": 8}


def test_the_table_of_a_sweep(tmp_path):
    from experiment_sections import tables
    from report import _sources

    rows = [variant("filtered", 3000, 3.0, 9.0) | {"ratios": {}}, variant("mine", 4000, 3.1234, 4.0, 3.25)]
    rows[1] |= {"ratios": {"full_retain": {"value": 0.914, "extrapolated": True}}, "ablated_retain_sd": None}
    rows[0]["ablated_retain"] = 3.0
    text = tables(rows)
    assert "| mine | 2 | 4,000 | 3.123 ± 0.010 | 4.000 ± 0.010 | 3.250 | 9.000 ± 0.010 | 0.91* |  |  |" in text
    nothing = {"masks": False, "ablated_retain": None, "ablated_forget": None}  # as a table has it
    assert tables([rows[1] | nothing]) == tables([rows[1] | {"masks": False}])
    unmasked = tables([rows[1] | {"masks": False}])
    assert "| mine | 2 | 4,000 | 3.123 ± 0.010 | 4.000 ± 0.010 |  |  | 0.91* |  |  |" in unmasked
    environments = [
        HERE | {"commit": commit, "time": f"2026-01-0{i}T"} for i, commit in enumerate(("b", "a, b", "c"), 1)
    ]
    days = "2026-01-01, 2026-01-02, 2026-01-03"
    assert _sources(environments) == [f"a device, 1 thread, torch 2, commit b, a, c, {days}"]
    assert "compute" not in tables([row | {"ratios": {}} for row in rows])
