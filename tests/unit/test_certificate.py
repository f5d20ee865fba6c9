"""What is certified, and the first reason why a config is not.

tests/dist/test_certificate.py shows on trained bits that the rules are needed and suffice.
"""

from __future__ import annotations

import json
import re

import pytest
from corpora import build, config_for, mixed_records, record

from sgtm.config import load_config
from sgtm.data.loader import check_corpus
from sgtm.estimate.explain import certificate_lines
from sgtm.masking.certificate import certified, obstacle

BASE = [
    "--masking.joint=strict",
    "--optimizer.grad_clip_scope=owner",
    '--data.channel={retain: {retain: 0.8, "forget:es": 0.2}}',
]
BOTH = "--masking.domains=[es, fr]"


def config(*options: str):
    return load_config("debug", [*BASE, *options])


@pytest.mark.parametrize(
    "options",
    [
        (),
        (BOTH,),
        ("--masking.strategy=gram", "--masking.joint=null"),
        ("--data.channel={}",),
        ("--data.mixing=token",),
        ("--optimizer.grad_clip=0",),
        ("--masking.strategy=activation_masking",),  # the retain group is not there for forget tokens
        ('--data.channel={retain: {retain: 1, "forget:es": 0.2}}', "--data.both_ways=true"),
    ],
)
def test_certified(options):
    run_config = config(*options)
    assert certified(run_config.conditions) == run_config.space.domains
    assert load_config("debug", [*BASE, *options, "--masking.certify=true"]) is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--masking.joint=free",), r"label forget:es train joint parameters \(norm, final_norm, embedding, position"),
        (("--masking.joint=masked",), r"label forget:es train joint parameters \(final_norm, head_bias\)"),
        (
            ("--data.channel={retain: {unlabeled: 0.1}}",),
            "label unlabeled train attn_in of group retain while",
        ),
        (('--data.channel={retain: {"open:es": 0.1}}',), "label open:es train attn_in of group retain while group es"),
        (
            ('--data.channel={"forget:es": {retain: 0.1}}',),
            "trains documents of forget:es as retain, with group",
        ),
        (('--data.channel={"forget:es": {unlabeled: 1}}',), "label unlabeled train attn_in of group retain"),
        (("--masking.strategy=gradient_routing",), "label forget:es train attn_out of group retain"),
        (("--masking.strategy=no_mlp_out",), "label forget:es train mlp_out of group retain"),
        (("--masking.strategy=none", "--masking.joint=null"), "label retain train attn_in of group retain"),
        (("--masking.masked_layers=[0]",), r"layers 1 have no groups \(masking.masked_layers\)"),
        (("--steering.direction=es.safetensors",), r"a direction is added that was measured on documents of a domain"),
        (("--optimizer.grad_clip_scope=global",), "clipped, and steps skipped, by a norm of all weights"),
        (("--optimizer.grad_clip_scope=global", "--optimizer.grad_clip=0"), "clipped, and steps skipped, by a norm"),
        (("--data.upsample={x: 0.5}",), "data.upsample 0.5 draws documents of x by their text"),
        (("--kernels.deterministic=false",), "sums may be added in any order"),
        (("--data.schedule={0.5: {retain: {unlabeled: 0.1}}}",), "label unlabeled train attn_in of group retain"),
        (('--masking.overrides={"active.retain.es": 0.1}',), "label retain train attn_in of group retain"),
        ((BOTH, "--masking.cross_domain=active"), "label forget:es train attn_in of group fr while group es is active"),
    ],
)
def test_the_first_reason_why_not(options, reason):
    run_config = config(*options)
    assert re.search(reason, obstacle(run_config.conditions, "es")), obstacle(run_config.conditions, "es")
    assert "es" not in certified(run_config.conditions)
    with pytest.raises(ValueError, match=f"masking.certify: the safe model depends on the text of es: .*{reason}"):
        config(*options, "--masking.certify=true")


