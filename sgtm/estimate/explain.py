"""`sgtm explain`: what a config does, as tables to read before a run is paid for.

The counts come from the model itself, built on the meta device: rows and their keys from `parameter_rows()`, what a
label may update from `live_keys`, the same two that the optimizer freezes by. `tests/unit/test_explain.py` counts a
small model by hand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sgtm.config.schema import Config
from sgtm.data.loader import check_corpus, check_domains_trained
from sgtm.data.open import open_corpus
from sgtm.data.store import Corpus
from sgtm.data.summary import category_counts, trained_categories
from sgtm.estimate import roles
from sgtm.estimate.stages import accumulation
from sgtm.masking.certificate import obstacle
from sgtm.masking.channel import LabelChannel, row_lines
from sgtm.masking.labels import MANY, OPEN
from sgtm.masking.partition import ENDS
from sgtm.masking.recipes import recipe
from sgtm.model.rows import ALWAYS, live_keys
from sgtm.model.transformer import Transformer
from sgtm.training.start import export_record
from sgtm.words import counted
from sgtm_kernels.tables import PROJECTIONS

LEGEND = (
    "attn_in: Wq Wk Wv; attn_out: Wo; mlp_in: W1, or gate and up; mlp_out: W2, or down; in-side biases, and rows of "
    "a router, with them"
)
NOTHING = "-"


@dataclass(frozen=True)
class Explanation:
    """Parameters by row key, and which of them each label may update.

    counts   number of parameters of each key, in the order of the model
    updates  by label, the keys that a token of it may update
    """

    config: Config
    counts: dict[str, int]
    updates: dict[str, frozenset[str]]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def updated(self, label: str) -> int:
        """Number of parameters that tokens of this label may update."""
        return sum(count for key, count in self.counts.items() if key in self.updates[label])

    def owned(self, group: str) -> int:
        """Number of parameters that belong to the group: what removing it takes out of the model."""
        return sum(count for key, count in self.counts.items() if key.partition(".")[2] == group)


def explain(config: Config) -> Explanation:
    """Count the model of `config` without allocating it."""
    with torch.device("meta"):
        model = Transformer(config.model, config.partition, "reference")
    counts: Counter[str] = Counter()
    rows = model.parameter_rows()
    for name, parameter in model.named_parameters():
        for start, end, key in rows[name].segments(parameter.numel() // parameter.shape[0]):
            counts[key] += end - start
    order = sorted(counts, key=lambda key: _rank_of_key(key, config.partition.groups))
    updates = {label: live_keys(config.tables, [i]) for i, label in enumerate(config.space.labels)}
    return Explanation(config, {key: counts[key] for key in order}, updates)


def _rank_of_key(key: str, groups: tuple[str, ...]) -> tuple:
    """Groups in their order with their projections, then the joint parameters, then what has no groups."""
    projection, _, group = key.partition(".")
    if group:
        return (0, groups.index(group), (*PROJECTIONS, *ENDS).index(projection))
    return (2,) if key == ALWAYS else (1, key)


def print_explanation(config: Config, console: Console | None = None) -> None:
    """Model and arithmetic, partition, forward pass, updates and label channel, each as a table; what each row of the
    channel buys and costs, and a line on the data. Raises ValueError for data that do not fit, before any of it."""
    console = console or Console()
    data = data_line(config)
    explanation, strategy = explain(config), config.masking.strategy
    many = _many(explanation, console)
    for table in (
        _model_table(explanation),
        _partition_table(explanation),
        _forward_table(config, many),
        _updates_table(explanation, many),
    ):
        _print(console, table)
    for start, channel in config.channels:
        shown = config.data.channel or start
        if shown:
            _print(console, _channel_table(config, start, channel, many))
        lines = row_lines(channel, config.tables, strategy) if shown or strategy != "none" else []
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    for line in certificate_lines(config):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(data, highlight=False, soft_wrap=True, markup=False)


def _print(console: Console, table: Table) -> None:
    """Title and caption as lines of their own: a table wraps them to its width."""
    title, caption = table.title, table.caption
    table.title = table.caption = None
    console.print(title, style="table.title", highlight=False, soft_wrap=True)
    console.print(table)
    if caption:
        console.print(caption, style="table.caption", highlight=False, soft_wrap=True)


def certificate_lines(config: Config) -> list[str]:
    """Of which domains the safe model is independent, and for each other one the first reason why not.

    By the labels of the corpus, or where it cannot be read by those that the config names. No lines where nothing is
    masked, as no group can be removed then.
    """
    if not config.removes_groups:
        return []
    initial = export_record(config)

    def reasons_of(config: Config) -> dict[str, str | None]:
        try:
            corpus = open_corpus(config, "sizes", write=False)
            known = trained_categories(corpus), bool(len(corpus.spans)), initial
            return {domain: obstacle(config.conditions, domain, *known) for domain in config.space.domains}
        except (ValueError, OSError):
            return {domain: obstacle(config.conditions, domain, initial=initial) for domain in config.space.domains}

    reasons = reasons_of(config)
    remedied = reasons_of(other) if any(reasons.values()) and (other := _with_recipe(config, "certified")) else reasons
    independent = [domain for domain, reason in reasons.items() if reason is None]
    lines = [f"safe model independent of: {', '.join(independent)}"] if independent else []
    for domain, reason in reasons.items():
        if reason:
            remedy = "" if remedied[domain] else "; `recipe: certified` would make it independent"
            lines.append(f"safe model depends on {domain}: {reason}{remedy}")
    return lines


def _with_recipe(config: Config, name: str) -> Config | None:
    """The config with all keys that a recipe sets; None where it does not fit them."""
    values: dict = config.model_dump() | {"recipe": name}
    for section, own in recipe(name, config.space.domains).items():
        values[section] |= own
    try:
        return Config.model_validate(values)
    except ValueError:
        return None


def data_line(config: Config) -> str:
    """Whether the corpus is there, and how often the run goes through it; file sizes alone are checked.

    Raises ValueError for one that does not fit the config, with which `sgtm train` would refuse it.
    """
    try:
        corpus = open_corpus(config, "sizes", write=False)
    except (ValueError, OSError) as error:
        written = config.data.path == "synthetic"
        return "data: synthetic, which `sgtm train` writes" if written else f"data: {error}"
    try:
        check_corpus(corpus, config)
        check_domains_trained(corpus, config)
    except ValueError as error:
        raise ValueError(f"data do not fit: {error}") from None
    passes = dict(zip(config.space.labels, config.channels[0][1].matrix.sum(1), strict=True))
    counts, labels = corpus.manifest.counts["train"], corpus.manifest.categories
    tokens = round(sum(count.tokens * passes[labels[category]] for category, count in counts.items()))
    taken = config.train.steps * config.train.tokens_per_step
    has = f"{corpus.path} has {counted(tokens, 'token')} in split train"
    return f"data: {has}; the run takes {taken:,}, {taken / tokens:.2f} epochs{_filtered(config, corpus, tokens)}"


def _filtered(config: Config, corpus: Corpus, tokens: int) -> str:
    """What the token filter takes of this many tokens, under the first label channel; empty without one."""
    token_filter, (_, channel) = config.data.token_filter, config.channels[0]
    if token_filter == "off":
        return ""
    shares = channel.matrix[:, config.space.forget_labels].sum(1)
    counts = category_counts(corpus)["train"].items()
    taken = round(sum(count.tokens * shares[config.space.label(corpus.categories[name])] for name, count in counts))
    does = "have no loss" + (" and are read as EOS" if token_filter == "hide" else "")
    return f"; data.token_filter {token_filter}: {counted(taken, 'forget token')} ({taken / tokens:.1%}) {does}"


def _model_table(explanation: Explanation) -> Table:
    config, model, train = explanation.config, explanation.config.model, explanation.config.train
    table = Table(title=f"{config.name}: model and step", show_header=False, title_justify="left")
    kv = f", {counted(model.kv_heads, 'KV head')}" if model.kv_heads else ""
    layers, heads = counted(model.layers, "layer"), counted(model.heads, "head")
    shape = f"{layers} x {model.hidden_size}, {heads}{kv}, {_mlp(config)}"
    table.add_row("model", f"{model.family}, {shape}")
    table.add_row("parameters", f"{explanation.total:,} ({_embedding_share(explanation):.0%} token embedding and head)")
    sequences = counted(config.sequences_per_step, "sequence")
    table.add_row("step", f"{train.tokens_per_step:,} tokens = {sequences} of {model.context:,}")
    table.add_row("accumulation", _accumulation(config))
    total = train.steps * train.tokens_per_step
    steps = counted(train.steps, "step")
    table.add_row("training", f"{steps} = {total:,} tokens, {total / explanation.total:.1f} per parameter")
    masking = config.masking
    joint = config.joint if isinstance(config.joint, str) else ", ".join(config.joint)
    table.add_row("recipe", config.recipe if config.recipe and masking.strategy != "none" else NOTHING)
    table.add_row("masking", f"strategy {masking.strategy}, joint {joint}, mixing {config.data.mixing}")
    table.add_row("embedding", f"of a domain's own: {masking.domain_embedding}")
    rates = [f"{group} x {rate:g}" for group, rate in config.optimizer.group_lr.items()]
    table.add_row("learning rate", ", ".join([f"{config.optimizer.lr:g}", *rates]))
    table.add_row("clipping", f"norm {config.optimizer.grad_clip:g}, {config.optimizer.grad_clip_scope}")
    return table


def _mlp(config: Config) -> str:
    model, balance = config.model, config.train.expert_balance
    neurons = counted(model.intermediate_size, "neuron")
    if not model.experts:
        return neurons
    shared = f" and {model.shared_experts} shared" if model.shared_experts else ""
    balanced = f", balanced with weight {balance:g}" if balance else ""
    return f"{model.experts} experts of {neurons}, {model.experts_per_token} per token{shared}{balanced}"


def _embedding_share(explanation: Explanation) -> float:
    return (
        sum(count for key, count in explanation.counts.items() if {"embedding", "head"} & set(key.split("+")))
        / explanation.total
    )


def _accumulation(config: Config) -> str:
    """Micro-batches per rank for the world sizes up to 64 that divide the step. Raises ConfigError where none does."""
    fits, fixed = [], config.train.micro_batch
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        try:
            size = "" if fixed else f" of {config.for_ranks(ranks).micro_batch}"
            fits.append((f"{config.accumulation(ranks)}{size}", ranks))
        except ValueError:
            continue
    micro = "micro-batches" + (f" of {counted(fixed, 'sequence')}" if fixed else "")
    if not fits:
        accumulation(config, 1)  # it names what would
    *most, (last, ranks) = fits
    shown = [f"{number} on {count}" for number, count in most] + [f"{last} on {counted(ranks, 'rank')}"]
    return f"{micro}: {', '.join(shown)}"


def _partition_table(explanation: Explanation) -> Table:
    config = explanation.config
    masked = [i for i in range(config.model.layers) if config.partition.masked(i)]
    added = ", added to those of the retain group" if config.masking.partition == "added" else ""
    layers = f"{len(masked)} of {counted(config.model.layers, 'layer')}"
    table = Table(title=f"groups, in {layers}{added}", title_justify="left")
    experts = ("experts",) if config.model.experts else ()
    for column in ("group", "heads", "KV heads", *experts, "neurons", "parameters", "share"):
        table.add_column(column, justify="left" if column == "group" else "right")
    layer = config.partition.layers[masked[0]] if masked else None
    for g, group in enumerate(config.partition.groups):
        columns = (layer.heads, layer.kv_heads, *((layer.experts,) if experts else ()), layer.neurons) if layer else ()
        sizes = [column[g] for column in columns] or ["all"] * (3 + len(experts))
        owned = explanation.owned(group)
        table.add_row(group, *map(str, sizes), f"{owned:,}", f"{owned / explanation.total:.1%}")
    joint = explanation.total - sum(explanation.owned(group) for group in config.partition.groups)
    table.add_row("joint, of no group", *[""] * (3 + len(experts)), f"{joint:,}", f"{joint / explanation.total:.1%}")
    return table


def _many(explanation: Explanation, console: Console) -> bool:
    """Whether there are several domains, and a column for each would be too wide."""
    domains = len(explanation.config.space.domains)
    table = _updates_table(explanation, False) if 1 < domains <= MANY else None
    if table is not None:
        table.title = table.caption = None
        return Measurement.get(console, console.options.update(width=10**6), table).maximum > console.width
    return domains > MANY


def _forward_table(config: Config, many: bool) -> Table:
    """`active` and `route`: which groups run for the tokens of a label, and whether gradients pass through them."""
    title, labels = "forward pass: does the group run, do gradients flow through it", config.space.labels

    def cell(label: int, group: int) -> str:
        active, route = config.tables.active[label][group], config.tables.route[label][group]
        gradients = {0.0: ", gradients stop", 1.0: ""}.get(route, f", gradients x {route:g}")
        runs = "runs" if active == 1 else f"runs x {active:g}"
        return runs + gradients if active else "off"

    if many:
        return roles.forward_table(title, labels, config.space.groups, cell)
    table = Table(title=title, title_justify="left")
    table.add_column("group")
    for name in labels:
        table.add_column(name)
    for g, group in enumerate(config.space.groups):
        table.add_row(group, *(cell(label, g) for label in range(len(labels))))
    return table


def _updates_table(explanation: Explanation, many: bool) -> Table:
    """Rows of the model by key; a cell is the weight of a token's contribution, or nothing."""
    config, labels = explanation.config, explanation.config.space.labels
    title = "updates: which parameters a token of each label may change"
    if many:
        return roles.updates_table(
            title, LEGEND, labels, explanation.counts, lambda key, label: _weight(config, key, label), _joint_name
        )
    table = Table(title=title, title_justify="left", caption=LEGEND)
    table.add_column("parameters")
    table.add_column("number", justify="right", no_wrap=True)
    for label in labels:
        table.add_column(label, justify="center", overflow="fold")
    previous = None
    for key, count in explanation.counts.items():
        projection, _, group = key.partition(".")
        if previous is not None and group != previous:
            table.add_section()
        previous = group
        name = f"{group} {projection}" if group else _joint_name(key)
        table.add_row(name, f"{count:,}", *(_weight(config, key, label) for label in range(len(labels))))
    table.add_section()
    table.add_row("may update", "", *(f"{explanation.updated(label):,}" for label in labels))
    table.add_row(
        "share of the model", "", *(f"{explanation.updated(label) / explanation.total:.1%}" for label in labels)
    )
    return table


