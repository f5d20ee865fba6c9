"""The config of a run: its sections (sgtm/config/sections.py), what holds across them, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated

from pydantic import Field, model_validator

from sgtm.config.model import ModelConfig, Section
from sgtm.config.reference import Words
from sgtm.config.sections import (
    DataConfig,
    DistributedConfig,
    KernelsConfig,
    MaskingConfig,
    OptimizerConfig,
    SteeringConfig,
    TrainConfig,
    WandbConfig,
)
from sgtm.masking import recipes
from sgtm.masking.certificate import Conditions, check_certified
from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import OPEN, LabelSpace
from sgtm.masking.partition import Partition, added_widths, build_partition
from sgtm.masking.strategy import Joint, build_tables, own_joint, removal_tables
from sgtm.process.names import did_you_mean
from sgtm.words import counted, listed
from sgtm_kernels.tables import JointKind, Tables

RUN_NAME = r"^[\w][\w.+-]*$"
NAME_WORDS = Words("of letters, digits and _ . + -, with a letter, digit or _ first")
DERIVED_TOKENS = 16_384  # of a micro-batch whose size is derived, at most


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=RUN_NAME), NAME_WORDS] = "run"
    """Name of the run; its directory is `<runs>/<name>`."""
    runs: str = "runs"
    """Folder of all run directories."""
    recipe: recipes.Name | None = None
    """Settings that belong together (`paper`, `gram`, `dual`, `certified`): strategy, joint, domain_embedding and
    certify of `masking`, grad_clip_scope of `optimizer`, channel, both_ways and schedule of `data`. Keys that are set
    beside it or above it win; those of a preset or file that is extended give way. With masking.strategy none it sets
    none of them: the unmasked baseline."""
    model: ModelConfig
    masking: MaskingConfig = MaskingConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steering: SteeringConfig = SteeringConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    kernels: KernelsConfig = KernelsConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand_recipe(cls, values):
        if not isinstance(values, dict) or values.get("recipe") not in recipes.NAMES:
            return values
        sections = {name: values.get(name) or {} for name in recipes.KEYS}
        sections = {k: v.model_dump(exclude_unset=True) if isinstance(v, Section) else v for k, v in sections.items()}
        if not all(isinstance(section, dict) for section in sections.values()):
            return values  # an error of the user's, which is found next
        domains = sections["masking"].get("domains", MaskingConfig().domains)
        unmasked = sections["masking"].get("strategy") == "none"
        keys = recipes.recipe(values["recipe"], domains if isinstance(domains, list) else [], unmasked)
        return values | {name: keys[name] | section for name, section in sections.items()}

    @model_validator(mode="before")
    @classmethod
    def _add_groups(cls, values):
        """With masking.partition add: `model` with the widths of all groups, and `added`, which adds nothing again."""
        try:
            masking = MaskingConfig.model_validate(values["masking"])
            model = ModelConfig.model_validate(values["model"])
            space = LabelSpace(tuple(masking.domains))
        except (KeyError, TypeError, ValueError):
            return values  # an error of the user's, which is found next
        if masking.partition != "add":
            return values
        try:
            widths = added_widths(
                space,
                heads=model.heads,
                kv_heads=model.num_kv_heads,
                neurons=model.experts or model.intermediate_size,
                forget_heads=masking.forget_heads,
                forget_neurons=masking.forget_experts if model.experts else masking.forget_neurons,
                percent=masking.percent,
                mlp="forget_experts" if model.experts else "forget_neurons",
            )
        except ValueError as error:
            raise ValueError(f"masking.{error}") from None
        heads: dict[str, int | None] = {}
        if widths.heads > model.heads:
            if model.family == "gpt_neo":
                raise ValueError(
                    f"masking.partition add: family gpt_neo, whose heads are hidden_size / heads wide, has no room for "
                    f"masking.forget_heads {masking.forget_heads} more; set it 0, or model.family llama"
                )
            heads = {"heads": widths.heads, "head_dim": model.size_per_head}
            heads |= {"kv_heads": widths.kv_heads} if model.kv_heads else {}
        width, of_mlp = ("experts", "forget_experts") if model.experts else ("intermediate_size", "forget_neurons")
        sizes = {"forget_heads": widths.forget_heads, of_mlp: widths.forget_neurons, "percent": None}
        return values | {
            "model": model.model_dump(exclude_unset=True) | heads | {width: widths.neurons},
            "masking": masking.model_dump(exclude_unset=True) | {"partition": "added"} | sizes,
        }

    @model_validator(mode="before")
    @classmethod
    def _divide_experts(cls, values):
        """Groups of a model with experts have whole ones: no neurons, and one expert where no count is set."""
        try:
            sections = {name: _as_dict(values[name]) for name in ("model", "masking") if name in values}
        except (TypeError, ValueError):
            return values  # an error of the user's, which is found next
        if sections.get("model", {}).get("family") != "mixtral":
            return values
        return values | {"masking": {"forget_neurons": 0, "forget_experts": 1} | sections.get("masking", {})}

    @model_validator(mode="after")
    def _consistent(self):
        strategy = self.masking.strategy
        if self.distributed.zero_quantized_weights and strategy != "none":
            raise ValueError(
                f"distributed.zero_quantized_weights: with masking.strategy {strategy} frozen weights would not keep "
                "their values, as groups share scales; set it false"
            )
        rank = self.masking.domain_embedding
        if isinstance(rank, int) and rank >= min(self.model.hidden_size, self.model.vocab_size):
            raise ValueError(
                f"masking.domain_embedding {rank} is not below model.hidden_size {self.model.hidden_size} and "
                f"model.vocab_size {self.model.vocab_size}; lower it, or set full"
            )
        self._check_experts()
        if self.distributed.offload_optimizer and self.optimizer.grad_clip_scope == "owner":
            raise ValueError(
                "optimizer.grad_clip_scope owner: with distributed.offload_optimizer DeepSpeed gives norms of whole "
                "parameters alone; set grad_clip_scope global or offload_optimizer false"
            )
        if self.masking.strategy == "gram" and self.masking.cross_domain == "active":
            raise ValueError(
                "masking.cross_domain active: strategy gram has other domains' groups inactive; set inactive, or "
                "another masking.strategy"
            )
        try:
            self.space.removals(self.train.eval_removed)
        except ValueError as error:
            raise ValueError(f"train.eval_removed: {error}") from None
        for group in self.optimizer.group_lr:
            if group not in self.space.groups:
                slip = did_you_mean(group, self.space.groups)
                raise ValueError(
                    f"optimizer.group_lr {group}: no such group{slip}; groups: {', '.join(self.space.groups)}"
                )
        self._check_token_filter()
        if (layer := self.steering.layer) is not None and layer >= self.model.layers:
            raise ValueError(
                f"steering.layer {layer}: the blocks of model.layers {self.model.layers} are 0 to "
                f"{self.model.layers - 1}; take one of them"
            )
        tokens, context = self.train.tokens_per_step, self.model.context
        if tokens % context:
            nearest = [n * context for n in (tokens // context, tokens // context + 1) if n]
            raise ValueError(
                f"train.tokens_per_step {tokens} is not a multiple of model.context {context}; set "
                f"{listed(nearest, 'or')}"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than train.steps {self.train.steps}; "
                f"lower it, or give it as a share of the steps, e.g. --optimizer.warmup_steps 0.1"
            )
        _ = self.space, self.tables, self.partition, self.channels  # their errors are the user's
        check_certified(self.conditions)
        return self

    def _check_experts(self) -> None:
        masking, family = self.masking, self.model.family
        owned, other = ("forget_neurons", "forget_experts")[:: -1 if self.model.experts else 1]
        if _any_members(getattr(masking, other)):
            what = "divides whole experts" if self.model.experts else "has no experts"
            raise ValueError(
                f"masking.{other} {getattr(masking, other)}: family {family} {what}; set it 0, and masking.{owned} in "
                f"its place"
            )
        if (weight := self.train.expert_balance) and not self.model.experts:
            raise ValueError(f"train.expert_balance {weight:g}: family {family} has no experts to balance; set it 0")
        if self.model.experts and self.train.compile != "off":
            raise ValueError(
                f"train.compile {self.train.compile}: the experts of family {family} are not in a graph, as their "
                f"shapes change with the tokens; set it off"
            )

    def _check_token_filter(self) -> None:
        needed: tuple[tuple[str, object, object], ...] = (
            ("data.mixing", self.data.mixing, "token"),
            ("masking.span_policy", self.masking.span_policy, "position"),
            ("masking.strategy", self.masking.strategy, "none"),
            ("masking.overrides", self.masking.overrides, {}),
        )
        wrong = [(f"{key} {value}", f"{key} {right}") for key, value, right in needed if value != right]
        if self.data.token_filter != "off" and wrong:
            values, remedies = map(listed, zip(*wrong, strict=True))
            key = f"data.token_filter {self.data.token_filter}"
            raise ValueError(f"{key} does not go with {values}; set {remedies}, or token_filter off")

    @cached_property
    def space(self) -> LabelSpace:
        labels = {key.split(".")[1] for key in self.masking.overrides if "." in key}
        for rows in (self.data.channel, *self.data.schedule.values()):
            labels |= {*rows, *(label for row in rows.values() for label in row)}
        domains = tuple(self.masking.domains)
        return LabelSpace(domains, tuple(domain for domain in domains if OPEN + domain in labels))

    @cached_property
    def tables(self) -> Tables:
        m = self.masking
        return build_tables(self.space, m.strategy, m.joint, m.cross_domain, m.overrides)

    @property
    def steered(self) -> bool:
        """Whether a direction is added to the residual stream of a domain's tokens."""
        return self.steering.direction is not None and self.steering.strength != 0

    @property
    def removes_groups(self) -> bool:
        """Whether a domain is removed by leaving its group out. Where nothing is masked no group holds a domain, unless
        the weights of `train.init_from` have one; with steering, what is left out then is the direction alone.
        """
        unmasked = self.tables == build_tables(self.space, "none")
        return not unmasked or (self.train.init_from is not None and not self.steered)

    @property
    def removals(self) -> list[tuple[str, ...]]:
        """The sets of domains without which a model is evaluated, the empty one first, all domains last. The empty one
        is the only one where nothing can be removed: neither a group that holds a domain nor a direction.
        """
        return self.space.removals(self.train.eval_removed) if self.removes_groups or self.steered else [()]

    def removal_tables(self, removed: Iterable[str], strengths: Mapping[str, float] | None = None) -> Tables:
        """Tables of an evaluation without these domains; strengths: of others."""
        return removal_tables(self.space, removed, self.removes_groups, strengths)

    def rate_of(self, group: int) -> float:
        """Factor on the learning rate of a group; that of group 0, retain, is also the joint parameters'."""
        return self.optimizer.group_lr.get(self.space.groups[group], 1.0)

    @property
    def joint(self) -> Joint | list[JointKind]:
        """`masking.joint`, as the strategy chooses it where it is not set."""
        joint = self.masking.joint
        return own_joint(self.masking.strategy) if joint is None else joint

    @property
    def method(self) -> str:
        """`strategy sgtm`, with `, recipe dual` where one is set; the unmasked baseline has nothing of a recipe. Also
        `, token filter loss` and `, steering 1` where they are set."""
        recipe = f", recipe {self.recipe}" if self.recipe and self.masking.strategy != "none" else ""
        token_filter = f", token filter {self.data.token_filter}" if self.data.token_filter != "off" else ""
        steering = f", steering {self.steering.strength:g}" if self.steered else ""
        return f"strategy {self.masking.strategy}{recipe}{token_filter}{steering}"

    def spelled_out(self) -> dict:
        """The values as JSON has them, with what other keys decide: `masking.joint`, and `warmup_steps` in steps."""
        values = self.model_dump(mode="json")
        values["masking"]["joint"] = self.joint
        values["optimizer"]["warmup_steps"] = self.optimizer.warmup(self.train.steps)
        return values

    @cached_property
    def partition(self) -> Partition:
        try:
            partition = build_partition(
                self.space,
                layers=self.model.layers,
                heads=self.model.heads,
                kv_heads=self.model.num_kv_heads,
                neurons=self.model.intermediate_size,
                forget_heads=self.masking.forget_heads,
                forget_neurons=self.masking.forget_neurons,
                percent=self.masking.percent,
                masked_layers=self.masking.masked_layers,
                embedding=self.masking.domain_embedding,
                experts=self.model.experts,
                shared_experts=self.model.shared_experts,
                forget_experts=self.masking.forget_experts,
            )
        except ValueError as error:  # begins with the name of an argument, which is the key
            raise ValueError(f"masking.{error}") from None
        for layer in partition.layers if self.model.experts else ():
            if layer.experts[0] < self.model.experts_per_token:
                raise ValueError(
                    f"masking.forget_experts {self.masking.forget_experts} leaves {layer.experts[0]} of model.experts "
                    f"{self.model.experts} to the retain group, below model.experts_per_token "
                    f"{self.model.experts_per_token}, which a model without domains needs; lower it"
                )
        return partition

    @cached_property
    def channels(self) -> tuple[tuple[int, LabelChannel], ...]:
        """(first step, channel), in order of the steps; the first begins at 0."""
        steps, phases = self.train.steps, [(0, self.data.channel, "channel")]
        for begin, rows in sorted(self.data.schedule.items(), key=lambda phase: self._step_of(phase[0])):
            start = self._step_of(begin)
            if start != int(start):
                raise ValueError(f"data.schedule {begin:g} is neither a share below 1 nor a whole number of steps")
            if not phases[-1][0] < start < steps:
                raise ValueError(
                    f"data.schedule {begin:g} begins at step {start:g}, but must begin after step {phases[-1][0]} and "
                    f"before step {steps}"
                )
            phases.append((int(start), rows, f"schedule.{begin:g}"))
        return tuple((start, self._channel(rows, key)) for start, rows, key in phases)

    @property
    def conditions(self) -> Conditions:
        """What decides which domains the run is certified for."""
        return Conditions(
            self.space,
            self.tables,
            self.partition,
            self.channels,
            self.data.upsample,
            clips_by_owner=self.optimizer.grad_clip_scope == "owner",
            deterministic=self.kernels.deterministic,
            certify=self.masking.certify,
            steered=self.steered,
        )

    def _step_of(self, begin: float) -> float:
        return math.ceil(begin * self.train.steps) if begin < 1 else begin

    def _channel(self, rows: dict[str, dict[str, float]], key: str) -> LabelChannel:
        try:
            return LabelChannel.from_rows(self.space, rows, self.data.both_ways)
        except ValueError as error:
            raise ValueError(f"data.{key}: {error}") from None

    @property
    def sequences_per_step(self) -> int:
        return self.train.tokens_per_step // self.model.context

    @property
    def micro_batch(self) -> int:
        """`train.micro_batch` where it is a number: where it is set, and after `for_ranks`."""
        assert self.train.micro_batch is not None, "it follows from the number of ranks: call for_ranks first"
        return self.train.micro_batch

    def for_ranks(self, world_size: int) -> Config:
        """This config with `train.micro_batch` as a number. Raises ValueError where none divides a step."""
        if self.train.micro_batch is not None:
            return self
        blocks = self.data.micro_blocks if self.data.mixing == "micro" else 1
        share, rest = divmod(self.sequences_per_step, world_size * blocks)
        if rest:
            of_blocks = f" x data.micro_blocks {blocks}" if blocks > 1 else ""
            raise ValueError(f"{self._undivided} among {counted(world_size, 'rank')}{of_blocks}")
        most = max(1, DERIVED_TOKENS // self.model.context)
        size = next(n for n in range(min(most, share), 0, -1) if share % n == 0)
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch": size})})

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one rank in a global step; raises ValueError when the arithmetic does not divide."""
        micro_batch = self.for_ranks(world_size).micro_batch
        if self.sequences_per_step < micro_batch:
            raise ValueError(
                f"train.micro_batch {micro_batch} is more than the {counted(self.sequences_per_step, 'sequence')} of a "
                f"step (train.tokens_per_step {self.train.tokens_per_step})"
            )
        if self.sequences_per_step % (micro_batch * world_size):
            raise ValueError(f"{self._undivided} among {counted(world_size, 'rank')} x train.micro_batch {micro_batch}")
        steps = self.sequences_per_step // (micro_batch * world_size)
        if self.data.mixing == "micro" and steps % self.data.micro_blocks:
            raise ValueError(
                f"data.mixing micro: data.micro_blocks {self.data.micro_blocks} does not divide "
                f"{counted(steps, 'accumulation step')}; lower train.micro_batch or data.micro_blocks"
            )
        return steps

    @property
    def _undivided(self) -> str:
        sequences = counted(self.sequences_per_step, "sequence per step does", "sequences per step do")
        return f"train.tokens_per_step {self.train.tokens_per_step}: {sequences} not divide"


def _as_dict(section: Section | dict) -> dict:
    return section.model_dump(exclude_unset=True) if isinstance(section, Section) else dict(section)


def _any_members(members: int | dict) -> bool:
    return any(members.values()) if isinstance(members, dict) else bool(members)
