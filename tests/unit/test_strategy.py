"""The presets' tables, spelled out by hand for two domains from the definitions of the methods.

Rows are the labels unlabeled, retain, forget:bio, forget:code; columns the groups retain, bio, code.
"""

import json
import re
from typing import get_args

import pytest
from rooms import ROOT

from sgtm.config import Config, load_config
from sgtm.config.reference import keys
from sgtm.masking.labels import LabelSpace
from sgtm.masking.strategy import JOINT_PRESETS, STRATEGY_TABLES, Joint, Strategy, build_tables, removal_tables
from sgtm_kernels.plan import JOINT_KINDS, PROJECTIONS

SPACE = LabelSpace(("bio", "code"))
ONES = ((1, 1, 1),) * 4
ALL = (1, 1, 1, 1)

ACTIVE = (
    (1, 1, 1),
    (1, 0, 0),
    (1, 1, 0),
    (1, 0, 1),
)
ACTIVE_ACROSS = (
    (1, 1, 1),
    (1, 0, 0),
    (1, 1, 1),
    (1, 1, 1),
)
NOT_RETAIN = (
    (1, 1, 1),
    (1, 1, 1),
    (0, 1, 1),
    (0, 1, 1),
)
OWN_ONLY = (
    (1, 1, 1),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
)
NOT_FORGET = (1, 1, 0, 0)
FREE = dict.fromkeys(JOINT_KINDS, ALL)
MASKED = dict.fromkeys(("embedding", "position", "head", "norm"), NOT_FORGET)
BOTH_BIASES = {"attn_out_bias": NOT_FORGET, "mlp_out_bias": NOT_FORGET}


def update(*exempt: str) -> dict:
    return {part: ONES if part in exempt else NOT_RETAIN for part in PROJECTIONS}


# name: active, route, update, update_joint where it is not 1
EXPECTED = {
    "none": (ONES, ONES, update(*PROJECTIONS), {}),
    "sgtm": (ACTIVE, ONES, update(), BOTH_BIASES),
    "no_mlp_out": (ACTIVE, ONES, update("mlp_out"), {"attn_out_bias": NOT_FORGET}),
    "no_attn_out": (ACTIVE, ONES, update("attn_out"), {"mlp_out_bias": NOT_FORGET}),
    "no_out": (ACTIVE, ONES, update("mlp_out", "attn_out"), {}),
    "gradient_routing": (ACTIVE, NOT_RETAIN, update(*PROJECTIONS), {}),
    "activation_masking": (OWN_ONLY, ONES, update(*PROJECTIONS), {}),
    "gram": (ACTIVE, ONES, update(), dict.fromkeys(JOINT_KINDS, NOT_FORGET)),
}


def assert_tables(tables, active, route, updates, joint):
    assert tables.labels == ("unlabeled", "retain", "forget:bio", "forget:code")
    assert tables.groups == ("retain", "bio", "code")
    assert tables.active == active
    assert tables.route == route
    assert tables.update == updates
    assert tables.update_joint == FREE | joint


def test_every_preset_is_spelled_out():
    assert set(EXPECTED) == set(STRATEGY_TABLES)
    assert get_args(Strategy) == tuple(STRATEGY_TABLES) and get_args(Joint) == tuple(JOINT_PRESETS)


def test_the_documentation_names_every_preset():
    field = next(key.doc for key in keys(Config) if key.name == "masking.strategy")
    method = (ROOT / "docs/method.md").read_text("utf-8").partition("\nStrategies: ")[2].partition("\n\n")[0]
    for text in (field, method):
        assert set(STRATEGY_TABLES) <= set(re.findall("`([a-z_]+)`", text))


@pytest.mark.parametrize("name", EXPECTED)
def test_preset(name):
    assert_tables(build_tables(SPACE, name), *EXPECTED[name])


LISTED = ("embedding", "position", "head")


@pytest.mark.parametrize(
    ("joint", "kinds"),
    [("free", {}), ("masked", MASKED), ("strict", dict.fromkeys(JOINT_KINDS, NOT_FORGET)), (LISTED, None)],
)
@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "none"])
def test_joint(name, joint, kinds):
    *tables, own = EXPECTED[name]
    own = {} if name == "gram" else own  # gram has no kinds of its own beside those of joint
    kinds = dict.fromkeys(LISTED, NOT_FORGET) if kinds is None else kinds
    assert_tables(build_tables(SPACE, name, joint=joint), *tables, own | kinds)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "none"])
@pytest.mark.parametrize("cross_domain", ["inactive", "active"])
def test_an_open_label_is_retain_and_its_domain(name, cross_domain):
    """Both run and learn, gradients pass, all joint parameters learn; the other domain does not run."""
    space = LabelSpace(("bio", "code"), ("code",))
    tables = build_tables(space, name, cross_domain=cross_domain)
    assert tables.labels == ("unlabeled", "retain", "forget:bio", "forget:code", "open:code")
    assert tables.active[4] == (1, 0, 1) and tables.route[4] == (1, 1, 1)
    assert {grid[4] for grid in tables.update.values()} == {(1, 1, 1)}
    assert {row[4] for row in tables.update_joint.values()} == {1}
    closed = build_tables(SPACE, name, cross_domain=cross_domain)
    assert tables.active[:4] == closed.active and tables.route[:4] == closed.route


