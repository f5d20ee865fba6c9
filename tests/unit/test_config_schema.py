"""What holds across the sections of a config, and what follows from them."""

import pytest
from configs import message

from sgtm.config import load_config
from sgtm.config.load import save_config
from sgtm.config.schema import Config
from sgtm.masking.labels import RETAIN, UNLABELED

LLAMA = ["--model.family=llama", "--model.window=null"]
RULES = [
    (["--model.hidden_size", "33"], "debug: model: hidden_size 33 is not a multiple of heads 4; set head_dim"),
    (["--masking.forget_heads", "4"], "masking.forget_heads: 4 of 4 would be forget"),
    (["--data.channel.retain.retain", "0.9"], "data.channel: label channel row 'retain'"),
    (["--train.steps", "1:30"], "train.steps: found '1:30' on the command line, but it takes: whole number"),
    (
        ["--name", "../x"],
        "name: found '../x' on the command line, but it takes: text of letters, digits and _ . + -, with a letter, "
        "digit or _ first",
    ),
    (["--train.tokens_per_step", "100"], "tokens_per_step 100 is not a multiple of model.context 64; set 64 or 128"),
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
        "masking.forget_heads es: 2 query heads share a KV head; give a multiple of 2",
    ),
    (["--masking.domain_embedding=32"], "domain_embedding 32 is not below model.hidden_size 32 and"),
    (["--masking.strategy=gram", "--masking.cross_domain=active"], "other domains' groups inactive; set inactive, or"),
    (
        ["--optimizer.grad_clip_scope=owner", "--distributed.offload_optimizer=true", "--distributed.zero_stage=1"],
        "optimizer.grad_clip_scope owner: with distributed.offload_optimizer DeepSpeed gives norms of whole parameters",
    ),
    (
        ["--data.schedule={0.9: {}}"],
        "data.schedule 0.9 begins at step 8, but must begin after step 0 and before",
    ),
    (["--data.schedule={1.5: {}}"], "data.schedule 1.5 is neither a share below 1 nor a whole number of steps"),
    (
        ["--data.schedule={0.1: {}, 1: {}}"],
        "data.schedule 1 begins at step 1, but must begin after step 1 and",
    ),
    (["--data.schedule={3: {retain: {retain: 0.9}}}"], "data.schedule.3: label channel row 'retain'"),
    (
        ["--data.token_filter=loss"],
        "data.token_filter loss does not go with data.mixing sequence, masking.span_policy conservative and "
        "masking.strategy sgtm; set data.mixing token, masking.span_policy position and masking.strategy none, or "
        "token_filter off",
    ),
    (
        [
            *("--data.token_filter=loss", "--data.mixing=token", "--masking.span_policy=position"),
            *("--masking.strategy=none", "--masking.overrides={update.forget:es.retain.mlp_out: 0.5}"),
        ],
        "data.token_filter loss does not go with masking.overrides {'update.forget:es.retain.mlp_out': 0.5}; set "
        "masking.overrides {}, or token_filter off",
    ),
    (
        ["--data.token_filter=hide", "--data.mixing=token", "--masking.strategy=none"],
        "data.token_filter hide does not go with masking.span_policy conservative; set masking.span_policy position, "
        "or token_filter off",
    ),
    (
        ["--data.token_filter=hide", "--masking.span_policy=position", "--masking.strategy=none"],
        "data.token_filter hide does not go with data.mixing sequence; set",
    ),
    (
        ["--data.token_filter=loss", "--masking.span_policy=position", "--data.mixing=token"],
        "data.token_filter loss does not go with masking.strategy sgtm; set",
    ),
    (
        ["--masking.partition=add"],
        "masking.partition add: family gpt_neo, whose heads are hidden_size / heads wide, has no room for "
        "masking.forget_heads 1 more; set it 0, or model.family llama",
    ),
    (
        [*LLAMA, "--masking.partition=add", "--masking.masked_layers=[0]"],
        "masking: masked_layers [0]: with partition add every layer is wider by the domains' groups; set",
    ),
    (
        [*LLAMA, "--masking.partition=add", "--masking.forget_heads={es: [1]}"],
        "masking.forget_heads es: [1] are indices in a model; an added group takes a count",
    ),
    (
        [*LLAMA, "--masking.partition=add", "--model.kv_heads=2"],
        "masking.forget_heads es: 2 query heads share a KV head; give a multiple of 2 in place of 1",
    ),
    (
        ["--masking.forget_heads=0", "--masking.forget_neurons=0"],
        "masking.forget_heads es: 0, with forget_neurons 0, leaves the domain no group; set one of them above 0",
    ),
    (["--train.eval_removed=[[es, fr]]"], "train.eval_removed: unknown domain 'fr'; known domains: es"),
    (["--optimizer.group_lr.ess=2"], "optimizer.group_lr ess: no such group (did you mean es?); groups: retain, es"),
    (
        ["--optimizer.group_lr.es=0"],
        "optimizer.group_lr: found {es: 0} on the command line, but it takes: mapping of text to number above 0",
    ),
    (["--steering.layer=1"], "layer 1 without a direction adds nothing: set direction to a file"),
    (["--steering.strength=2"], "strength 2 without a direction adds nothing"),
    (
        ["--steering.direction=es.safetensors", "--steering.layer=2"],
        "steering.layer 2: the blocks of model.layers 2 are 0 to 1; take one of them",
    ),
    (["--steering.strength=nan"], "steering.strength: found 'nan' on the command line, but it takes: number"),
    (["--data.token_filter=on"], "data.token_filter: found 'on' on the command line, but it takes: one of off, loss,"),
]
UNMASKED = ("--masking.strategy=none",)
STEERED = "--steering.direction=es.safetensors"
FILTERS = ["--masking.span_policy=position", "--data.mixing=token", "--masking.strategy=none"]


