"""Loading: one rule (defaults < YAML < command line), and mistakes in files and in the form of overrides."""

from pathlib import Path

import pytest
from configs import message

from sgtm.config import load_config, save_config
from sgtm.config.load import parse_overrides


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text, "utf-8")
        return str(tmp_path / name)

    return write


def test_defaults_yield_to_yaml_and_yaml_to_the_command_line(write):
    path = write("extends: debug\ntrain: {steps: 20, micro_batch: 4}\n")
    config = load_config(path, ["--train.steps", "30", "--optimizer.lr=2e-3"])
    assert (config.train.steps, config.train.micro_batch, config.optimizer.lr) == (30, 4, 2e-3)
    assert config.train.tokens_per_step == load_config("debug").train.tokens_per_step == 512
    assert config.train.keep_last == 2


def test_extends_a_file_beside_it_and_replaces_data_as_a_whole(write):
    write("extends: debug\ndata: {path: elsewhere}\nmasking: {forget_neurons: 4}\n", "base.yaml")
    config = load_config(write("extends: base.yaml\ndata: {channel: {}}\n"))
    assert (config.data.path, config.data.channel, config.masking.forget_neurons) == ("elsewhere", {}, 4)


def test_a_file_may_leave_open_what_the_command_line_gives(write):
    path = write("model: {hidden_size: 32, heads: 4, intermediate_size: 128, vocab_size: 64, context: 64}\n")
    assert "model.layers: missing; it takes: whole number above 0" in message(path)
    assert load_config(path, ["--model.layers", "2"]).model.layers == 2


def test_saved_config_loads_equal(tmp_path):
    config = load_config(
        "debug", ["--wandb.mode", "off", "--name", "007", "--masking.overrides", "{active.retain.es: 1}"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_words_stay_words_and_numbers_are_numbers(write):
    path = write(
        "extends: debug\nwandb: {mode: off}\nmasking: {domains: [no]}\noptimizer: {lr: 1e-3, eps: .5}\nname: 2024-01-01"
    )
    config = load_config(path)
    assert (config.wandb.mode, config.masking.domains, config.name) == ("off", ["no"], "2024-01-01")
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-3, 0.5)


def test_overrides_reach_into_mappings():
    retain, update = "--data.channel.retain.unlabeled", "--masking.overrides.update.forget:es.retain.mlp_out=0.1"
    changes = parse_overrides([retain, "0.5", update, "--train.steps", "-1", "--data.path", "[odd"])
    assert changes == {
        ("data", "channel", "retain", "unlabeled"): 0.5,
        ("masking", "overrides", "update.forget:es.retain.mlp_out"): 0.1,
        ("train", "steps"): -1,
        ("data", "path"): "[odd",
    }


FORMS = [
    (["--model", "3"], "'--model' is not an override; write --KEY VALUE"),
    (["train.steps=3"], "'train.steps=3' is not an override; write --KEY VALUE"),
    (["--train.steps"], "--train.steps: no value given; write --train.steps VALUE"),
    (["--train.steps", "[a"], "--train.steps: not valid YAML"),
    (["--masking.domains", "[a,"], "<stream end>'; a list or mapping is one argument, in quotes: --masking.domains '["),
    (["--model.layers.x", "3"], "model.layers is 2, not a mapping; set --model.layers instead"),
]


@pytest.mark.parametrize("overrides, expected", FORMS)
def test_an_override_of_another_form_is_named(overrides, expected):
    error = message("debug", *overrides)
    assert expected in error and "\n" not in error


FILES = {
    "a preset that there is not": ("extends: nope\n", "run.yaml: extends: unknown preset 'nope'"),
    "a list": ("- 1\n", "run.yaml: holds list, not a mapping of keys"),
    "a key twice": ("name: a\nname: b\n", "run.yaml: line 2, column 1: not valid YAML: key 'name' is given twice"),
    "broken": ("model:\n  layers: [\n", "run.yaml: line 3, column 1: not valid YAML"),
    "dots": ("extends: debug\ntrain.steps: 3\n", "run.yaml: train.steps: unknown key; in a file write train: {steps: "),
    "domain with a space": ("extends: debug\nmasking: {domains: [' es']}\n", "or a space at either end, none of"),
    "unknown key": ("extends: debug\nmodle: {}\n", "run.yaml: modle: unknown key; did you mean model?"),
    "key that is no text": (
        "extends: debug\n1: 2\n",
        "run.yaml: 1: unknown key; known here: name, runs, recipe,",
    ),
    "empty section": (
        "extends: debug\ndata:\n",
        "data: found null, but it takes: a section with the keys path, mixing",
    ),
    "extends nothing": ("extends: debgu\n", "unknown preset 'debgu' (did you mean debug?)"),
    "extends a list": ("extends: [debug]\n", "run.yaml: extends: ['debug'] must be a preset name or the path"),
    "extends itself": ("extends: ./run.yaml\n", "extends leads back to itself: run.yaml -> run.yaml"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_a_file_is_named(case, write):
    text, expected = FILES[case]
    assert expected in message(write(text))


def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "unknown preset 'quickstrat' (did you mean quickstart?); presets: debug" in message("quickstrat")
    Path("mine.yaml").write_text("extends: debug\n")
    named = "(did you mean mine.yaml?); presets: "
    assert named in message("mine.yam") and "a file is named by its path" in message("mine.yam")
    assert "mien.yaml: no such file (did you mean mine.yaml?); give a YAML file" in message("./mien.yaml")
    (run := Path("runs/theirs")).mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).touch()
    assert "runs/theirs is a run directory; its config is runs/theirs/config.yaml" in message("theirs")
    assert "no-such.yaml: no such file; give a YAML file or one of the presets" in message("./no-such.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "latin.yaml: not UTF-8 at byte 9" in message(str(tmp_path / "latin.yaml"))
