"""How commands and their options are declared: the numbers that options take, and commands that take a config."""

import argparse

import pytest

from sgtm.commands.options import AMOUNT, COUNT, SHARE, Subcommands, finite, natural, weight


@pytest.mark.parametrize(
    ("kind", "text", "number"),
    [
        (COUNT, "1", 1),
        (AMOUNT, "1e-3", 1e-3),
        (AMOUNT, "400", 400.0),
        (SHARE, "1", 1.0),
        (natural, "0", 0),
        (weight, "0", 0.0),
    ],
)
def test_a_number_of_the_kind_is_taken(kind, text, number):
    assert kind(text) == number and type(kind(text)) is type(number)


def test_numbers_that_may_be_0():
    assert [finite(text) for text in ("-1.5", "0", "2e3")] == [-1.5, 0.0, 2000.0]
    assert [natural(text) for text in ("0", "12")] == [0, 12]


@pytest.mark.parametrize(
    ("kind", "texts", "takes"),
    [
        (COUNT, ["0", "-1", "1.5", "inf", ""], "a whole number above 0"),
        (AMOUNT, ["0", "-0.5", "inf", "nan", "80GB"], "a number above 0"),
        (SHARE, ["0", "1.001", "nan"], "a share above 0 and at most 1"),
        (finite, ["nan", "-inf", "one", ""], "a number"),
        (natural, ["-1", "1.5", "1e3", ""], "a whole number from 0 on"),
        (weight, ["-1", "inf", "nan", "1e"], "a number from 0 on"),
    ],
)
def test_another_number_is_refused_with_what_is_taken(kind, texts, takes):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            kind(text)
        assert str(caught.value) == f"expected {takes}, got {text!r}"


@pytest.fixture
def parser():
    """With a command `count` on nothing and a command `train` on a config."""
    parser = argparse.ArgumentParser()
    commands = Subcommands(parser)
    commands.add("count", len, "counts").add_argument("--sequences", type=COUNT)
    commands.add_configured("train", abs, "trains")
    assert commands.configured == {"train"}
    return parser


def test_options_have_the_function_of_their_command(parser):
    options = parser.parse_args(["count", "--sequences", "8"])
    assert (options.run, options.sequences) == (len, 8) and not hasattr(options, "config")
    options = parser.parse_args(["train", "debug"])
    assert (options.run, options.config) == (abs, "debug")


@pytest.mark.parametrize("arguments", [["count", "--seq", "8"], ["train"], []])
def test_options_are_not_abbreviated_and_no_config_or_command_is_left_out(parser, arguments):
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)


def test_an_option_that_has_taken_the_positional_is_named(capsys):
    parser = argparse.ArgumentParser()
    export = Subcommands(parser).add("export", len, "exports")
    export.add_argument("run_dir", metavar="RUN")
    export.add_argument("--remove", nargs="+")
    export.add_argument("--out", required=True)
    hint = "; --remove has taken net and runs/mine: put RUN first, or at the end after --\n"
    for arguments, end in (
        (["--remove", "net", "runs/mine", "--out", "x"], f"RUN{hint}"),
        (["--remove", "net", "runs/mine"], f"RUN, --out{hint}"),
        (["--remove", "net", "--out", "x"], "RUN\n"),
        (["runs/mine", "--remove", "net", "bio"], "--out\n"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["export", *arguments])
        assert capsys.readouterr().err.endswith(f"the following arguments are required: {end}")
    assert parser.parse_args(["export", "--remove", "net", "--out", "x", "--", "runs/mine"]).run_dir == "runs/mine"
