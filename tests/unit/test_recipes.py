"""Recipes: what they set, what wins over them, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgtm.config import load_config, preset_names
from sgtm.config.load import dump_config, save_config
from sgtm.config.schema import Config
from sgtm.masking.certificate import certified
from sgtm.masking.recipes import KEYS, NAMES, recipe
from sgtm.run.checkpoint import resolved

EXPECTED = {
    "paper": ("sgtm", "free", "none", "global", {"retain": {"retain": 0.25, "unlabeled": 0.75}}),
    "gram": (
        "gram", "strict", "none", "global",
        {"retain": {"retain": 0.8, "open:es": 0.2}, "forget:es": {"forget:es": 0.5, "open:es": 0.5}},
    ),
    "dual": (
        "gradient_routing", "strict", "full", "global",
        {"retain": {"retain": 0.6, "open:es": 0.4}, "forget:es": {"forget:es": 0.8, "open:es": 0.2}},
    ),
    "certified": ("sgtm", "strict", "full", "owner", {"retain": {"retain": 0.8, "forget:es": 0.2}}),
}  # fmt: skip


NOVELS = Path(__file__).parents[2] / "launch" / "recipes" / "novels.yaml"
PAPER = {"debug": ("free", 0.25), "tinystories": ("free", 0.25), "wikipedia": ("masked", 0.1)}


def facts(config: Config) -> tuple:
    m = config.masking
    channel = {row: {k: round(v, 9) for k, v in shares.items()} for row, shares in config.data.channel.items()}
    return m.strategy, config.joint, m.domain_embedding, config.optimizer.grad_clip_scope, channel


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_sets(name, tmp_path):
    config = load_config("debug", ["--recipe", name])
    assert facts(config) == EXPECTED[name]
    assert certified(config.conditions) == (("es",) if name == "certified" else ())
    assert {section: set(keys) for section, keys in KEYS.items()} == {
        s: set(k) for s, k in recipe(name, ["es"]).items()
    }
    assert Config.model_validate({"model": config.model, "masking": config.masking, "recipe": name}).masking.strategy
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert f"recipe: {name}" in dump_config(config)
    assert resolved(config)["masking"]["joint"] == EXPECTED[name][1]


def test_of_several_domains_dual_trains_all_groups_together_too():
    retain, *domains = recipe("dual", ["a", "b"])["data"]["channel"].items()
    assert retain == ("retain", pytest.approx({"retain": 0.6, "open:a": 0.1, "open:b": 0.1, "unlabeled": 0.2}))
    assert domains == [
        (f"forget:{d}", pytest.approx({f"forget:{d}": 0.8, f"open:{d}": 0.1, "unlabeled": 0.1})) for d in ("a", "b")
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("domains", [[], ["a"], ["a", "b", "c"]])
def test_any_number_of_domains(name, domains):
    config = load_config("debug", ["--recipe", name, f"--masking.domains={domains}", "--masking.forget_neurons=3",
                                   "--model.heads=8"])  # fmt: skip
    assert config.channels[0][1].matrix.sum(1) == pytest.approx(1)
    assert certified(config.conditions) == (tuple(domains) if name == "certified" else ())


def test_what_wins(tmp_path):
    base, file = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("extends: debug\nmasking: {joint: masked, forget_neurons: 4}\noptimizer: {lr: 0.5}\n")
    file.write_text("extends: base.yaml\nrecipe: certified\nmasking: {domain_embedding: 8}\n")
    config = load_config(file)
    assert facts(config) == ("sgtm", "strict", 8, "owner", EXPECTED["certified"][-1])  # debug's channel gave way
    assert (config.masking.forget_neurons, config.optimizer.lr) == (4, 0.5)  # what no recipe sets stays
    other = load_config(file, ["--recipe=dual", "--masking.joint=masked"])
    assert facts(other) == ("gradient_routing", "masked", "full", "global", EXPECTED["dual"][-1])
    channel = load_config(file, ["--data.channel={retain: {retain: 1}}"]).data.channel
    assert channel == {"retain": {"retain": 1}}


def test_an_entry_of_a_recipes_channel_is_changed_by_itself():
    config = load_config(
        "debug", ["--recipe=gram", "--data.channel.forget:es.forget:es=1", "--data.channel.forget:es.open:es=0"]
    )
    assert config.data.channel["retain"] == recipe("gram", ["es"])["data"]["channel"]["retain"]
    assert config.data.channel["forget:es"] == {"forget:es": 1, "open:es": 0}


@pytest.mark.parametrize("name", NAMES)
def test_the_unmasked_baseline_has_nothing_of_a_recipe(name, tmp_path):
    config = load_config("debug", ["--recipe", name, "--masking.strategy=none"])
    assert facts(config) == ("none", "free", "none", "global", {}) and not config.masking.certify
    assert config.method == "strategy none" and load_config("debug", ["--recipe", name]).method.endswith(
        f", recipe {name}"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    changed = load_config("debug", ["--recipe", name, "--masking.strategy=none", "--data.channel.retain.retain=1"])
    assert changed.data.channel == {"retain": {"retain": 1}}
    for section, keys in KEYS.items():
        assert set(recipe(name, ["es"], unmasked=True)[section]) == set(keys)


def test_the_unmasked_baseline_has_nothing_of_the_strategy_below(tmp_path):
    """By hand in the file: given way to a `none` above it, refused beside it."""
    file = tmp_path / "base.yaml"
    settings = "{strategy: sgtm, joint: masked, domain_embedding: 8, certify: true, forget_neurons: 4}"
    file.write_text(f"extends: debug\nmasking: {settings}\noptimizer: {{grad_clip_scope: owner}}\n")
    (tmp_path / "above.yaml").write_text("extends: base.yaml\nmasking: {strategy: none}\n")
    for config in (load_config(file, ["--masking.strategy=none"]), load_config(tmp_path / "above.yaml")):
        masking = config.masking
        assert (masking.joint, masking.domain_embedding, masking.certify) == (None, "none", False)
        assert (masking.forget_neurons, config.optimizer.grad_clip_scope) == (4, "owner")
    with pytest.raises(ValueError, match="joint: strategy none masks nothing; leave joint out"):
        load_config(file, ["--masking.strategy=none", "--masking.joint=masked"])
    assert load_config(file, ["--masking.strategy=gram", "--masking.certify=false"]).masking.joint == "masked"


@pytest.mark.parametrize("source", [*preset_names(), str(NOVELS)])
def test_shipped_configs_are_dual_and_paper_presets_the_papers(source):
    config = load_config(source)
    (domain,) = config.space.domains
    paper = PAPER.get(config.name.partition("-")[0])
    if paper:
        joint, share = paper
        channel = {"retain": {"retain": share, "unlabeled": 1 - share}}
        assert config.recipe is None and facts(config) == ("sgtm", joint, "none", "global", channel)
    else:
        *expected, channel = EXPECTED["dual"]
        named = {
            row.replace("es", domain): {key.replace("es", domain): share for key, share in shares.items()}
            for row, shares in channel.items()
        }
        assert config.recipe == "dual" and facts(config) == (*expected, named)


def test_without_a_recipe_nothing_is_set():
    assert load_config("debug").recipe is None and facts(load_config("debug"))[0] == "sgtm"
    assert load_config("debug").method == "strategy sgtm"
    with pytest.raises(ValueError, match="recipe"):
        load_config("debug", ["--recipe=best"])
    with pytest.raises(ValueError, match="unknown recipe 'best'; known recipes: paper, gram, dual, certified"):
        recipe("best", ["es"])
