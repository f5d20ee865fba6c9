"""Mask a small Llama of Hugging Face, train it in a Trainer on English and Spanish, and remove Spanish.

python examples/hf_trainer.py [FOLDER] [STEPS]

Needs Accelerate, as every Trainer does: pip install accelerate
"""

import sys

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from sgtm.data.synthetic import tell_stories
from sgtm.integrations.hf import SgtmCollator, SgtmTrainerMixin, ablate, apply_sgtm, without_domains

BYTES = 128  # of a sequence
MASKING = {"domains": ["es"], "joint": "masked", "forget_heads": 2, "forget_neurons": 16}


class MaskedTrainer(SgtmTrainerMixin, Trainer):
    pass


def sequences(language: str, split: str, stories: int) -> list[list[int]]:
    text = "\n".join(tell_stories(language, split, 0, stories)).encode()
    return [list(text[start : start + BYTES]) for start in range(0, len(text) - BYTES + 1, BYTES)]


def labelled(rows: list[list[int]], labels: list[str]) -> Dataset:
    """One label for each sequence, in the column `sgtm_labels`."""
    cycle = [labels[i % len(labels)] for i in range(len(rows))]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "sgtm_labels": cycle})


folder = sys.argv[1] if len(sys.argv) > 1 else "runs"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 60
english, spanish = (sequences(language, "train", 150) for language in ("en", "es"))
# A fifth of the English trains as Spanish does, which teaches Spanish's group to live with it: docs/recipes.md.
rows = english + spanish
labels = ["retain", "retain", "retain", "retain", "forget:es"] * len(english)
train = labelled(rows, labels[: len(english)] + ["forget:es"] * len(spanish))
test = {language: labelled(sequences(language, "test", 10), ["retain"]) for language in ("en", "es")}

set_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
config = LlamaConfig(vocab_size=256, num_key_value_heads=4, bos_token_id=None, eos_token_id=None, **shape)
model = apply_sgtm(LlamaForCausalLM(config), MASKING)
arguments = TrainingArguments(
    folder,
    max_steps=steps,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
collator = SgtmCollator(default_data_collator, MASKING)
trainer = MaskedTrainer(model, arguments, data_collator=collator, train_dataset=train)
trainer.train()


def losses() -> str:
    return ", ".join(f"{language} {trainer.evaluate(data)['eval_loss']:.2f}" for language, data in test.items())


print("full:", losses())
with ablate(model, ["es"]):
    print("without es:", losses())
without_domains(model, ["es"]).save_pretrained(f"{folder}/safe")  # loads without sgtm
