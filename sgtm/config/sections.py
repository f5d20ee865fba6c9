"""The sections of a run's config; sgtm/config/schema.py puts them together.

Every key of a YAML file is a field here; unknown keys are errors. A key has the same name in the code, in the log and
in the report.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from sgtm.config.model import Section
from sgtm.masking.strategy import Joint, Strategy
from sgtm_kernels import current_name
from sgtm_kernels.tables import JointKind

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Members = NonNegativeInt | dict[str, NonNegativeInt | list[NonNegativeInt]]


class MaskingConfig(Section):
    """Who may learn what."""

    domains: list[str] = ["forget"]
    """Names of the dangerous domains; each gets a group of heads and neurons."""
    strategy: Strategy = "sgtm"
    """What forget tokens may update. `sgtm`: the weights of their domain's group alone; `no_mlp_out`, `no_attn_out`,
    `no_out`: also the retain group's output weights, of that sublayer or of both; `gradient_routing`: no gradient
    flows back through the retain group; `activation_masking`: the retain group is off; `gram`: as `sgtm`, with joint
    `strict`; `none`: everything, the unmasked baseline."""
    joint: Joint | list[JointKind] | None = None
    """Joint parameters that forget tokens leave alone besides those of the strategy: `free` (none), `masked`
    (embedding, position, head weight and the blocks' norms, as in the paper's Wikipedia models), `strict` (all), or a
    list of kinds. null: `strict` for gram, `free` for all others."""
    cross_domain: Literal["inactive", "active"] = "inactive"
    """Whether tokens of one domain run with the other domains' groups inactive."""
    overrides: dict[str, float] = {}
    """Single table entries, e.g. `update.forget:bio.retain.mlp_out: 0.1`."""
    partition: Literal["designate", "add", "added"] = "designate"
    """Where the domains' groups come from. `designate`: from the heads and neurons that `model` has. `add`: on top of
    them, as in GRAM: `model.heads`, `model.kv_heads` and `model.intermediate_size` (or `model.experts`) are the retain
    group's, and heads keep their width. `added`: what `add` becomes in the `config.yaml` of a run, whose `model` has
    the widths of all groups together."""
    forget_heads: Members = 1
    """Query heads per layer: a count for every domain, or by domain a count or a list of indices. 0: neurons alone."""
    forget_neurons: Members = 64
    """Neurons per layer, in the same form. 0 where the model has experts."""
    forget_experts: Members = 0
    """Experts per layer, in the same form; 1 if left out where the model has experts, else 0. With its experts a domain
    has their rows of the router: tokens for which its group is inactive cannot choose them."""
    percent: PositiveFloat | dict[str, PositiveFloat] | None = None
    """Percent of each layer's heads and neurons (or experts), in place of forget_heads and forget_neurons (or
    forget_experts); null: those apply."""
    masked_layers: list[NonNegativeInt] | None = None
    """Layers that have groups; null: all."""
    domain_embedding: Literal["none", "full"] | PositiveInt = "none"
    """A part of token embedding and head that belongs to each domain's group, added to the shared matrices where the
    group is active: a whole matrix (`full`), or a product of this rank. With `joint: strict` a domain can learn words
    of its own only with it."""
    certify: bool = False
    """Refuse a config whose safe model depends, in any bit, on what the documents of a domain say. `sgtm explain`
    prints whether it does, and the first reason."""
    span_policy: Literal["conservative", "position"] = "conservative"
    """Labelled spans inside a document: train everything up to the last forget token as forget, or each position as the
    label of the token it predicts. Either way tokens of different labels attend to one another in such a document.
    `position` leaks: the loss of a forget token flows back to the earlier retain positions it reads and updates retain
    weights. `conservative` has no such path, but what follows the last forget token reads it, so its gradient depends
    on the content of the forget text."""

    @model_validator(mode="after")
    def _added_to_every_layer(self):
        if self.partition != "designate" and self.masked_layers is not None:
            raise ValueError(
                f"masked_layers {self.masked_layers}: with partition {self.partition} every layer is wider by the "
                "domains' groups; set masked_layers null, or partition designate"
            )
        return self


