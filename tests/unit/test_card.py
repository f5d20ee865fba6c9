"""sgtm/hf/card.py: what the model card says follows from the record. From real exports: tests/unit/test_export.py."""

from __future__ import annotations

from sgtm.hf.card import card

RECORD = {
    "run": "mine",
    "recipe": "certified",
    "method": "strategy sgtm, recipe certified",
    "removed": ["bio"],
    "reduced": {},
    "independent_of": [],
    "init_from": None,
    "how": {"heads": "zeroed", "neurons": "physically removed"},
    "architecture": "gpt_neo",
    "architecture_because": None,
    "checkpoint": {"name": "step_00001200", "step": 1200, "manifest_sha256": "abc"},
    "corpus": "def",
    "losses": None,
    "unlearned": None,
    "adapted": None,
    "tokenizer": True,
    "dtype": "fp32",
    "versions": {"sgtm": "1.2", "torch": "3.4"},
}


def test_it_has_origin_method_and_what_was_removed():
    text = card(RECORD, "safe")
    assert text.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# safe\n\nRun `mine`"
    )
    assert "(strategy sgtm, recipe certified), without its domains `bio` (heads zeroed; neurons physically" in text
    assert "- checkpoint: `step_00001200`, SHA-256 of its manifest `abc`\n- data: fingerprint `def`\n" in text
    assert "- recipe: certified\n- written by sgtm 1.2, torch 3.4;" in text
    assert "Not certified for `bio`: these weights may have learned from documents with that label." in text
    assert "Certified" not in text and "Not a safe" not in text and "\n\n\n" not in text


def test_nothing_removed():
    text = card({**RECORD, "removed": [], "how": {}}, "full")
    assert "recipe certified), with all its domains. " in text and "ertified for" not in text


def test_the_certificate_names_domains_and_what_may_still_depend_on_them():
    text = card({**RECORD, "independent_of": ["bio"]}, "safe")
    assert "of what the documents labelled `bio` said; their lengths, the tokenizer and the split may" in text
    text = card({**RECORD, "independent_of": ["bio"], "init_from": "x"}, "safe")
    assert "their lengths, the tokenizer, the initial weights and the split may" in text and "Not cert" not in text
    text = card({**RECORD, "removed": ["bio", "cyber"], "independent_of": ["bio"]}, "safe")
    assert "labelled `bio` said" in text and "Not certified for `cyber`: " in text


def test_losses_without_error_or_measurement():
    row = {"category": "en", "true_label": None, "tokens": None, "full": 2.0, "full_error": None, "this": None}
    losses = {"split": "test", "sequences": 64, "by": "sgtm train", "rows": [{**row, "this_error": None}]}
    text = card({**RECORD, "losses": losses}, "safe")
    assert "split `test`, by `sgtm train` after step 1,200;" in text
    assert "| en |  |  | 2.000 | not measured |" in text
