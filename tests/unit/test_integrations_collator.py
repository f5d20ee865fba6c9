"""The label column of a batch: sgtm/integrations/collator.py and the settings of sgtm/integrations/settings.py."""

from __future__ import annotations

import pytest
import torch
from hf_models import MASKING
from transformers import default_data_collator

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.collator import SgtmCollator


def example(label, length: int = 4) -> dict:
    return {"input_ids": list(range(length)), "labels": list(range(length)), "sgtm_labels": label}


@pytest.mark.parametrize("masking", [MASKING, MaskingConfig(**MASKING)], ids=["keys", "section"])
def test_labels_are_added_to_the_batch_of_another_collator(masking):
    labels = ["unlabeled", "forget:code", 1, torch.tensor(2), "open:bio"]
    examples = [example(label) for label in labels]
    batch = SgtmCollator(default_data_collator, masking)(examples)
    assert batch["sgtm_labels"] == (0, 3, 1, 2, 4)
    assert torch.equal(batch["input_ids"], torch.arange(4).expand(5, 4))
    assert set(batch) == {"input_ids", "labels", "sgtm_labels"}
    assert all("sgtm_labels" in row for row in examples)  # the dataset's rows are not changed


def test_the_column_may_have_another_name():
    collator = SgtmCollator(default_data_collator, MASKING, column="trained_as")
    batch = collator([{"input_ids": [1, 2], "trained_as": "retain"}])
    assert batch["sgtm_labels"] == (1,) and "trained_as" not in batch


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("bio", "unknown label 'bio'"),
        (7, "known labels: 0 unlabeled"),
        (None, "sgtm_labels has None"),
        ([1, 1, 1, 1], "a list of 4 labels for one sequence: labels of single tokens are not supported"),
        (torch.ones(4, dtype=torch.long), "a list of 4 labels for one sequence"),
    ],
)
def test_what_is_no_label_is_refused(label, message):
    with pytest.raises(ValueError, match=message):
        SgtmCollator(default_data_collator, MASKING)([example(label)])


def test_a_missing_column_is_an_error():
    with pytest.raises(ValueError, match=r"example 1 of the batch has no column 'sgtm_labels', only input_ids"):
        SgtmCollator(default_data_collator, MASKING)([example(1), {"input_ids": [1]}])


def test_a_collator_that_packs_is_an_error():
    def packing(examples):
        return {"input_ids": torch.cat([torch.tensor(row["input_ids"]) for row in examples])[None]}

    with pytest.raises(ValueError, match="made 1 sequences of 2 examples"):
        SgtmCollator(packing, MASKING)([example(1), example(2)])


def test_settings_are_those_of_apply_sgtm():
    with pytest.raises(ValueError, match=r"masking.certify true"):
        SgtmCollator(default_data_collator, MASKING | {"certify": True})
    with pytest.raises(ValueError, match="domain_embedding 'full'"):
        SgtmCollator(default_data_collator, MASKING | {"domain_embedding": "full"})