class DataConfig(Section):
    """What is read and how it is put together."""

    path: str = "data"
    """Folder written by `sgtm prepare`, or `synthetic`: the embedded bilingual corpus, written on first use."""
    mixing: Literal["step", "micro", "sequence", "token"] = "sequence"
    """Where labels may differ: between optimizer steps, micro-batches, sequences, or inside sequences."""
    micro_blocks: PositiveInt = 4
    """mixing: micro cuts a step into this many label-pure blocks; the accumulation must be a multiple of it."""
    isolate_documents: bool = False
    """Documents in one sequence do not attend to one another, and learned positions restart at 0 in each. Always so
    where labels mix (mixing: token)."""
    channel: dict[str, dict[str, Share]] = {}
    """P(applied label | true label) of a document, by true label; rows left out keep the true label.
    `{retain: {retain: 0.25, unlabeled: 0.75}}` trains 25 % of retain data in retain mode. `open:<domain>` may be
    applied too: the retain group and the domain's run and learn, other domains' do not run. A share trained as
    `retain` buys the ablated model, one with the domain's group running the full model: docs/recipes.md has what each
    row buys and costs."""
    both_ways: bool = False
    """Rows of the channel may sum to more than 1, which trains documents more than once: `{retain: {retain: 1,
    "forget:bio": 0.2}}` trains all of them as retain, and a fifth of them as `forget:bio` as well."""
    schedule: dict[PositiveFloat, dict[str, dict[str, Share]]] = {}
    """Label channels that replace `channel` later in the run, each by where it begins: at a share of `train.steps`
    below 1, or after that many steps. `{0.8: {retain: {"forget:bio": 0.2}}}` is for the last fifth."""
    upsample: dict[str, NonNegativeFloat] = {}
    """How often a category's documents are seen per epoch; 0 leaves it out, fractions are drawn by document."""
    token_filter: Literal["off", "loss", "hide"] = "off"
    """Filter single tokens in place of whole documents, the baseline of Rathi and Radford (arXiv 2601.21571): tokens
    that are trained as `forget:<domain>`, by span or document and after the label channel. `loss`: they are read, but
    are no targets; `hide`: the model reads the EOS id in their place, too. Needs mixing: token, masking.span_policy:
    position and masking.strategy: none, without overrides."""
    seed: NonNegativeInt = 0
    """Of the order of the data and of the label channel's draws."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019) with warm-up and cosine."""

    lr: PositiveFloat = 5e-4
    """Peak of the learning rate, after the warm-up."""
    group_lr: dict[str, PositiveFloat] = {}
    """Factor on the learning rate of a domain's group, e.g. `{bio: 0.5}`, weight decay included; `retain` is the factor
    of the retain group and the joint parameters. Groups that are left out, and those at 1, train as without it."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Of weight matrices and embeddings; norms and biases are not decayed."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0: no clipping."""
    grad_clip_scope: Literal["global", "owner"] = "global"
    """Whose norm: `global`, the whole gradient's. `owner`: one norm of the retain group and the joint parameters, and
    one of each domain's group, so that no domain's gradient changes how another part of the model is clipped, or
    whether it is skipped for not being finite. `max_skipped_steps` then counts the steps that skip the retain group."""
    warmup_steps: NonNegativeInt | Annotated[float, Field(gt=0, lt=1)] = 100
    """Steps of the warm-up, or below 1 their share of `train.steps`, rounded to whole steps."""
    warmup_start: Share = 0.1
    """Share of lr at step 0."""
    final_lr: Share = 0.0
    """Share of lr at the end of the cosine."""
    masked_update: Literal["exact", "zero_grad"] = "exact"
    """`exact`: what no token of a step may update stays bitwise untouched. `zero_grad`: it gets zero gradients, so that
    decay and stale momentum still move it (the reference implementation)."""

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up in a run of `total_steps`."""
        return round(self.warmup_steps * total_steps) if 0 < self.warmup_steps < 1 else int(self.warmup_steps)


class TrainConfig(Section):
    """Length and arithmetic of training."""

    steps: PositiveInt = 1000
    """Global steps, which are updates of the optimizer, from the beginning of the run."""
    tokens_per_step: PositiveInt = 65536
    """Tokens of a global step, over all ranks; the accumulation is derived from it."""
    micro_batch: PositiveInt | None = None
    """Sequences of a micro-batch on one rank. null: the most that divide a rank's share of the step, up to 16,384
    tokens."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; the optimizer's copy of the weights is fp32 either way."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks`: `torch.compile` every transformer block before the first step. Losses then differ by rounding. A CPU
    needs a C++ compiler, CUDA needs Triton and a C compiler. ZeRO 3 gathers all weights of a block at once. The norms
    of groups are then left out of the log, those of the residual stream are in it. Not for family mixtral. `off` is
    the default because the gain on a GPU has not been measured."""
    seed: NonNegativeInt = 0
    """Of the initial weights."""
    init_from: str | None = None
    """Hugging Face folder (GPT-Neo, Llama, Mixtral, or Mistral without a sliding window) whose weights the run
    starts from; `model` must describe that model, whose context may be longer. null: random weights."""
    expert_balance: NonNegativeFloat = 0.0
    """Weight of a loss that spreads the tokens of each label over the experts that are active for it (family mixtral,
    docs/experts.md), e.g. 0.01 as in Switch Transformer, in every layer; 0: none. The logged loss is without it."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations; 0: only at the end."""
    eval_sequences: PositiveInt | Literal["all"] | None = None
    """Sequences per category in an evaluation during training: a number, which split test must have of every category
    that it has at all, or `all`. null: up to 64."""
    eval_removed: list[list[str]] = []
    """Sets of domains to remove in evaluations, e.g. `[[bio, cyber]]`, besides those that every evaluation has: no
    domain, each by itself, and all. Each set costs one pass over the data."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are a multiple of it are kept for good besides; 0: none."""
    async_checkpoint: bool = True
    """Train on while a checkpoint is written; a copy of each rank's state is then held in its host's memory."""
    log_every: PositiveInt = 10
    """Steps from one line of `metrics.jsonl` to the next."""
    max_skipped_steps: NonNegativeInt = 10
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run ends. 0: never."""
    probe_every: NonNegativeInt = 0
    """Steps between measurements of every label's gradient norm on every group, logged as `probe` lines; each takes
    the time of one step for every label in it and changes nothing. 0: none."""

    @property
    def eval_limit(self) -> int | None:
        """Most sequences of a category in an evaluation during training; None: no limit."""
        if self.eval_sequences is None:
            return 64
        return None if self.eval_sequences == "all" else self.eval_sequences


class SteeringConfig(Section):
    """Preventative steering (arXiv 2507.21509), a baseline: a direction of a domain is added to the residual stream
    while the model trains on the domain's tokens, and left out afterwards."""

    direction: str | None = None
    """File that `sgtm direction` has written; null: nothing is added. Its domain must be one of `masking.domains`."""
    layer: NonNegativeInt | None = None
    """Block, counted from 0, behind which it is added; null: the layer that the file has."""
    strength: float = 1.0
    """Multiple of the direction of that layer which is added to every token that is trained as `forget:<domain>`: 1 is
    the difference between the mean activations on forget and on retain text; below 0 subtracts it. 0 adds nothing: the
    log still has the projections on it."""

    @model_validator(mode="after")
    def _check(self) -> SteeringConfig:
        for name in ("layer", "strength"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.direction is None and value != default:
                raise ValueError(f"{name} {value:g} without a direction adds nothing: set direction to a file")
        return self


HOP_BYTES = 1_000_000  # sent in the time that a message takes from one rank to the next


class DistributedConfig(Section):
    """How DeepSpeed shards the run."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over the ranks: 1 the optimizer's state, 2 also gradients, 3 also weights; 0 nothing, but in
    bf16 as 1 does. `sgtm estimate` recommends one."""
    offload_optimizer: bool = False
    """Keep the fp32 weights and both moments in the memory of the host and update them there (ZeRO 1 to 3)."""
    zero_hpz_partition_size: PositiveInt = 1
    """ZeRO++ (ZeRO 3): size of the groups of ranks, as a rule those of a node, that keep the weights of the forward
    pass sharded among themselves, so that the backward pass gathers them inside the node. 1: none."""
    zero_quantized_weights: bool = False
    """ZeRO++ (ZeRO 3, masking.strategy none): gather the weights in 8 bits. Up to 16,000 neighbours share a scale, so
    that an update of one group would change what the model computes with of a frozen one: refused where there is
    something to freeze. Needs CUDA with its compiler; has not been run."""
    zero_quantized_gradients: bool = False
    """ZeRO++'s gradients in 4 bits: always refused. DeepSpeed's kernels (0.19) read fp16, and gradients are bf16 and
    fp32 here; and where a matrix is wider than tall, rows of different groups share a scale."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed over the ranks. Each rank sums its own micro-batches in fp32 either way:
    before the reduction in ZeRO 0 and 1, after it in ZeRO 2 and 3. `bf16` halves the bytes sent but loses accuracy:
    every addition rounds to 8 bits, so the error grows with the number of ranks, and other stages and numbers of ranks
    agree less closely. Frozen weights stay bit-identical and a resumed run is still bitwise the same.
    """
    timeout_minutes: PositiveFloat = 30
    """How long a rank may stay in one phase of a step, as in a collective, before the run ends with a diagnosis."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: ZeRO 0 keeps the optimizer with the weights; set zero_stage 1, 2 or 3")
        if self.zero_quantized_gradients:
            raise ValueError(
                "zero_quantized_gradients: DeepSpeed's kernels for it take fp16 alone, gradients are in bf16 and "
                "fp32 here; set it false"
            )
        for key in ("zero_hpz_partition_size", "zero_quantized_weights"):
            if getattr(self, key) != type(self).model_fields[key].default and self.zero_stage != 3:
                raise ValueError(f"{key}: ZeRO {self.zero_stage} does not have it; set zero_stage 3, or remove the key")
        return self

    def reduces_to_owners(self, numel: int, ranks: int) -> bool:
        """Whether DeepSpeed's ZeRO 1 and 2 reduce each share of a gradient to its owner, not all shares to all ranks.

        That moves half the bytes, but passes all ranks once for each of them: it wins where a share takes longer than
        its way, which is about a megabyte for each rank of it (3 us a hop at 350 GB/s; assumed, not measured).
        """
        return 4 * numel / ranks >= HOP_BYTES * ranks

    def check_ranks(self, world_size: int) -> None:
        """Raises ValueError where the ranks do not divide into the groups of zero_hpz_partition_size."""
        if world_size % self.zero_hpz_partition_size:
            raise ValueError(
                f"distributed.zero_hpz_partition_size {self.zero_hpz_partition_size} does not divide the number of "
                f"ranks {world_size}"
            )


class KernelsConfig(Section):
    """Which implementation of the ops runs."""

    backend: Literal["auto", "reference", "torch", "triton"] = "auto"
    """`auto` follows the environment variable SGTM_KERNELS, else is `triton` on CUDA and `torch` on a CPU; `torch` then
    replaces an op whose Triton kernels fail the self-check before the first step. A named backend never falls back: it
    raises."""
    deterministic: bool = True
    """On CUDA: torch and cuBLAS use deterministic algorithms, which the promises to the bit need; an op without one
    raises. Without it the backward pass of attention in the libraries adds in any order. Our kernels, and everything on
    a CPU, are deterministic always."""

    @field_validator("backend", mode="before")
    @classmethod
    def _current_name(cls, backend: Any) -> Any:
        """Old names too: a run directory keeps its config."""
        return current_name(backend) if isinstance(backend, str) else backend


class WandbConfig(Section):
    """Logging to Weights & Biases, beside `metrics.jsonl`."""

    mode: Literal["off", "offline", "online"] = "off"
    """`offline` writes to `<run>/wandb`, for `wandb sync`; `online` does too where the server does not answer."""
    project: str = "sgtm"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team that the project belongs to; null: the login's own."""
