"""Every mistake in a config has one line with key, value and remedy: sgtm/config/errors.py."""

import pytest
from configs import message

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
def test_a_wrong_value_is_shown_with_what_the_key_takes(key, text, shown, right):
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
def test_an_unknown_key_is_shown_with_the_nearest_or_all(key):
    error = message("debug", f"--{key}", "3")
    named = key if UNKNOWN[key] != "did you mean train?" else "trian"
    assert error == f"debug: {named}: unknown key on the command line; {UNKNOWN[key]}"


def test_a_rule_across_keys_names_all_that_the_values_come_from(tmp_path):
    """None of them alone is wrong."""
    rule = "train.tokens_per_step 512 is not a multiple of model.context 48; set 480 or 528"
    path = tmp_path / "run.yaml"
    path.write_text("extends: debug\ntrain: {log_every: 1}\n")
    assert message(str(path), "--model.context", "48") == f"{path} + debug + the command line: {rule}"
    path.write_text("extends: debug\nmodel: {context: 48}\n")
    assert message(str(path)) == f"{path} + debug: {rule}"


def test_every_problem_has_its_line():
    lines = message("debug", "--train.steps", "0", "--model.layers", "x", "--masking.forget_heads", "-1").splitlines()
    assert lines[0] == "debug: 3 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["model.layers", "masking.forget_heads", "train.steps"]
