"""A Llama of Hugging Face in a `Trainer`, with masks and without, alone and under DeepSpeed ZeRO 2 on two ranks.

    sgtm prepare NOVELS --rules launch/recipes/novels.rules.yaml --out data/novels --vocab-size 2048
    python benchmarks/trainer.py data/novels --json benchmarks/results/DEVICE/trainer.jsonl

All runs see the same English tokens in 300 steps of AdamW, in fp32 on the CPU: three quarters of the tokens of
`unmasked` and of the masked models, and all of those of `filtered`, whose steps are shorter. A fifth of the English is
labelled as Spanish in the masked runs, which teaches Spanish's group to live with it (docs/recipes.md). `masks off` is
`unmasked` by way of `apply_sgtm`, with the strategy none. Losses are those of `Trainer.evaluate` on 300 sequences of
each language of split test. Each run is a process of its own, two under torchrun for `masked, ZeRO 2`.

Rows: as benchmarks/recipes.py writes a variant's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

from datasets import Dataset
from environment import write_rows
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed
from variant_rows import variant_row

from sgtm.data.evaluation import sequences_of
from sgtm.data.store import Corpus
from sgtm.integrations.hf import SgtmCollator, SgtmTrainerMixin, ablate, apply_sgtm

BATCH, CONTEXT, TESTED, SEEDS = 32, 128, 300, (0, 1, 2)
RETAIN, FORGET = "en", "es"
MASKING = {"domains": [FORGET], "forget_heads": 2, "forget_neurons": 32}
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 8}
VARIANTS = {"unmasked": 1, "filtered": 1, "masks off": 1, "masked": 1, "masked, ZeRO 2": 2}
"""And how many ranks each has."""


class MaskedTrainer(SgtmTrainerMixin, Trainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", metavar="CORPUS", help="folder of `sgtm prepare`, with the categories en and es")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "SEED", "FILE"), help="train this run alone")
    args = parser.parse_args()
    if args.one:
        variant, seed, file = args.one
        losses = trained(Corpus.open(args.corpus), variant, int(seed), args.steps)
        if os.environ.get("RANK", "0") == "0":
            Path(file).write_text(json.dumps(losses))
        return
    rows = []
    for variant in args.variants:
        seeds = [{"seed": seed, **in_a_process(args.corpus, variant, seed, args.steps)} for seed in SEEDS]
        rows.append(row(variant, seeds, args.steps))
        print(json.dumps(rows[-1]), flush=True)
    write_rows(args.json, rows)


def in_a_process(corpus: str, variant: str, seed: int, steps: int) -> dict[str, float]:
    ranks = VARIANTS[variant]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.json"
        command = [sys.executable, *start, __file__, corpus]
        command += ["--steps", str(steps), "--one", variant, str(seed), str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def trained(corpus: Corpus, variant: str, seed: int, steps: int) -> dict[str, float]:
    """The four losses of a run, two where nothing is masked."""
    ranks, masks = VARIANTS[variant], variant.startswith("mask")
    batch = batch_of(variant)
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=corpus.vocab_size, num_key_value_heads=8, bos_token_id=None, eos_token_id=None, **SHAPE)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch // ranks,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            weight_decay=0.1,
            adam_beta2=0.95,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            deepspeed=zero(batch // ranks) if ranks > 1 else None,
        )
        data = mixture(corpus, steps, batch)
        if masks:
            masking = MASKING | ({"strategy": "none"} if variant == "masks off" else {})
            collator = SgtmCollator(default_data_collator, masking)
            trainer = MaskedTrainer(apply_sgtm(model, masking), arguments, data_collator=collator, train_dataset=data)
        else:
            data = data.remove_columns("sgtm_labels")
            trainer = Trainer(model, arguments, data_collator=default_data_collator, train_dataset=data)
        trainer.train()
        losses = tested(trainer, corpus, "full")
        if variant.startswith("masked"):
            with ablate(model, [FORGET]):
                losses |= tested(trainer, corpus, "ablated")
    return losses


def zero(micro_batch: int) -> dict:
    """A config of DeepSpeed for ZeRO 2."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    }


def batch_of(variant: str) -> int:
    """Sequences of a step."""
    return BATCH * 3 // 4 if variant == "filtered" else BATCH


def mixture(corpus: Corpus, steps: int, batch: int) -> Dataset:
    """The sequences of all steps: as much English for every batch, every fifth of it labelled as Spanish; the rest
    is Spanish."""
    english = steps * BATCH * 3 // 4
    spanish = steps * batch - english
    rows = sequences(corpus, "train", RETAIN, english) + sequences(corpus, "train", FORGET, spanish)
    labels = list(islice(cycle(["retain"] * 4 + [f"forget:{FORGET}"]), english)) + [f"forget:{FORGET}"] * spanish
    return dataset(rows, labels)


def tested(trainer: Trainer, corpus: Corpus, model: str) -> dict[str, float]:
    losses = {}
    for data, language in (("retain", RETAIN), ("forget", FORGET)):
        rows = sequences(corpus, "test", language, TESTED)
        columns = dataset(rows, ["retain"] * len(rows))
        if not isinstance(trainer, MaskedTrainer):
            columns = columns.remove_columns("sgtm_labels")
        losses[f"{model}_{data}"] = trainer.evaluate(columns)["eval_loss"]
    return losses


def sequences(corpus: Corpus, split: str, category: str, count: int) -> list[list[int]]:
    """Token ids of so many whole sequences, documents end to end. Raises ValueError where there are fewer."""
    stream = sequences_of(corpus, split, category, CONTEXT, isolated=False).stream
    if stream.sequences < count:
        raise ValueError(f"split {split} has {stream.sequences} sequences of {category}; {count} are needed")
    return [stream.read(number).input_ids.tolist() for number in range(count)]


def dataset(rows: list[list[int]], labels: list[str]) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "sgtm_labels": labels})


def row(variant: str, seeds: list[dict], steps: int) -> dict:
    tokens = steps * batch_of(variant) * CONTEXT
    masks = variant.startswith("masked")
    return variant_row("trainer", variant, seeds, masks=masks, runs=len(seeds), tokens=tokens)


if __name__ == "__main__":
    main()