@pytest.mark.parametrize("overrides, expected", RULES)
def test_a_broken_rule_is_named_with_its_keys(overrides, expected):
    error = message("debug", *overrides)
    assert expected in error and "\n" not in error


def test_the_method_names_the_token_filter():
    methods = [load_config("debug", [*FILTERS, f"--data.token_filter={name}"]).method for name in ("off", "hide")]
    assert methods == ["strategy none", "strategy none, token filter hide"]


def test_the_method_names_the_steering_that_adds_something():
    options = {
        (): "",
        (STEERED, "--steering.strength=2"): ", steering 2",
        (STEERED, "--steering.strength=0"): "",
        (STEERED,): ", steering 1",
    }
    for overrides, expected in options.items():
        assert load_config("debug", [*UNMASKED, *overrides]).method == f"strategy none{expected}"


@pytest.mark.parametrize(
    ("options", "groups", "removals"),
    [
        ((), True, 2),
        ((STEERED,), True, 2),
        (UNMASKED, False, 1),
        ((*UNMASKED, "--train.init_from=folder"), True, 2),  # whose groups may hold a domain
        ((*UNMASKED, STEERED), False, 2),
        ((*UNMASKED, STEERED, "--train.init_from=folder"), False, 2),
        ((*UNMASKED, STEERED, "--steering.strength=0"), False, 1),
    ],
)
def test_what_is_left_out_without_a_domain(options, groups, removals):
    """Of a model that is steered and not masked its direction, and no group."""
    config = load_config("debug", list(options))
    assert (config.removes_groups, len(config.removals)) == (groups, removals)
    without = config.removal_tables(["es"])
    assert [row[1] for row in without.active] == [0 if groups else 1] * 3
    assert not any(map(any, without.steered)) and all(map(any, config.removal_tables(()).steered))


WIDE = [*LLAMA, "--masking.domains=[a, b]", "--masking.partition=add", "--data.channel={}"]


@pytest.mark.parametrize(
    ("options", "heads", "kv_heads", "neurons"),
    [
        ((), (4, 1, 1), (4, 1, 1), (64, 8, 8)),
        (("--masking.forget_heads={a: 0, b: 2}", "--masking.forget_neurons={a: 3, b: 0}"), (4, 0, 2), (4, 0, 2), None),
        (("--model.kv_heads=2", "--masking.forget_heads=2"), (4, 2, 2), (2, 1, 1), (64, 8, 8)),
        (("--masking.percent=25",), (4, 1, 1), (4, 1, 1), (64, 16, 16)),
        (("--masking.strategy=none",), (4, 1, 1), (4, 1, 1), (64, 8, 8)),  # the baseline is as wide
    ],
)
def test_added_groups_come_on_top_of_the_model(options, heads, kv_heads, neurons, tmp_path):
    """debug has 4 heads of width 8 and 64 neurons, which the retain group keeps."""
    config = load_config("debug", [*WIDE, *options])
    layer = config.partition.layers[0]
    assert (layer.heads, layer.kv_heads, layer.neurons) == (heads, kv_heads, neurons or (64, 3, 0))
    model = config.model
    assert (model.heads, model.num_kv_heads, model.size_per_head) == (sum(heads), sum(kv_heads), 8)
    assert model.intermediate_size == sum(layer.neurons) and config.masking.partition == "added"


def test_added_groups_are_not_added_again():
    config = load_config("debug", [*WIDE, "--masking.percent=25", "--recipe=gram"])
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate(config) == config
    assert Config.model_validate(config.model_dump(exclude_unset=True)) == config