def _joint_name(key: str) -> str:
    return "layers without groups" if key == ALWAYS else f"joint {key}"


def _weight(config: Config, key: str, label: int) -> str:
    """`yes`, the weight where it is not 1, or nothing; both for a tied matrix that is updated at one end only."""
    tables = config.tables
    if key == ALWAYS:
        return "yes"
    projection, _, group = key.partition(".")
    if group:
        weights = {tables.contribution(projection, label, tables.groups.index(group))}
    else:
        weights = {tables.update_joint[kind][label] for kind in key.split("+")}
    texts = [{0.0: NOTHING, 1.0: "yes"}.get(weight, f"x {weight:g}") for weight in sorted(weights)]
    return " / ".join(texts)


def _channel_table(config: Config, start: int, channel: LabelChannel, many: bool) -> Table:
    since = f" from step {start} on" if len(config.channels) > 1 else ""
    title = f"label channel{since}: what documents of a true label are trained as"
    labels = config.space.labels
    if many:
        return roles.channel_table(title, labels, lambda true, label: float(channel.matrix[true][label]))
    table = Table(title=title, title_justify="left")
    table.add_column("true label")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for label, row in zip(labels, channel.matrix, strict=True):
        if not label.startswith(OPEN):  # no corpus has it as a true label
            table.add_row(label, *(f"{share:.0%}" if share else NOTHING for share in row))
    return table
