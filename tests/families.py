"""Tiny models of all families with two domains, and global steps of every mixing: what tests of whole models share."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from sgtm.config.schema import Config, ModelConfig
from sgtm.data.batch import IGNORE, Batch
from sgtm.distributed.segments import full_numel
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition, build_partition
from sgtm.masking.strategy import STRATEGY_TABLES, build_tables
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan, Tables, merge_label_runs

SPACE = LabelSpace(("bio", "code"))
UNLABELED, RETAIN, BIO, CODE = range(4)
CONTEXT, VOCAB = 12, 41

FAMILIES = {
    "gpt_neo": ModelConfig(
        layers=2,
        hidden_size=16,
        heads=4,
        intermediate_size=10,
        vocab_size=VOCAB,
        context=CONTEXT,
        window=5,
        head_bias=True,
        init_std=0.3,
    ),
    "llama": ModelConfig(
        family="llama",
        layers=2,
        hidden_size=16,
        heads=8,
        kv_heads=4,
        head_dim=4,
        intermediate_size=10,
        vocab_size=VOCAB,
        context=CONTEXT,
        tie_embeddings=False,
        init_std=0.3,
    ),
    "mixtral": ModelConfig(
        family="mixtral",
        layers=2,
        hidden_size=16,
        heads=8,
        kv_heads=4,
        head_dim=4,
        intermediate_size=5,
        experts=8,
        experts_per_token=2,
        shared_experts=1,
        vocab_size=VOCAB,
        context=CONTEXT,
        tie_embeddings=False,
        init_std=0.3,
    ),
}
DENSE = [name for name, shape in FAMILIES.items() if not shape.experts]
EXPERTS = {"bio": 3, "code": 2}
"""Experts of the domains, two at least: a token with a single active one has no gradient in the router."""
MIXINGS = ("step", "micro", "sequence", "token")

OPENED = LabelSpace(SPACE.domains, SPACE.domains)
OPEN_BIO, OPEN_CODE = 4, 5

# Every preset, the one that masks nothing last; those of the paper with its masked joint parameters too.
WITH_JOINT = {name: [f"{name}+masked"] for name in ("sgtm", "no_mlp_out", "no_attn_out", "no_out")}
BY_PRESET = [[name, *WITH_JOINT.get(name, [])] for name in sorted(STRATEGY_TABLES, key=lambda name: name == "none")]
STRATEGIES = {
    name: partial(build_tables, SPACE, *name.split("+"))
    for name in (*chain(*BY_PRESET), "sgtm+strict", "gradient_routing+strict")
}
LISTED = ["embedding", "position", "head"]  # the kinds of `+list`
STRATEGIES["no_out+list"] = partial(build_tables, SPACE, "no_out", LISTED)


def partition_of(space: LabelSpace, model: ModelConfig, **masking) -> Partition:
    """`masking`: forget_heads, forget_neurons, forget_experts, masked_layers."""
    return build_partition(
        space,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.num_kv_heads,
        neurons=model.intermediate_size,
        experts=model.experts,
        shared_experts=model.shared_experts,
        **masking,
    )


def model_of(
    family: str,
    backend: str = "torch",
    masked_layers=None,
    seed: int = 0,
    embedding: str | int = "none",
    forget_heads: dict[str, int] | None = None,
    forget_neurons: dict[str, int] | None = None,
    forget_experts: dict[str, int] | None = None,
    **changes,
) -> Transformer:
    """Unequal groups; every parameter random and far from 0, biases and norms included.

    forget_heads  by domain, in KV groups; None: one for each domain
    """
    config = FAMILIES[family].model_copy(update=changes)
    share = config.heads // config.num_kv_heads
    masking = {
        "forget_heads": {domain: share * (forget_heads or {}).get(domain, 1) for domain in SPACE.domains},
        "forget_neurons": forget_neurons or {"bio": 3, "code": 1},
        "forget_experts": forget_experts or forget_neurons or EXPERTS,
        "masked_layers": masked_layers,
        "embedding": embedding,
    }
    partition = partition_of(SPACE, config, **masking)
    torch.manual_seed(seed)
    model = Transformer(config, partition, backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_step(mixing: str, seed: int = 0, label: int = BIO, sequences: int = 2, rows: int = 8) -> list[Batch]:
    """The micro-batches of one global step.

    step      `label` for everything, `sequences` in a micro-batch
    micro     label-pure micro-batches
    sequence  label-pure sequences, sorted: domains, unlabeled, retain
    token     documents isolated, labels change inside the sequences, of which there are `rows` in a micro-batch: with
              three or more there are more runs than ops take as slices
    """
    if mixing == "step":
        pieces = [[(label, CONTEXT)] * sequences] * 2
    elif mixing == "micro":
        pieces = [[(applied, CONTEXT)] * 2 for applied in (BIO, RETAIN, CODE, UNLABELED)]
    elif mixing == "sequence":
        pieces = [[(applied, CONTEXT) for applied in (CODE, BIO, BIO, UNLABELED, RETAIN)]] * 2
    else:
        rng, pieces = random.Random(seed), []
        for _ in range(2):
            order = [rng.sample((UNLABELED, RETAIN, BIO, CODE), 3) for _ in range(rows)]
            lengths = [(5, 1, CONTEXT - 6), (2, 6, CONTEXT - 8)]
            pieces.append([pair for labels in order for pair in zip(labels, rng.choice(lengths), strict=True)])
    batches = [_batch(batch, mixing == "token") for batch in pieces]
    everything = frozenset(applied for batch in batches for applied in batch.labels)
    count = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    batches = [replace(batch, step_targets=count, step_labels=everything) for batch in batches]
    return [with_content(batch, range(len(OPENED.labels)), seed) for batch in batches]


def relabelled(batches: list[Batch], labels: dict[int, int]) -> list[Batch]:
    """The step with other labels for these."""
    return [
        replace(
            batch,
            labels=tuple(labels.get(label, label) for label in batch.labels),
            step_labels=frozenset(labels.get(label, label) for label in batch.step_labels),
        )
        for batch in batches
    ]


def _batch(pieces: list[tuple[int, int]], isolated: bool) -> Batch:
    labels, lengths = zip(*pieces, strict=True)
    rows = sum(lengths) // CONTEXT
    ends = torch.tensor(lengths).cumsum(0)
    documents = tuple((end - n, end) for end, n in zip(ends.tolist(), lengths, strict=True)) if isolated else None
    targets = torch.zeros(rows * CONTEXT, dtype=torch.long)
    if isolated:
        targets[ends - 1] = IGNORE  # nothing is predicted across a document's end
    return Batch(
        torch.zeros(rows, CONTEXT, dtype=torch.long), targets.view(rows, -1), labels, lengths, documents, 0, frozenset()
    )


def with_content(batch: Batch, labels: Iterable[int], seed: int) -> Batch:
    """The batch with other random tokens, and so other targets, wherever the label is one of `labels`."""
    generator = torch.Generator().manual_seed(seed)
    fresh, following = torch.randint(VOCAB, (2, batch.input_ids.numel()), generator=generator)
    ids, targets, start = batch.input_ids.flatten().clone(), batch.targets.flatten().clone(), 0
    for label, length in zip(batch.labels, batch.lengths, strict=True):
        if label in labels:
            ids[start : start + length] = fresh[start : start + length]
            targets[start : start + length - 1] = ids[start + 1 : start + length]
            if batch.documents is None:  # the text goes on in a sequence that is not here
                targets[start + length - 1] = following[start]
        start += length
    return replace(batch, input_ids=ids.view_as(batch.input_ids), targets=targets.view_as(batch.targets))


def plan_of(batch: Batch, tables: Tables) -> MaskPlan:
    return MaskPlan(tables, merge_label_runs(batch.labels, batch.lengths), *batch.input_ids.shape, batch.documents)


def gradients(
    model: Transformer, batches: list[Batch], tables: Tables, balance: float = 0.0
) -> dict[str, torch.Tensor]:
    """Gradient of every parameter, accumulated over the step."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        scale = 1 / batch.step_targets
        loss, _ = model(batch.input_ids, batch.targets, plan_of(batch, tables), scale, balance=balance)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def by_key(model: Transformer, tensors: dict[str, torch.Tensor]) -> dict[tuple[str, str, int], torch.Tensor]:
    """Row ranges of gradients or weights, by (key, parameter, first element)."""
    pieces = {}
    for name, rows in model.parameter_rows().items():
        flat = tensors[name].flatten()
        for start, end, key in rows.segments(flat.numel() // rows.bounds[-1]):
            pieces[key, name, start] = flat[start:end]
    return pieces


def contribution(tables: Tables, key: str, label: int) -> float:
    """Weight of a label's tokens in the gradient of the rows with this key; 0 is what non-interference promises for."""
    if key == "always":
        return 1.0
    if "." in key:
        part, group = key.split(".")
        return tables.contribution(part, label, tables.groups.index(group))
    return max(abs(tables.update_joint[kind][label]) for kind in key.split("+"))


def assert_promise(
    model: Transformer, batches: list[Batch], tables: Tables, before: dict, label: int, balance: float = 0.0
) -> None:
    """New content in one label's tokens changes the gradients `before` where that label contributes, only there."""
    others = [with_content(batch, [label], seed=99) for batch in batches]
    after = by_key(model, gradients(model, others, tables, balance))
    for (key, name, start), old in before.items():
        same = torch.equal(old, after[key, name, start])
        promised = contribution(tables, key, label) == 0
        assert same == promised, f"{name} ({key}): {'changes' if promised else 'does not learn'} with {label}"


def run_config(
    stage: int,
    family: str,
    backend: str,
    mixing: str,
    *,
    strategy: str = "sgtm+masked",
    precision: str = "fp32",
    offload: bool = False,
    grad_clip: float = 0.0,
    embedding: str | int = "none",
    opened: bool = False,
    balance: float = 0.0,
    **changes,
) -> Config:
    """A run whose steps are those of `random_step(mixing)` and whose model is `model_of(family, backend)`.

    opened   with the labels of `OPENED`
    balance  weight of the loss that balances experts
    changes  of the model
    """
    batches, shape = random_step(mixing), FAMILIES[family].model_copy(update=changes)
    name, _, joint = strategy.partition("+")
    sequences = len(batches[0].input_ids)
    return Config.model_validate(
        {
            "model": shape.model_dump(),
            "masking": {
                "domains": list(SPACE.domains),
                "strategy": name,
                "joint": LISTED if joint == "list" else joint or None,
                "forget_heads": shape.heads // shape.num_kv_heads,
                **({"forget_experts": EXPERTS} if shape.experts else {"forget_neurons": {"bio": 3, "code": 1}}),
                "domain_embedding": embedding,
            },
            "optimizer": {"lr": 1e-2, "warmup_steps": 0, "grad_clip": grad_clip},
            "train": {
                "steps": 8,
                "tokens_per_step": len(batches) * sequences * CONTEXT,
                "micro_batch": sequences,
                "precision": precision,
                "expert_balance": balance,
            },
            "data": {
                "mixing": mixing,
                "micro_blocks": 2,
                "channel": {"retain": {f"open:{domain}": 0.1 for domain in OPENED.opened}} if opened else {},
            },
            "kernels": {"backend": backend},
            "distributed": {"zero_stage": stage, "offload_optimizer": offload},
        }
    )


def state_of(engine) -> dict:
    """Weights and moments of an engine by (key, (what, parameter, first element)); 0 where another rank owns them."""
    state = {}
    numels = {name: full_numel(p) for name, p in engine.module.named_parameters()}
    for what in ("weight", "exp_avg", "exp_avg_sq"):
        flat = {name: torch.zeros(numel) for name, numel in numels.items()}
        for tensor, offset, name, start, end in engine.fragments:
            source = tensor if what == "weight" else engine.optimizer.state[tensor][what]
            flat[name][start:end] = source.detach().reshape(-1)[offset : offset + end - start]
        for (key, name, start), piece in by_key(engine.module, flat).items():
            state[key, (what, name, start)] = piece
    return state