def test_a_saved_config_with_added_groups_loads_as_it_was(tmp_path):
    config = load_config("debug", [*WIDE, "--model.kv_heads=2", "--masking.forget_heads=2"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    values = config.spelled_out()
    assert values["masking"]["partition"] == "added" and values["model"]["heads"] == 8


def test_added_neurons_alone_leave_gpt_neo_its_heads():
    config = load_config("debug", ["--masking.partition=add", "--masking.forget_heads=0"])
    assert (config.model.heads, config.model.intermediate_size, config.partition.layers[0].heads) == (4, 72, (4, 0))


def test_the_removed_sets_are_those_of_the_config():
    domains = ("--masking.domains=[a, b, c, d]", "--masking.forget_heads=0")
    config = load_config("debug", [*domains, "--data.channel={}", "--train.eval_removed=[[d, a]]"])
    assert config.removals == [(), ("a",), ("b",), ("c",), ("d",), ("a", "d"), ("a", "b", "c", "d")]
    assert load_config("debug", [*domains, "--masking.strategy=none", "--train.eval_removed=[[a, b]]"]).removals == [()]


def test_groups_have_rates_of_their_own():
    config = load_config("debug", ["--masking.domains=[a, b]", "--optimizer.group_lr={b: 0.5, retain: 2}"])
    assert [config.rate_of(group) for group in range(3)] == [2, 1, 0.5]


def test_a_warm_up_in_steps_and_its_share_are_the_same_run():
    share, steps = (load_config("debug", [f"--optimizer.warmup_steps={n}"]) for n in ("0.25", "2"))
    assert share.spelled_out() == steps.spelled_out() and share != steps


def test_a_derived_micro_batch_divides_the_blocks_of_mixing_micro():
    config = load_config("quickstart", ["--data.mixing=micro"])
    assert [(config.for_ranks(n).train.micro_batch, config.accumulation(n)) for n in (1, 2, 8)] == [
        (8, 4),
        (4, 4),
        (1, 4),
    ]
    assert load_config("quickstart", ["--train.micro_batch=2"]).for_ranks(4).train.micro_batch == 2


def test_the_ranks_must_divide_a_step():
    """debug has 8 sequences of 64 tokens in a step."""
    config = load_config("debug", ["--train.micro_batch=2"])
    assert [config.accumulation(ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    sequences = "train.tokens_per_step 512: 8 sequences per step do not divide"
    with pytest.raises(ValueError, match=f"^{sequences} among 8 ranks x train.micro_batch 2$"):
        config.accumulation(8)
    derived = load_config("debug", ["--train.micro_batch=null"])
    with pytest.raises(ValueError, match=f"^{sequences} among 3 ranks$"):
        derived.for_ranks(3)
    mixed = load_config("debug", ["--train.micro_batch=2", "--data.mixing=micro", "--data.micro_blocks=3"])
    with pytest.raises(ValueError, match=r"micro: data\.micro_blocks 3 does not divide 4 accumulation steps;"):
        mixed.accumulation(1)


def test_a_derived_micro_batch_has_as_many_sequences_as_fit_into_its_tokens():
    """16,384 tokens are 256 sequences of 64; of 300 sequences a step the largest divisor below is 150."""
    config = load_config("debug", ["--train.micro_batch=null", f"--train.tokens_per_step={300 * 64}"])
    assert (config.for_ranks(1).micro_batch, config.for_ranks(3).micro_batch) == (150, 100)


def test_the_channels_of_a_schedule_begin_at_whole_steps_in_order():
    options = ["--train.steps=10", "--data.channel={}", "--optimizer.warmup_steps=0"]
    schedule = "{8: {retain: {unlabeled: 1}}, 0.25: {retain: {retain: 0.5, unlabeled: 0.5}}}"
    channels = load_config("debug", [*options, f"--data.schedule={schedule}"]).channels
    assert [start for start, _ in channels] == [0, 3, 8]
    shares = [channel.matrix[RETAIN, [RETAIN, UNLABELED]].tolist() for _, channel in channels]
    assert shares == [[1, 0], [0.5, 0.5], [0, 1]]


def test_a_domain_that_a_channel_or_an_override_opens_has_a_label_for_it():
    def labels(*overrides: str) -> tuple[str, ...]:
        return load_config("debug", ["--masking.domains=[a, b]", "--data.channel={}", *overrides]).space.labels

    closed = ("unlabeled", "retain", "forget:a", "forget:b")
    assert labels() == closed
    assert labels("--data.channel={retain: {retain: 0.9, 'open:b': 0.1}}") == (*closed, "open:b")
    assert labels("--data.schedule={0.5: {retain: {'open:a': 1}}}") == (*closed, "open:a")
    assert labels("--masking.overrides.update.open:a.retain.mlp_out=0") == (*closed, "open:a")


@pytest.mark.parametrize(("strategy", "joint"), [("sgtm", "free"), ("gram", "strict")])
def test_the_values_are_spelled_out_with_the_joint_that_the_strategy_chooses(strategy, joint):
    config = load_config("debug", [f"--masking.strategy={strategy}", "--masking.joint=null"])
    assert (config.masking.joint, config.joint, config.spelled_out()["masking"]["joint"]) == (None, joint, joint)
    assert Config.model_validate(config.spelled_out()).tables == config.tables