def test_one_domain_may_be_certified_and_another_not():
    run_config = config(BOTH, '--data.channel={"forget:fr": {unlabeled: 0.5}, retain: {"open:fr": 0.5}}')
    assert certified(run_config.conditions, {"a": "retain", "b": "forget:es"}) == ("es",)
    assert certified(run_config.conditions) == ()  # unlabeled tokens read es too
    assert certified(config(BOTH, '--data.channel={retain: {"open:fr": 0.5}}').conditions) == ("es",)


def test_what_upsample_draws_counts_for_the_domain_of_the_category():
    run_config = config(BOTH, "--data.upsample={a: 1.5, b: 2}")
    assert certified(run_config.conditions, {"a": "forget:es", "b": "forget:fr", "c": "retain"}) == ("fr",)
    assert certified(run_config.conditions, {"a": "retain", "b": "forget:fr", "c": "forget:es"}) == ("es", "fr")


def test_the_embedding_of_another_domain_counts():
    parts = ("attn_in", "attn_out", "mlp_in", "mlp_out")
    entries = {"active.forget:es.fr": 1, **{f"update.forget:es.fr.{part}": 0 for part in parts}}
    options = (BOTH, f"--masking.overrides={json.dumps(entries)}")
    assert obstacle(config(*options).conditions, "es") is None
    reason = obstacle(config(*options, "--masking.domain_embedding=4").conditions, "es")
    assert reason == "tokens of label forget:es train embedding of group fr while group es is active"


def test_the_labels_and_spans_of_the_corpus_count(tmp_path):
    masking = {"masking": {"joint": "strict", "certify": True}}
    plain = config_for(channel={}, mixing="token", **masking | {"optimizer": {"grad_clip_scope": "owner"}})
    assert certified(plain.conditions) == ("es",)
    labels = {"en": "retain", "es": "forget:es", "web": "unlabeled"}
    two = [r for r in mixed_records(60) if r["category"] != "web"]
    check_corpus(build(tmp_path / "two", two, {"en": "retain", "es": "forget:es"}), plain)
    three = build(tmp_path / "three", mixed_records(60), labels)
    with pytest.raises(ValueError, match=r'label unlabeled train attn_in .*unlabeled: \{"forget:es": 1\}'):
        check_corpus(three, plain)
    left_out = config_for(
        channel={}, mixing="token", upsample={"web": 0}, **masking | {"optimizer": {"grad_clip_scope": "owner"}}
    )
    check_corpus(three, left_out)
    spans = [*two, record(999, "en", spans=[[0, 4, "es"]])]
    with pytest.raises(ValueError, match="the corpus has labelled spans"):
        check_corpus(build(tmp_path / "spans", spans, {"en": "retain", "es": "forget:es"}), plain)


def test_an_export_to_start_from_counts(tmp_path):
    run_config = config(f"--train.init_from={tmp_path}")
    assert certificate_lines(run_config) == ["safe model independent of: es"]  # a model that is no export
    reason = "the run starts from an export that is not independent of es (train.init_from)"
    for uncertified in ('{"removed": []}', '{"independent_of": ["fr"]}', '{"indep', "[]"):  # a damaged one too
        (tmp_path / "sgtm_export.json").write_text(uncertified)
        assert certificate_lines(run_config) == [f"safe model depends on es: {reason}"]
    (tmp_path / "sgtm_export.json").write_text('{"independent_of": ["es"]}')
    assert certificate_lines(run_config) == ["safe model independent of: es"]


def test_explain_prints_it():
    assert certificate_lines(config()) == ["safe model independent of: es"]
    lines = certificate_lines(config("--masking.joint=free"))
    assert len(lines) == 1 and lines[0].startswith("safe model depends on es: tokens of label forget:es train joint")
    assert lines[0].endswith("; `recipe: certified` would make it independent")
    (line,) = certificate_lines(config("--masking.joint=free", "--masking.masked_layers=[0]"))
    assert line.startswith("safe model depends on es: layers") and "recipe" not in line


def test_explain_prints_no_safe_model_where_a_direction_alone_is_left_out():
    unmasked = ["--masking.strategy=none", "--steering.direction=es.safetensors"]
    assert certificate_lines(load_config("debug", unmasked)) == []
    masked = certificate_lines(config(unmasked[1]))
    assert masked[0].startswith("safe model depends on es: a direction is added")
