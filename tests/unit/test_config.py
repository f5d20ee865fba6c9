"""Loading: one rule (defaults < YAML < command line), every mistake answered with key, value and remedy."""

import re
from pathlib import Path

import pytest
import torch

from sgtm.config import Config, ConfigError, load_config, preset_names, save_config
from sgtm.config.load import parse_overrides
from sgtm.config.reference import keys, markdown
from sgtm.data.rules import load_rules
from sgtm.model.transformer import Transformer
from sgtm.sweep.file import read_sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text, "utf-8")
        return str(tmp_path / name)

    return write


def message(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, list(overrides))
    return str(caught.value)


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
    given = parse_overrides([retain, "0.5", update, "--train.steps", "-1", "--data.path", "[odd"])
    assert given == {
        ("data", "channel", "retain", "unlabeled"): 0.5,
        ("masking", "overrides", "update.forget:es.retain.mlp_out"): 0.1,
        ("train", "steps"): -1,
        ("data", "path"): "[odd",
    }


CHANNEL = "mapping of text to (mapping of text to number from 0 to 1)"
BETAS = "list of 2: number from 0 to below 1, number from 0 to below 1"
VALUES = [  # key, text on the command line, how it is shown, what is right
    ("train.steps", "abc", "'abc'", "whole number above 0"),
    ("train.steps", "1.5", "1.5", "whole number above 0"),
    ("model.layers", "null", "null", "whole number above 0"),
    ("optimizer.final_lr", "2", "2", "number from 0 to 1"),
    ("optimizer.lr", "inf", "'inf'", "number above 0"),
    ("optimizer.grad_clip", "-1", "-1", "number, 0 or more"),
    ("optimizer.betas", "[0.9, 2]", "[0.9, 2]", BETAS),
    ("optimizer.betas", "0.9,0.95", "'0.9,0.95'", f"{BETAS}; write --optimizer.betas '[0.9, 0.95]'"),
    ("wandb.mode", "of", "'of'", "one of off, offline, online"),
    ("masking.domains", "es", "'es'", "list of text; write --masking.domains '[es]'"),
    ("masking.domains", "bio, es", "'bio, es'", "list of text; write --masking.domains '[bio, es]'"),
    (
        "masking.masked_layers",
        "3",
        "3",
        "list of (whole number, 0 or more) or null; write --masking.masked_layers '[3]'",
    ),
    ("masking.percent", "x", "'x'", "number above 0 or mapping of text to number above 0 or null"),
    ("data.channel", "{retain: 1}", "{retain: 1}", CHANNEL),
    ("data.channel", "retain=1", "'retain=1'", f"{CHANNEL}; write --data.channel '{{NAME: VALUE}}'"),
]


@pytest.mark.parametrize("key, text, shown, right", VALUES)
def test_wrong_value(key, text, shown, right):
    assert (
        message("debug", f"--{key}", text) == f"debug: {key}: found {shown} on the command line, but it takes: {right}"
    )


