"""Defaults and choices that the help of a command states are those of the code that it calls."""

from __future__ import annotations

import inspect
import re

import pytest

from sgtm.commands import examine
from sgtm.commands.main import main
from sgtm.evaluation import calibration, in_context, probes
from sgtm.run import tamper_plan
from sgtm.run.examine import GUIDED, MEASURES, PASSAGES
from sgtm.unlearning import mean_difference
from sgtm.unlearning.methods import METHODS


@pytest.fixture
def stated(capsys):
    """The help of a command's option, on one line."""

    def stated(command: str, option: str) -> str:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        entry = re.search(rf"^  {option} .*?(?=^  -|\Z)", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
        return " ".join(entry[0].split())

    return stated


def listed(numbers) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def test_tamper(stated):
    assert f"(default: {listed(tamper_plan.MULTIPLES)})" in stated("tamper", "--lr")
    assert f"(default: {listed(tamper_plan.BUDGETS)})" in stated("tamper", "--steps")
    assert f"(default: {tamper_plan.SEQUENCES}, or all" in stated("tamper", "--sequences")
    defaults = inspect.signature(tamper_plan.make_plan).parameters
    for option, name in (("--warmup", "warmup"), ("--weight-decay", "weight_decay"), ("--seed", "seed")):
        assert f"(default: {defaults[name].default:g})" in stated("tamper", option)


def test_examine(stated):
    assert (*MEASURES, GUIDED) == examine.MEASURES
    assert f"(default: all of {', '.join(examine.MEASURES)})" in stated("examine", "--only")
    samples = f"(default: all; of context {in_context.PASSAGES}, of probes {probes.SEQUENCES})"
    assert samples in stated("examine", "--sequences")
    assert f"(default: up to {PASSAGES})" in stated("examine", "--passages")
    assert f"(default: {calibration.TARGETS_PER_TOKEN} tokens for each" in stated("examine", "--fit-sequences")


def test_direction(stated):
    assert f"(default: {mean_difference.SEQUENCES}, or all" in stated("direction", "--sequences")


def test_unlearn(stated):
    usual = METHODS["npo"]
    steps, divisors = stated("unlearn", "--steps"), stated("unlearn", "--lr")
    others = {name: method for name, method in METHODS.items() if method.steps != usual.steps}
    assert f"(default: {', '.join([str(usual.steps), *(f'{n} {m.steps}' for n, m in others.items())])})" in steps
    others = {name: method for name, method in METHODS.items() if method.divisor != usual.divisor}
    shares = [f"the run's peak / {usual.divisor}", *(f"{name} / {method.divisor}" for name, method in others.items())]
    assert f"(default: {', '.join(shares)})" in divisors
    for method, option in (
        ("npo", "beta"),
        ("simnpo", "beta"),
        ("simnpo", "gamma"),
        ("simnpo", "forget_weight"),
        ("rmu", "coefficient"),
        ("rmu", "alpha"),
    ):
        assert f"{method} ({METHODS[method].options[option]:g})" in stated("unlearn", f"--{option.replace('_', '-')}")
    for method in ("grad_diff", "npo", "simnpo"):
        assert METHODS[method].options["retain_weight"] == 1
    assert "(1)" in stated("unlearn", "--retain-weight")
