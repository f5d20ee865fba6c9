"""A sweep file becomes named runs with checked configs; a mistake in it names the file, the variant and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgtm.config import ConfigError, load_config
from sgtm.sweep.file import read_sweep

ROOT = Path(__file__).parents[2]


def sweep_of(folder: Path, text: str):
    file = folder / "recipes.yaml"
    file.write_text(text)
    return read_sweep(file)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        sweep_of(folder, text)
    assert str(error.value).startswith(str(folder / "recipes.yaml"))
    return str(error.value)


def test_variants_times_grid_times_seeds(tmp_path):
    sweep = sweep_of(
        tmp_path,
        """
        base: debug
        runs: out
        set: {train: {steps: 6}, optimizer.warmup_steps: 1}
        variants: {unmasked: {masking.strategy: none}, sgtm: }
        grid:
          optimizer.lr: [1.0e-3, 2.0e-3]
          data.channel: {half: {retain: {retain: 0.5, unlabeled: 0.5}}, plain: {}}
        seeds: [3, 4]
        """,
    )
    expected = [
        f"{variant}+lr-{lr}+{channel}-s{seed}"
        for seed in (3, 4)
        for variant in ("unmasked", "sgtm")
        for lr in ("0.001", "0.002")
        for channel in ("half", "plain")
    ]
    assert [run.name for run in sweep.runs] == expected
    assert sweep.folder == Path("out/recipes") and sweep.runs[0].directory == Path("out/recipes") / expected[0]
    assert sweep.variants == [name.removesuffix("-s3") for name in expected[:8]]
    last = sweep.runs[-1].config
    assert (last.masking.strategy, last.optimizer.lr, last.data.channel) == ("sgtm", 2e-3, {})
    assert (last.train.seed, last.data.seed, last.train.steps, last.optimizer.warmup_steps) == (4, 0, 6, 1)
    first = sweep.runs[0].config
    assert first.masking.strategy == "none" and first.data.channel["retain"] == {"retain": 0.5, "unlabeled": 0.5}


def test_config_is_that_of_the_command_line(tmp_path):
    sweep = sweep_of(
        tmp_path,
        "{base: debug, grid: {data.channel.retain.unlabeled: [0.75], masking.percent: [null, 25.0]}, seeds: [7]}",
    )
    one = "unlabeled-0.75+percent-25.0-s7"
    assert [run.name for run in sweep.runs] == ["unlabeled-0.75+percent-none-s7", one]
    options = ["--masking.percent", "25", "--train.seed", "7", "--runs", "runs/recipes", "--name", one]
    assert sweep.runs[1].config == load_config("debug", options)


def test_layers_are_merged_key_by_key_whatever_their_form(tmp_path):
    sweep = sweep_of(
        tmp_path,
        """
        base: debug
        set: {train: {steps: 6, log_every: 2}, data.channel.retain: {unlabeled: 1.0}, masking: {strategy: none}}
        variants:
          a: {train: {steps: 5}, masking.strategy: gradient_routing}
          b: {train.log_every: 3, data: {channel: {}}}
        """,
    )
    a, b = (run.config for run in sweep.runs)
    assert (a.train.steps, a.train.log_every, a.masking.strategy) == (5, 2, "gradient_routing")
    assert (b.train.steps, b.train.log_every, b.masking.strategy) == (6, 3, "none")
    assert (a.data.channel, b.data.channel) == ({"retain": {"unlabeled": 1.0}}, {})


def test_a_recipe_replaces_what_the_base_and_the_set_say(tmp_path):
    text = "{base: debug, set: {data.channel: {}, masking.joint: masked}, grid: {recipe: [paper, certified]}}"
    for run, recipe in zip(sweep_of(tmp_path, text).runs, ("paper", "certified"), strict=True):
        options = ["--recipe", recipe, "--runs", "runs/recipes", "--name", f"recipe-{recipe}-s0"]
        assert run.config == load_config("debug", options)


def test_names_do_not_depend_on_what_else_is_in_the_sweep(tmp_path):
    few = sweep_of(tmp_path, "{base: debug, grid: {optimizer.lr: [0.002]}, seeds: [0]}")
    more = sweep_of(tmp_path, "{base: debug, grid: {optimizer.lr: [0.001, 0.002]}, seeds: [1, 0]}")
    assert {run.name: run.config for run in few.runs}.items() <= {run.name: run.config for run in more.runs}.items()


def test_seed_of_the_base_is_in_the_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("{extends: debug, train: {seed: 5}}")
    sweep = sweep_of(tmp_path, "{base: ./mine.yaml, variants: {sgtm: }}")
    assert [run.name for run in sweep.runs] == ["sgtm-s5"]


def test_seeds_set_the_data_seed_where_asked(tmp_path):
    sweep = sweep_of(tmp_path, "{base: debug, variants: {a: }, seeds: [2], seed_keys: [train.seed, data.seed]}")
    assert (sweep.runs[0].config.train.seed, sweep.runs[0].config.data.seed) == (2, 2)


def test_without_seeds_a_variant_has_the_seed_of_its_own_keys(tmp_path):
    sweep = sweep_of(tmp_path, "{base: debug, variants: {a: , b: {train.seed: 5}, c: {train: {seed: 6}}}}")
    assert [(run.name, run.seed, run.config.train.seed) for run in sweep.runs] == [
        ("a-s0", 0, 0),
        ("b-s5", 5, 5),
        ("c-s6", 6, 6),
    ]
    grid = sweep_of(tmp_path, "{base: debug, grid: {train.seed: [1, 2], data.seed: [3]}}")
    assert [(run.config.train.seed, run.config.data.seed) for run in grid.runs] == [(1, 3), (2, 3)]


def test_more_seeds_of_some_variants_come_last(tmp_path):
    text = "{base: debug, variants: {a: , b: , c: }, seeds: [0, 1], more_seeds: {c: [4, 2], a: [2]}}"
    sweep = sweep_of(tmp_path, text)
    names = ["a-s0", "b-s0", "c-s0", "a-s1", "b-s1", "c-s1", "c-s4", "c-s2", "a-s2"]
    assert [run.name for run in sweep.runs] == names
    assert [run.config.train.seed for run in sweep.runs] == [int(name[-1]) for name in names]
    without = sweep_of(tmp_path, text.replace(", more_seeds: {c: [4, 2], a: [2]}", ""))
    assert without.runs == sweep.runs[:6]


def test_axes_of_the_same_last_name_keep_the_whole(tmp_path):
    sweep = sweep_of(tmp_path, "{base: debug, grid: {train.seed: [1], data.seed: [2]}}")
    assert [run.variant for run in sweep.runs] == ["train.seed-1+data.seed-2"]


MISTAKES = {
    "{variants: {a: }}": "base: missing",
    "{base: debug}": "neither variants nor a grid",
    "{base: debug, variant: {a: }}": "variant: unknown key; did you mean variants?",
    "{base: debgu, variants: {a: }}": None,
    "{base: debug, variants: {a: {train.step: 3}}}": "variant a: train.step: unknown key; did you mean train.steps?",
    "{base: debug, variants: {a: {model.context: 48}}}": "train.tokens_per_step 512 is not a multiple",
    "{base: debug, variants: {a: {name: b}}}": "variant a: name: the sweep names its runs",
    "{base: debug, variants: {a: {train.seed: 1}}, seeds: [0]}": "variant a: train.seed: `seeds` sets it",
    "{base: debug, variants: {a: {train: {seed: 1}}}, seeds: [0]}": "variant a: train.seed: `seeds` sets it",
    "{base: debug, variants: {a: {train.steps: 4}}, grid: {train.steps: [5]}}": "variant a and the grid both set",
    "{base: debug, variants: {a: {train: {steps: 4}}}, grid: {train.steps: [5]}}": "variant a and the grid both set",
    "{base: debug, variants: {a: {model.layers.x: 3}}}": "variant a: model.layers.x: model.layers is 2, not a",
    "{base: debug, variants: {a b: }}": "variant 'a b': names are of letters",
    "{base: debug, grid: {masking.domains: [[es]]}}": "grid: masking.domains: ['es'] needs a name",
    "{base: debug, grid: {data.path: [a/b, a-b]}}": "two variants are named path-a-b",
    "{base: debug, grid: {optimizer.lr: []}}": "grid: optimizer.lr: no values",
    "{base: debug, variants: {a: }, seeds: [1, 1]}": "seeds: [1, 1] must be one or more different numbers",
    "{base: debug, variants: {a: }, seeds: []}": "seeds: [] must be one or more different numbers",
    "{base: debug, variants: {a: }, seeds: [0, 1], more_seeds: {a: [2, 1]}}": "more_seeds: a: [2, 1] must be different",
    "{base: debug, variants: {a: }, seeds: [0], more_seeds: {a: [2, 2]}}": "more_seeds: a: [2, 2] must be different",
    "{base: debug, variants: {a: }, more_seeds: {a: [2]}}": "more_seeds: without `seeds`; give the seeds of every",
    "{base: debug, variants: {good: }, seeds: [0], more_seeds: {god: [1]}}": "more_seeds: god: no such variant; did",
    "{base: debug, variants: {good: }, may_differ: {god: [tokens]}}": "no such variant; did you mean good?",
    "{base: debug, variants: {a: }, may_differ: [tokenizer]}": "may_differ: found",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistake_is_named(tmp_path, text):
    if MISTAKES[text] is None:
        with pytest.raises(ConfigError, match="unknown preset 'debgu'"):
            sweep_of(tmp_path, text)
    else:
        assert MISTAKES[text] in refusal(tmp_path, text)


def test_a_run_directory_is_no_folder_of_a_sweep(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "config.yaml").write_text("extends: debug\n")
    text = f"{{base: debug, runs: {tmp_path}, variants: {{a: }}}}"
    assert "is a run directory; give the sweep another name" in refusal(tmp_path, text)


def test_committed_example_expands():
    sweep = read_sweep(ROOT / "launch" / "recipes" / "quickstart.sweep.yaml")
    assert len(sweep.runs) == 12 and sweep.folder.name == "quickstart.sweep"