UNKNOWN = {
    "train.stesp": "did you mean train.steps?",
    "trian.steps": "did you mean train?",
    "data.steps": "did you mean train.steps?",
    "wandb.qqqqq": "known here: mode, project, entity",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_key(key):
    found = message("debug", f"--{key}", "3")
    named = key if UNKNOWN[key] != "did you mean train?" else "trian"
    assert found == f"debug: {named}: unknown key on the command line; {UNKNOWN[key]}"


FORMS = [
    (["--model", "3"], "'--model' is not an override; write --KEY VALUE"),
    (["train.steps=3"], "'train.steps=3' is not an override; write --KEY VALUE"),
    (["--train.steps"], "--train.steps: no value given; write --train.steps VALUE"),
    (["--train.steps", "[a"], "--train.steps: not valid YAML"),
    (["--masking.domains", "[a,"], "<stream end>'; a list or mapping is one argument, in quotes: --masking.domains '["),
    (["--model.layers.x", "3"], "model.layers is 2, not a mapping; set --model.layers instead"),
]
RULES = [
    (["--model.hidden_size", "33"], "debug: model: hidden_size 33 is not a multiple of heads 4; set head_dim"),
    (["--masking.forget_heads", "4"], "masking.forget_heads: 4 of 4 would be forget"),
    (["--data.channel.retain.retain", "0.9"], "data.channel: label channel row 'retain'"),
    (["--train.steps", "1:30"], "train.steps: found '1:30' on the command line, but it takes: whole number"),
    (["--name", "../x"], r"name: found '../x' on the command line, but it takes: text that matches ^[\w][\w.+-]*$"),
    (["--train.tokens_per_step", "100"], "tokens_per_step 100 is not a multiple of model.context 64"),
    (
        ["--optimizer.warmup_steps", "9"],
        "optimizer.warmup_steps 9 is more than train.steps 8; lower it, or give it as a share of the steps, e.g. --opt",
    ),
    (
        ["--optimizer.warmup_steps", "1.5"],
        "found 1.5 on the command line, but it takes: whole number, 0 or more or number above 0 and below 1",
    ),
    (["--masking.overrides.x.y", "1"], "override 'x.y' names no table entry"),
    (
        ["--model.family", "llama", "--model.window", "null", "--model.kv_heads", "2"],
        "forget_heads of 'es' split a KV group: 2 query heads share each KV head",
    ),
]


@pytest.mark.parametrize("overrides, expected", FORMS + RULES)
def test_wrong_form_and_broken_rule(overrides, expected):
    found = message("debug", *overrides)
    assert expected in found and "\n" not in found


def test_a_rule_across_keys_names_all_that_the_values_come_from(write):
    """None of them alone is wrong."""
    rule = "train.tokens_per_step 512 is not a multiple of model.context 48"
    path = write("extends: debug\ntrain: {log_every: 1}\n")
    assert message(path, "--model.context", "48") == f"{path} + debug + the command line: {rule}"
    path = write("extends: debug\nmodel: {context: 48}\n")
    assert message(path) == f"{path} + debug: {rule}"


def test_every_problem_has_its_line():
    lines = message("debug", "--train.steps", "0", "--model.layers", "x", "--masking.forget_heads", "0").splitlines()
    assert lines[0] == "debug: 3 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["model.layers", "masking.forget_heads", "train.steps"]


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
def test_mistake_in_a_file(case, write):
    text, expected = FILES[case]
    assert expected in message(write(text))


def test_mistake_in_the_source(tmp_path):
    assert "unknown preset 'quickstrat' (did you mean quickstart?); presets: debug" in message("quickstrat")
    assert "no-such.yaml: no such file; give a YAML file or one of the presets" in message("./no-such.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "latin.yaml: not UTF-8 at byte 9" in message(str(tmp_path / "latin.yaml"))


PAPER = {  # layers, hidden size, context, batch, learning rate, steps, share of retain data in retain mode, joint
    "tinystories-8m": (6, 128, 512, 128, 5e-4, 3989, 0.25, "free"),
    "tinystories-18m": (6, 256, 512, 128, 5e-4, 9204, 0.25, "free"),
    "tinystories-34m": (8, 384, 512, 128, 5e-4, 17484, 0.25, "free"),
    "tinystories-64m": (12, 512, 512, 128, 5e-4, 33120, 0.25, "free"),
    "wikipedia-34m": (8, 384, 1024, 128, 6e-4, 5169, 0.10, "masked"),
    "wikipedia-64m": (12, 512, 1024, 256, 6e-4, 4887, 0.10, "masked"),
    "wikipedia-125m": (12, 768, 1024, 256, 6e-4, 9491, 0.10, "masked"),
    "wikipedia-254m": (16, 1024, 1024, 512, 6e-4, 9689, 0.10, "masked"),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_have_the_papers_settings(name):
    c = load_config(name)
    share = c.data.channel["retain"]["retain"]
    shape = (c.model.layers, c.model.hidden_size, c.model.context, c.sequences_per_step)
    assert (*shape, c.optimizer.lr, c.train.steps, share, c.masking.joint or "free") == PAPER[name]
    assert (c.model.vocab_size, c.model.heads, c.model.window) == (50257, 32, 256)
    assert c.model.intermediate_size == 4 * c.model.hidden_size
    assert (c.masking.forget_heads, c.masking.forget_neurons, c.data.mixing) == (1, 64, "step")
    assert (c.optimizer.betas, c.optimizer.weight_decay, c.train.precision) == ((0.9, 0.95), 0.1, "bf16")


WARM_UP = {"debug": 2, "gpt2-124m": 700, "llama-7b": 2000, "quickstart": 50}  # steps; the others: 1000


@pytest.mark.parametrize("name", preset_names())
def test_the_warm_up_of_a_preset_follows_the_length_of_the_run(name):
    config = load_config(name)
    assert config.optimizer.warmup(config.train.steps) == WARM_UP.get(name, 1000)
    for steps in (1, 30, 1_000_000):
        short = load_config(name, [f"--train.steps={steps}"])
        expected = steps * WARM_UP.get(name, 1000) / config.train.steps
        assert short.optimizer.warmup(steps) == pytest.approx(expected, rel=0.01, abs=0.51)


def test_a_warm_up_in_steps_and_its_share_are_the_same_run():
    share, steps = (load_config("debug", [f"--optimizer.warmup_steps={n}"]) for n in ("0.25", "2"))
    assert share.spelled_out() == steps.spelled_out() and share != steps


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config.model, config.partition, "reference").parameters())


@pytest.mark.parametrize("name", preset_names())
def test_preset_parses_runs_on_one_process_and_has_the_size_in_its_name(name):
    config = load_config(name)
    assert config.name == name
    assert config.accumulation(1) >= 1
    config = load_config(name, ["--masking.strategy=none"])  # without a domain's own embedding
    size = re.search(r"-(\d+)([mb])$", name)
    if size and name != "llama-1b":  # 5 %: the names round (the paper's 8M model has 7.69M)
        assert parameters(config) == pytest.approx(int(size[1]) * {"m": 1e6, "b": 1e9}[size[2]], rel=0.05)


@pytest.mark.parametrize("name", sorted({*preset_names(), "novels"} - {"debug"}))
@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_shipped_examples_run_on_these_ranks(name, ranks):
    """On as many as there are sequences in a step, with a micro-batch that divides its share of them."""
    source = ROOT / "launch" / "recipes" / "novels.yaml" if name == "novels" else name
    config = load_config(source)
    size = config.for_ranks(ranks).train.micro_batch
    assert config.accumulation(ranks) * size * ranks == config.sequences_per_step
    assert size * config.model.context <= 16_384
    if config.train.micro_batch is None:  # the most that do
        larger = range(size + 1, 16_384 // config.model.context + 1)
        assert not any(config.sequences_per_step % (n * ranks) == 0 for n in larger)


def test_a_derived_micro_batch_divides_the_blocks_of_mixing_micro():
    config = load_config("quickstart", ["--data.mixing=micro"])
    assert [(config.for_ranks(n).train.micro_batch, config.accumulation(n)) for n in (1, 2, 8)] == [
        (8, 4),
        (4, 4),
        (1, 4),
    ]
    assert load_config("quickstart", ["--train.micro_batch=2"]).for_ranks(4).train.micro_batch == 2


def test_published_models_have_their_exact_size():
    """Llama 3.2 1B and Llama 7B as published; GPT-2 small less the biases of Wq, Wk, Wv, which GPT-Neo has not."""
    unmasked = ["--masking.strategy=none"]
    assert parameters(load_config("llama-1b", unmasked)) == 1_235_814_400
    assert parameters(load_config("llama-7b", unmasked)) == 6_738_415_616
    assert parameters(load_config("gpt2-124m", unmasked)) == 124_439_808 - 12 * 3 * 768
    assert parameters(load_config("llama-1b")) == 1_235_814_400 + 128_256 * 2048  # and a domain's own embedding


def test_recipes_parse():
    """Every YAML in launch/recipes: configs, and the rule files and sweeps that lie beside them."""
    for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")):
        if path.name.endswith(".rules.yaml"):
            assert load_rules(path).labels
        elif path.name.endswith(".sweep.yaml"):
            assert read_sweep(path).runs
        else:
            assert load_config(str(path)).accumulation(1) >= 1


def test_committed_reference_is_current():
    assert (ROOT / "docs" / "config.md").read_text("utf-8") == markdown(Config), (
        "run: sgtm config --markdown > docs/config.md"
    )


def test_reference_names_every_key_once():
    names = [key.name for key in keys(Config)]
    assert len(names) == len(set(names)) > 40
    assert {"model.layers", "optimizer.masked_update", "name"} <= set(names)
