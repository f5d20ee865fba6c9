"""Certified runs whose forget text differs end with the same safe model, to the bit; runs that break a rule do not.

The two corpora have the same documents, but for one domain's, which have the same lengths and other text. Each run is
trained; if certified, its last checkpoint is deleted, and it is resumed from the one before. What is compared is the
exported file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch.distributed as dist
from corpora import BYTES, build, record
from ranks import run_ranks

from sgtm.config import Config
from sgtm.masking.certificate import certified, obstacle

STEPS = 6
CERTIFIED = {
    "masking": {"strategy": "sgtm", "joint": "strict"},
    "data": {"channel": {"retain": {"retain": 0.8, "forget:es": 0.2}}},
    "optimizer": {"grad_clip_scope": "owner", "grad_clip": 0.05},
}


ONE_OF_TWO = {"data": {"channel": {"retain": {"retain": 0.6, "forget:es": 0.2, "open:fr": 0.2}}}}
EXPERTS = {
    "model": {"experts": 4, "experts_per_token": 2, "shared_experts": 1},
    "masking": {"forget_neurons": 0, "forget_experts": 2},
}
BALANCED = EXPERTS | {"train": {"expert_balance": 1.0}}
LABELS = {"en": "retain", "es": "forget:es", "fr": "forget:fr"}
CORPORA = {"es": ("en", "es"), "es-fr": ("en", "es", "fr"), "spans": ("en", "es")}  # categories


@dataclass(frozen=True)
class Case:
    """A certified run with some keys changed.

    corpus  of `CORPORA`; in `spans` the text of labelled spans differs, inside retain documents
    domain  whose text differs, and which is removed
    start   folder of exports by data, with the weights to start from; None: random ones
    """

    stage: int = 1
    precision: str = "fp32"
    changes: dict = field(default_factory=dict)
    family: str = "gpt_neo"
    corpus: str = "es"
    domain: str = "es"
    start: Path | None = None

    @property
    def data(self) -> tuple[str, str]:
        """The folders of the two corpora."""
        return self.corpus, f"{self.corpus}-other-{self.domain}"

    def obstacle(self) -> str | None:
        initial = None
        if self.start:
            initial = json.loads((self.start / self.data[0] / "sgtm_export.json").read_text())
        return obstacle(
            self.config("x/runs", "x").conditions, self.domain, spans=self.corpus == "spans", initial=initial
        )

    def config(self, runs: str, data: str) -> Config:
        values = {
            "runs": runs,
            "name": data,
            "model": {
                "family": self.family,
                "layers": 2,
                "hidden_size": 16,
                "heads": 4,
                "intermediate_size": 12,
                "vocab_size": BYTES,
                "context": 16,
                "init_std": 0.2,
                "tie_embeddings": self.family == "gpt_neo",
            },
            "masking": {"domains": list(CORPORA[self.corpus][1:]), "forget_neurons": 3},
            "data": {"path": str(Path(runs).parents[0] / data), "isolate_documents": False},
            "optimizer": {"lr": 1e-2, "warmup_steps": 0},
            "train": {
                "steps": STEPS,
                "tokens_per_step": 8 * 16,
                "micro_batch": 2,
                "precision": self.precision,
                "checkpoint_every": STEPS // 2,
                "eval_sequences": 2,
            },
            "distributed": {"zero_stage": self.stage, "timeout_minutes": 2},
        }
        start = {"train": {"init_from": str(self.start / data)}} if self.start else {}
        for section in (CERTIFIED, self.changes, start):
            for name, keys in section.items():
                values[name] = {**values[name], **keys}
        return Config.model_validate(values)


def records(corpus: str, other: str | None = None) -> list[dict]:
    """Documents of a corpus; those of the domain `other`, or its spans, with other letters and lengths as they were."""
    documents = []
    for number in range(60):
        split, length = "test" if number % 10 == 0 else "train", 9 + 7 * number % 41
        for category in CORPORA[corpus]:
            fields, start, end = record(number, category, length, split), 0, length
            if corpus == "spans":
                start, end = (3, 8) if category == "en" else (0, 0)
                fields["spans"] = [[start, end, "es"]] if category == "en" else []
            if other and (category == other or corpus == "spans"):
                text = fields["text"]
                changed = text[start:end].translate(str.maketrans("es.0123456789", "xy_9876543210"))
                fields["text"] = text[:start] + changed + text[end:]
            documents.append(fields)
    return documents


def train_all(folder: str, cases: list[Case], resumed: bool) -> None:
    from sgtm.training.loop import train

    for number, case in enumerate(cases):
        for data in case.data:
            config = case.config(f"{folder}/runs{number}", data)
            run = train(config)
            if not resumed:
                continue
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
            dist.barrier()
            train(config, resume=True)


def safe_models(folder: Path, cases: list[Case], ranks: int, resumed: bool) -> list[tuple[str, str]]:
    """SHA-256 of the safe weights that each case leaves with either corpus."""
    from sgtm.hf.export import export_run

    for corpus, domain in {(case.corpus, case.domain) for case in cases}:
        for data, other in zip(Case(corpus=corpus, domain=domain).data, (None, domain), strict=True):
            if not (folder / data).exists():
                labels = {category: LABELS[category] for category in CORPORA[corpus]}
                build(folder / data, records(corpus, other), labels)
    run_ranks(train_all, ranks, str(folder), cases, resumed)
    digests = []
    for number, case in enumerate(cases):
        pair = []
        for which, data in enumerate(case.data):
            for remove in ([case.domain], []):
                out = folder / f"exports{number}" / ("safe" if remove else "full") / case.data[which]
                export_run(folder / f"runs{number}" / data, remove, out)
                independent = json.loads((out / "sgtm_export.json").read_text())["independent_of"]
                assert independent == (remove if case.obstacle() is None else [])
                assert ("independent, to the bit, of" in (out / "README.md").read_text()) == bool(independent)
                pair.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
        assert pair[1] != pair[3], "the full models know the difference"
        digests.append((pair[0], pair[2]))
    return digests


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_safe_model_is_independent_of_the_forget_text(tmp_path, ranks):
    cases = [Case(stage, "bf16" if stage % 2 else "fp32") for stage in range(4)]
    cases += [Case(2, "bf16", {"masking": {"strategy": "gram", "joint": None}}, "llama")]
    cases += [Case(stage, "fp32", {"masking": {"domain_embedding": "full"}}) for stage in (0, 3)]
    cases += [Case(stage, "bf16", {"masking": {"domain_embedding": 3}}, "llama") for stage in (1, 3)]
    cases += [Case(2, "fp32", {"masking": {"domain_embedding": 3}, "data": {"mixing": "token"}})]
    cases += [Case(2, "bf16", ONE_OF_TWO, corpus="es-fr"), Case(3, "bf16", BALANCED, "mixtral")]
    for experts in (EXPERTS, BALANCED):
        cases += [Case(2, "fp32", experts | {"data": CERTIFIED["data"] | {"mixing": "token"}}, "mixtral")]
    for case, (these, those) in zip(cases, safe_models(tmp_path, cases, ranks, resumed=True), strict=True):
        assert certified(case.config("x/runs", "x").conditions) == ("es",)
        assert these == those, case


BROKEN = {
    "clipping": Case(changes={"optimizer": {"grad_clip_scope": "global"}}),
    "joint, own embedding": Case(changes={"masking": {"joint": "masked", "domain_embedding": "full"}}),
    "joint": Case(
        changes={"masking": {"joint": ["embedding", "position", "head", "norm", "attn_out_bias", "mlp_out_bias"]}}
    ),
    "layers": Case(changes={"masking": {"masked_layers": [1]}}),
    "unlabeled": Case(changes={"data": {"channel": {"retain": {"retain": 0.8, "unlabeled": 0.2}}}}),
    "open": Case(changes={"data": {"channel": {"retain": {"retain": 0.8, "open:es": 0.2}}}}),
    "undiscovered": Case(changes={"data": {"channel": {"forget:es": {"forget:es": 0.8, "retain": 0.2}}}}),
    "late": Case(changes={"data": {"schedule": {0.5: {"forget:es": {"unlabeled": 0.5}}}}}),
    "routing": Case(changes={"masking": {"strategy": "gradient_routing"}}),
    "exempt": Case(changes={"masking": {"strategy": "no_mlp_out"}}),
    "upsample": Case(changes={"data": {"upsample": {"es": 1.5}}}),
    "override": Case(changes={"masking": {"overrides": {"active.retain.es": 1.0}}}),
    "spans": Case(changes={"data": {"mixing": "token"}}, corpus="spans"),
    "across domains": Case(changes={"masking": {"cross_domain": "active"}}, corpus="es-fr"),
    "the other of two": Case(changes=ONE_OF_TWO, corpus="es-fr", domain="fr"),
}


def test_a_run_that_breaks_a_rule_depends_on_it(tmp_path):
    """Otherwise a rule asks too much, or the test above cannot fail."""
    cases = list(BROKEN.values())
    for name, case, (these, those) in zip(BROKEN, cases, safe_models(tmp_path, cases, 1, resumed=False), strict=True):
        assert case.obstacle(), name
        assert these != those, name


def test_weights_to_start_from(tmp_path):
    """A certified run that starts from the safe model of another run is independent of the text if that one was."""
    for name, first in {"independent": Case(), "dependent": BROKEN["clipping"]}.items():
        safe_models(tmp_path / name, [first], 1, resumed=False)
        smaller = {"model": {"intermediate_size": 9}}  # without the group's neurons
        second = Case(changes=smaller, start=tmp_path / name / "exports0" / "safe")
        [(these, those)] = safe_models(tmp_path / f"{name}-continued", [second], 1, resumed=False)
        assert (second.obstacle() is None) == (these == those) == (name == "independent"), name