def test_open_labels_are_in_the_order_of_the_domains():
    assert LabelSpace(("bio", "code"), ("code", "bio")).labels[4:] == ("open:bio", "open:code")
    assert LabelSpace(("bio", "code"), ("code",)).open_groups == {4: 2}
    with pytest.raises(ValueError, match="unknown domain 'chem'"):
        LabelSpace(("bio", "code"), ("chem",))


@pytest.mark.parametrize("name", EXPECTED)
def test_cross_domain_active(name):
    rest = EXPECTED[name][1:]
    across = {"none": ONES, "gram": ACTIVE, "activation_masking": ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 1))}
    assert_tables(build_tables(SPACE, name, cross_domain="active"), across.get(name, ACTIVE_ACROSS), *rest)


def test_one_domain_and_none():
    one = build_tables(LabelSpace(("es",)), "sgtm")
    assert one.active == ((1, 1), (1, 0), (1, 1))
    assert one.update["mlp_in"] == ((1, 1), (1, 1), (0, 1))
    assert one.update_joint["mlp_out_bias"] == (1, 1, 0)
    assert build_tables(LabelSpace(()), "sgtm").active == ((1,), (1,))


def test_overrides():
    overrides = {
        "active.unlabeled.code": 0.25,
        "route.forget:bio.retain": -1.0,
        "update.forget:code.retain.mlp_out": 0.1,
        "update_joint.retain.final_norm": 0.5,
    }
    tables = build_tables(SPACE, "sgtm", overrides=overrides)
    changed = update()
    changed["mlp_out"] = ((1, 1, 1), (1, 1, 1), (0, 1, 1), (0.1, 1, 1))
    assert_tables(
        tables,
        ((1, 1, 0.25), *ACTIVE[1:]),
        ((1, 1, 1), (1, 1, 1), (-1, 1, 1), (1, 1, 1)),
        changed,
        BOTH_BIASES | {"final_norm": (1, 0.5, 1, 1)},
    )


@pytest.mark.parametrize(
    "key",
    [
        "update.forget:bio.retain",
        "update.forget:bio.retain.mlp",
        "active.forget:chem.retain",
        "active.retain.chem",
        "active.retain.bio.mlp_in",
        "update_joint.retain.bias",
        "update_joint.retain",
        "weight.retain.bio",
        "labels.retain.bio",
        "active",
        "",
    ],
)
def test_an_override_that_names_nothing(key):
    with pytest.raises(ValueError, match="names no table entry") as error:
        build_tables(SPACE, "sgtm", overrides={key: 0.0})
    assert repr(key) in str(error.value)


def test_errors():
    with pytest.raises(ValueError, match=r"unknown strategy 'sgmt'.*gradient_routing"):
        build_tables(SPACE, "sgmt")
    with pytest.raises(ValueError, match="joint: strategy none masks nothing"):
        build_tables(SPACE, "none", joint="strict")
    for joint in ("norm", ["norms"], ["norm", "heads"]):
        with pytest.raises(ValueError, match=f"joint: {joint if isinstance(joint, str) else joint[-1]} is neither"):
            build_tables(SPACE, "sgtm", joint=joint)


@pytest.mark.parametrize(
    ("removed", "row"), [((), (1, 1, 1)), (("bio",), (1, 0, 1)), (("code",), (1, 1, 0)), (("code", "bio"), (1, 0, 0))]
)
def test_removal(removed, row):
    assert_tables(removal_tables(SPACE, removed), (row,) * 4, ONES, update(*PROJECTIONS), {})


@pytest.mark.parametrize("strategy", STRATEGY_TABLES)
def test_in_training_a_domains_direction_is_for_its_forget_tokens(strategy):
    assert build_tables(SPACE, strategy).steered == ((0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 1))


def test_in_an_evaluation_a_domains_direction_is_for_all_tokens_unless_it_is_removed():
    for removed, row in (((), (0, 1, 1)), (("bio",), (0, 0, 1)), (("code", "bio"), (0, 0, 0))):
        assert removal_tables(SPACE, removed).steered == (row,) * 4
        alone = removal_tables(SPACE, removed, groups=False)
        assert alone.steered == (row,) * 4 and alone.active == ONES


def test_removing_what_does_not_exist():
    with pytest.raises(ValueError, match="unknown domain 'chem'"):
        removal_tables(SPACE, ["chem"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("strategy", "no_out"), ("joint", "masked"), ("cross_domain", "active"), ("overrides", {"active.retain.b": 1.0})],
)
def test_the_config_hands_on_every_key(key, value):
    plain = load_config("debug", ["--masking.domains=[a, b]"])
    changed = load_config("debug", ["--masking.domains=[a, b]", f"--masking.{key}={json.dumps(value)}"])
    assert changed.tables != plain.tables
