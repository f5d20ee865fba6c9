"""`sgtm explain` against a model counted by hand."""

import io
import re

import pytest
from corpora import build, record
from rich.console import Console

from sgtm.commands.main import main
from sgtm.config import load_config, preset_names
from sgtm.estimate.explain import data_line, explain, print_explanation

# debug: 2 layers, hidden size 32, 4 heads of 8, 64 neurons, vocabulary 512, context 64; 1 head and 8 neurons are es.
D, LAYERS = 32, 2
RETAIN = LAYERS * (3 * 24 * D + 24 * D + 56 * (D + 1) + 56 * D)
ES = LAYERS * (3 * 8 * D + 8 * D + 8 * (D + 1) + 8 * D)
OUT_BIAS, NORMS, FINAL_NORM, EMBEDDING, POSITION = LAYERS * 2 * D, LAYERS * 4 * D, 2 * D, 512 * D, 64 * D
JOINT = OUT_BIAS + NORMS + FINAL_NORM + EMBEDDING + POSITION


def text(*overrides: str) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    print_explanation(load_config("debug", list(overrides)), console)
    return console.export_text()


def row(printed: str, name: str) -> list[str]:
    """Cells of the table row that begins with `name`."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_command_prints_the_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    overrides = ("--masking.strategy=gradient_routing", "--model.layers=1")
    assert main(["explain", "debug", *overrides]) == 0
    printed = capsys.readouterr().out
    assert re.sub(r"\s+", " ", printed) == re.sub(r"\s+", " ", text(*overrides))


def test_experts_and_their_rows_of_the_router():
    """6 experts of 64 neurons, two of them of es, and a shared one: 5 and 2 with it of 64 neurons in a layer."""
    experts = ("--model.family=mixtral", "--model.window=null", "--model.experts=6", "--model.experts_per_token=2",
               "--model.shared_experts=1", "--masking.forget_neurons=0", "--masking.forget_experts=2")  # fmt: skip
    printed = text(*experts)
    assert "6 experts of 64 neurons, 2 per token and 1 shared" in printed and "balanced" not in printed
    assert "1 shared, balanced with weight 0.01" in text(*experts, "--train.expert_balance=0.01")
    of_es = LAYERS * (4 * 8 * D + 2 * (3 * 64 + 1) * D)
    groups = printed.partition("groups, in")[2].partition("forward pass")[0]
    assert row(groups, "es")[:5] == ["1", "1", "2", "128", f"{of_es:,}"]
    assert row(groups, "retain")[:4] == ["3", "3", "4", "320"]
    assert row(printed, "es mlp_in")[0] == f"{LAYERS * 2 * (2 * 64 + 1) * D:,}"


def test_the_line_on_the_data(tmp_path):
    corpus = build(tmp_path / "corpus", [record(0), record(1, "es", 99), record(2, split="test")])
    path = f"--data.path={corpus.path}"
    line = data_line(load_config("debug", [path, "--model.vocab_size=257", "--train.steps=3"]))
    assert line == f"data: {corpus.path} has 121 tokens in split train; the run takes 1,536, {1536 / 121:.2f} epochs"
    unmasked = ["--masking.strategy=none", "--masking.span_policy=position", "--data.mixing=token"]
    for name, does in (("loss", "have no loss"), ("hide", "have no loss and are read as EOS")):
        options = [path, "--model.vocab_size=257", "--train.steps=3", *unmasked, f"--data.token_filter={name}"]
        filtered = f"{line}; data.token_filter {name}: 100 forget tokens (82.6%) {does}"
        assert data_line(load_config("debug", options)) == filtered
        missed = '--data.channel={"forget:es": {"forget:es": 0.25, "retain": 0.75}}'
        assert ": 25 forget tokens (20.7%) have" in data_line(load_config("debug", [*options, missed]))
    printed = io.StringIO()
    refusal = f"data do not fit: model.vocab_size is 512, but the tokenizer of {corpus.path} has 257"
    with pytest.raises(ValueError, match=re.escape(refusal)):
        print_explanation(load_config("debug", [path]), Console(file=printed))
    assert printed.getvalue() == "", "nothing before the error"
    assert data_line(load_config("debug", ["--data.path=no"])).startswith("data: no corpus at no:")
    synthetic = data_line(load_config("debug", [f"--runs={tmp_path}"]))
    assert synthetic == "data: synthetic, which `sgtm train` writes" and not (tmp_path / "synthetic-512").exists()


def test_counts_by_group_and_label():
    explanation = explain(load_config("debug"))
    assert [explanation.owned(group) for group in ("retain", "es")] == [RETAIN, ES]
    assert explanation.total == RETAIN + ES + JOINT
    assert explanation.updated("unlabeled") == explanation.total
    assert explanation.updated("retain") == RETAIN + JOINT
    assert explanation.updated("forget:es") == ES + JOINT - OUT_BIAS


def test_joint_masked_leaves_only_the_final_norm():
    explanation = explain(load_config("debug", ["--masking.joint", "masked"]))
    assert explanation.updated("forget:es") == ES + FINAL_NORM


def test_unmasked_layers_are_updated_by_everyone():
    explanation = explain(load_config("debug", ["--masking.masked_layers", "[1]"]))
    layer = (RETAIN + ES + OUT_BIAS + NORMS) // LAYERS
    assert explanation.owned("es") == ES // 2
    assert explanation.updated("forget:es") == layer + (ES // 2) + (NORMS // 2) + FINAL_NORM + EMBEDDING + POSITION


def test_strategy_none_masks_nothing():
    explanation = explain(load_config("debug", ["--masking.strategy", "none"]))
    assert {explanation.updated(label) for label in explanation.updates} == {explanation.total}


@pytest.mark.parametrize("rank", ["full", 4])
@pytest.mark.parametrize("ends", [["embedding"], ["embedding", "head"]])
def test_a_domains_embedding_is_updated_by_its_own_labels(rank, ends):
    shared = ["--masking.domains=[es, fr]", '--data.channel={retain: {retain: 0.5, "open:es": 0.5}}']
    shared += ["--model.family=llama", "--model.window=null", "--model.tie_embeddings=false"] if "head" in ends else []
    options = [*shared, f"--masking.domain_embedding={rank}"]
    own = 512 * D if rank == "full" else 512 * rank + rank * D
    explanation, printed = explain(load_config("debug", options)), text(*options)
    assert explanation.config.space.labels == ("unlabeled", "retain", "forget:es", "forget:fr", "open:es")
    for end in ends:
        assert explanation.counts[f"{end}.es"] == explanation.counts[f"{end}.fr"] == own
        for domain, shares in {"es": ["yes", "-", "yes", "-", "yes"], "fr": ["yes", "-", "-", "yes", "-"]}.items():
            assert row(printed, f"{domain} {end}") == [f"{own:,}", *shares]
            updated = [f"{end}.{domain}" in explanation.updates[label] for label in explanation.config.space.labels]
            assert updated == [share == "yes" for share in shares]
    without = explain(load_config("debug", shared))
    for label, parts in {"unlabeled": 2, "retain": 0, "forget:es": 1, "forget:fr": 1, "open:es": 1}.items():
        assert explanation.updated(label) == without.updated(label) + parts * len(ends) * own
    assert explanation.owned("es") == without.owned("es") + len(ends) * own


def test_tables_say_who_runs_and_who_learns():
    printed = text()
    assert row(printed, "retain mlp_out") == [f"{LAYERS * 56 * D:,}", "yes", "yes", "-"]
    assert row(printed, "es attn_in") == [f"{LAYERS * 24 * D:,}", "yes", "-", "yes"]
    assert row(printed, "joint mlp_out_bias") == [f"{LAYERS * D:,}", "yes", "yes", "-"]
    assert row(printed, "may update")[1:] == [
        f"{n:,}" for n in (RETAIN + ES + JOINT, RETAIN + JOINT, ES + JOINT - OUT_BIAS)
    ]
    assert "│ es     │ runs      │ off    │ runs      │" in printed
    assert row(printed, "accumulation") == ["micro-batches of 2 sequences: 4 on 1, 2 on 2, 1 on 4 ranks"]
    assert "75%" in printed and "25%" in printed
    one = text("--train.micro_batch=1", "--train.tokens_per_step=64", "--train.steps=1", "--optimizer.warmup_steps=0")
    assert row(one, "accumulation") == ["micro-batches of 1 sequence: 1 on 1 rank"]
    assert row(one, "training")[0].startswith("1 step = 64 tokens") and "64 tokens = 1 sequence of 64" in one


def test_a_step_that_no_ranks_divide_is_an_error_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"micro_batch 64 is more than .*; train\.micro_batch 1, 2, 4 or 8 would divide them$"
    ):
        text("--train.micro_batch=64")


def test_an_unmasked_config_has_no_recipe_and_no_safe_model():
    for strategy in ("none", "gradient_routing"):
        printed = text("--recipe=dual", f"--masking.strategy={strategy}")
        assert ("safe model" in printed) == (strategy != "none")
        assert row(printed, "recipe") == ["-" if strategy == "none" else "dual"]


def test_titles_and_legend_are_not_wrapped():
    printed = text("--data.channel={retain: {retain: 0.5, unlabeled: 0.5}}")
    assert "label channel: what documents of a true label are trained as\n" in printed


@pytest.mark.parametrize(("width", "by_role"), [(80, True), (200, False)])
def test_tables_of_several_domains_have_no_name_or_number_cut_off(width, by_role):
    """At 80 columns a column for each of three domains would be `forge...` three times."""
    console = Console(width=width, record=True, file=io.StringIO())
    print_explanation(load_config("quickstart", ["--masking.domains=[es, bio, chem]"]), console)
    updates = console.export_text().partition("updates: ")[2].partition("label channel")[0]
    assert "…" not in updates
    assert ("domain embedding" in updates, "3 x 262,144" in updates) == (by_role, by_role)
    assert all((f"forget:{domain}" in updates) != by_role for domain in ("es", "bio", "chem"))


def test_weights_and_stopped_gradients_are_shown():
    printed = text("--masking.strategy", "gradient_routing", "--masking.overrides.update.retain.retain.mlp_in", "0.5")
    assert row(printed, "retain mlp_in")[1:] == ["yes", "x 0.5", "-"]
    assert "runs, gradients stop" in printed
    head_only = text("--masking.overrides.update_joint.retain.embedding", "0")
    assert row(head_only, "joint embedding+head")[1:] == ["yes", "- / yes", "yes"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_explained(name):
    explanation = explain(load_config(name))
    forget = f"forget:{explanation.config.space.domains[0]}"
    assert 0 < explanation.updated(forget) < explanation.updated("retain") < explanation.total
