"""The order of training data: a pure function of (seed, step).

An epoch is a permutation of label-pure *blocks* of sequences: one sequence for mixing `sequence` and `token`, a whole
step for `step`, the share of one of `micro_blocks` for `micro`. Epoch follows epoch without a gap, and a global step
takes the next blocks. There is no iterator state: step 1000 of a resumed run is step 1000.

Every epoch packs its documents again (packing.py). Each epoch has as many blocks as the first: where a fractional
`data.upsample` draws a few tokens less, the first sequences of its order come again at the end; where it draws more,
the last are left out. Where the label channel changes (`data.schedule`) another order takes over, at the same number of
blocks; it is a permutation of its own, so documents of the epoch in progress may come a second time or not at all.

The promise: the set of sequences in a global step is the same for any number of ranks and any micro-batch, and so are
its targets and labels, which every rank computes without reading the others' tokens (`tests/unit/test_data_loader.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from sgtm.config.schema import Config
from sgtm.config.sections import DataConfig
from sgtm.data.batch import Batch, Owners
from sgtm.data.evaluation import sequences_of
from sgtm.data.packing import Piece, Sequence, Stream, check_upsample, derived_seed, pack, shuffled
from sgtm.data.store import Corpus
from sgtm.data.summary import labels_of, trained_categories
from sgtm.masking.certificate import check_certified
from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import RETAIN, UNLABELED
from sgtm.words import counted

_EPOCH_BLOCKS, _EPOCH_SEQUENCES = 3, 8  # + label
PAD_MULTIPLE = 128


class SequenceRef(NamedTuple):
    """A sequence: its stream (the applied label, None for mixing `token`), the epoch, and its number in the stream."""

    stream: int | None
    epoch: int
    sequence: int


Streams = dict[int | None, Stream]


class Order:
    """The sequences of every global step under one label channel, for any number of ranks.

    pack      streams of an epoch, by applied label, or one under None for mixing `token`
    per_step  sequences of a global step
    labels    names of the labels
    streams   those of the first epoch
    block     sequences of a label-pure block

    Raises ValueError where a label has too few sequences for a block, or all together for a step, or where
    `data.token_filter` leaves no target in an epoch.
    """

    def __init__(self, pack: Callable[[int], Streams], data: DataConfig, per_step: int, labels: tuple[str, ...]):
        self.streams, self.seed = pack(0), data.seed
        self._pack = lru_cache(maxsize=2)(lambda epoch: pack(epoch) if epoch else self.streams)
        self.per_step = per_step
        self.block = {"micro": per_step // data.micro_blocks, "step": per_step}.get(data.mixing, 1)
        self._check_enough(data.mixing, labels)
        if data.token_filter != "off":
            self._check_targets(data.token_filter)
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    @property
    def blocks_per_epoch(self) -> int:
        return sum(stream.sequences // self.block for stream in self.streams.values())

    def sequences(self, step: int) -> list[SequenceRef]:
        """The sequences of a global step, block after block."""
        per_epoch, per_step = self.blocks_per_epoch, self.per_step // self.block
        refs: list[SequenceRef] = []
        for number in range(step * per_step, (step + 1) * per_step):
            epoch, position = divmod(number, per_epoch)
            refs += self._block(epoch, position)
        return refs

    def count_targets(self, refs: list[SequenceRef]) -> int:
        sequences = defaultdict(list)
        for ref in refs:
            sequences[ref.stream, ref.epoch].append(ref.sequence)
        return sum(self._stream(*of).target_count(np.array(numbers)) for of, numbers in sequences.items())

    def find_labels(self, refs: list[SequenceRef]) -> frozenset[int]:
        if None not in self.streams:
            return frozenset(ref.stream for ref in refs if ref.stream is not None)
        return frozenset(piece.label for ref in refs for piece in self.pieces(ref))

    def pieces(self, ref: SequenceRef) -> list[Piece]:
        return self._stream(ref.stream, ref.epoch).pieces(ref.sequence)

    def read(self, ref: SequenceRef) -> Sequence:
        return self._stream(ref.stream, ref.epoch).read(ref.sequence)

    def _stream(self, label: int | None, epoch: int) -> Stream:
        """That of the first epoch where a label has drawn less than a sequence."""
        stream = self._pack(epoch).get(label)
        return stream if stream and stream.sequences else self.streams[label]

    def _block(self, epoch: int, position: int) -> list[SequenceRef]:
        blocks, sequences = self._epoch(epoch)
        index = int(blocks[position])
        for label, stream in self.streams.items():
            count = stream.sequences // self.block
            if index < count:
                chosen = sequences[label][index * self.block : (index + 1) * self.block]
                return [SequenceRef(label, epoch, int(sequence)) for sequence in chosen]
            index -= count
        raise AssertionError(f"epoch {epoch} has no block {position}")

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, dict[int | None, np.ndarray]]:
        """The order of an epoch's blocks, and by label the order of the sequences they are cut from."""
        sequences = {}
        for label, first in self.streams.items():
            seed = derived_seed(self.seed, _EPOCH_SEQUENCES + (label or 0), epoch)
            sequences[label] = np.resize(shuffled(self._stream(label, epoch).sequences, seed), first.sequences)
        return shuffled(self.blocks_per_epoch, derived_seed(self.seed, _EPOCH_BLOCKS, epoch)), sequences

    def _check_enough(self, mixing: str, labels: tuple[str, ...]) -> None:
        for label, stream in self.streams.items():
            name = "split train" if label is None else f"label {labels[label]} in split train"
            if stream.sequences < self.block:
                lower = "train.tokens_per_step" if self.block > 1 else "model.context"
                raise ValueError(
                    f"{name} has {counted(stream.sequences, 'sequence')} of {stream.context} tokens; data.mixing "
                    f"{mixing} needs {self.block} in a block: add data, upsample it, or lower {lower}"
                )
        available = self.blocks_per_epoch * self.block
        if available < self.per_step:
            context = next(iter(self.streams.values())).context
            raise ValueError(
                f"split train has {counted(available, 'sequence')} of {context} tokens, fewer than the {self.per_step} "
                f"of a step; add data, or lower train.tokens_per_step"
            )

    def _check_targets(self, token_filter: str) -> None:
        stream = self.streams[None]
        if not any(stream.target_count(np.array([sequence])) for sequence in range(stream.sequences)):
            raise ValueError(
                f"data.token_filter {token_filter} leaves no target in split train of {stream.corpus.path}: all tokens "
                f"are trained as forget:<domain>; add other data, or change data.channel or data.upsample"
            )


class Loader:
    """Micro-batches of one rank.

    corpus  with a split `train`
    config  model, masking, data and train decide what a step is

    Raises ValueError where corpus and config do not fit (`check_corpus`), or as of `Order`.
    """

    def __init__(self, corpus: Corpus, config: Config, rank: int = 0, world_size: int = 1):
        check_corpus(corpus, config)
        config = config.for_ranks(world_size)
        config.accumulation(world_size)  # raises where it does not divide
        self.rank, self.world_size = rank, world_size
        self.per_step, self.micro_batch = config.sequences_per_step, config.micro_batch
        self.micro_blocks = config.data.micro_blocks if config.data.mixing == "micro" else 1
        self.isolated = isolates_documents(config.data)
        self.forget_labels = config.space.forget_labels
        self.orders: list[tuple[int, Order]] = []
        for start, channel in config.channels:
            pack = partial(_streams, corpus, config, channel, self.isolated)
            self.orders.append((start, Order(pack, config.data, self.per_step, config.space.labels)))
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="sgtm-loader")
        self._ahead: tuple[int, Future] | None = None

    def order(self, step: int) -> Order:
        """The order in use at a step: that of the channel which began last."""
        return [order for start, order in self.orders if start <= step][-1]

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a global step, in order of accumulation; begins to read the next step."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = step + 1, self._prefetcher.submit(self._read, step + 1)
        return batches

    def step_targets(self, step: int) -> int:
        """Number of targets in the global step, over all ranks."""
        return self.order(step).count_targets(self.sequences(step))

    def step_labels(self, step: int) -> frozenset[int]:
        """Applied labels in the global step, over all ranks."""
        return self.order(step).find_labels(self.sequences(step))

    def sequences(self, step: int) -> list[SequenceRef]:
        """The sequences of a global step, block after block; the same for any number of ranks and any micro-batch."""
        return self.order(step).sequences(step)

    def micro_batches(self, step: int, rank: int) -> list[list[SequenceRef]]:
        """The sequences of each micro-batch of a rank, ordered forget, open, unlabeled, retain.

        A block of mixing `micro` has accumulation indices of its own; for the other mixings the step is one pool. A
        pool is sorted by label and dealt out like cards, so that every micro-batch gets an even share of each label.
        """
        step_sequences = self.sequences(step)
        size = self.per_step // self.micro_blocks
        micro_batches = []
        for first in range(0, self.per_step, size):
            pool = sorted(step_sequences[first : first + size], key=self._label_order)
            hands = size // self.micro_batch
            micro_batches += [pool[hand::hands] for hand in range(rank, hands, self.world_size)]
        return micro_batches

    def documents(self, step: int, rank: int, micro_batch: int) -> list[int]:
        """Positions in the corpus of the documents in a micro-batch of any rank, in order; reads no token."""
        refs, order = self.micro_batches(step, rank)[micro_batch], self.order(step)
        pieces = (piece for ref in refs for piece in order.pieces(ref))
        return list(dict.fromkeys(piece.document for piece in pieces))

    def _read(self, step: int) -> list[Batch]:
        order, everything = self.order(step), self.sequences(step)
        targets, labels = order.count_targets(everything), order.find_labels(everything)
        return [
            collate([order.read(ref) for ref in refs], self.isolated, targets, labels)
            for refs in self.micro_batches(step, self.rank)
        ]

    def _label_order(self, ref: SequenceRef) -> tuple[int, int]:
        """forget (highest domain first), open, unlabeled, retain; the order within a label stays."""
        label = ref.stream
        if label is None:
            return 0, 0
        return {UNLABELED: 2, RETAIN: 3}.get(label, int(label not in self.forget_labels)), -label


def _streams(corpus: Corpus, config: Config, channel: LabelChannel, isolated: bool, epoch: int) -> Streams:
    return pack(
        corpus,
        corpus.select("train"),
        config.space,
        channel,
        seed=config.data.seed,
        context=config.model.context,
        mixing=config.data.mixing,
        epoch=epoch,
        upsample=config.data.upsample,
        isolate_documents=isolated,
        span_policy=config.masking.span_policy,
        token_filter=config.data.token_filter,
    )


def evaluation_batches(
    corpus: Corpus,
    config: Config,
    split: str,
    category: str,
    *,
    max_sequences: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Micro-batches of one category of one split, under its true label; the same on every call.

    Documents come in a fixed shuffled order, packed as in training. Every rank gets the same number of batches, because
    under ZeRO-3 a forward pass is a collective; what has no next token, padding included, has target `IGNORE`.
    `step_targets` is the number of targets of the whole evaluation, over all ranks: a mean loss is the sum of the
    losses divided by it, and `owners` has the document of each target.

    A category's loss is of that category's tokens alone. Documents with labelled spans are read where they have any, in
    a span or outside; tokens of other categories are read and have target `IGNORE`. Where no token of this category is
    in the split there are no batches. `data.token_filter` takes nothing out of an evaluation.

    Raises ValueError for a split or category that the corpus does not have.
    """
    isolated = isolates_documents(config.data)
    read = sequences_of(corpus, split, category, config.model.context, isolated, max_sequences)
    if not read.numbers:
        return
    micro_batch, label = config.for_ranks(1).micro_batch, config.space.label(corpus.categories[category])
    count, stride = len(read.numbers), micro_batch * world_size
    owned = int(read.stream.owners([read.numbers[-1]])[0, -1]) + 1
    for first in range(rank * micro_batch, -(-count // stride) * stride, stride):
        positions = range(first, first + micro_batch)
        sequences = [read.sequence(position, label) for position in positions]
        batch = collate(sequences, read.stream.isolated, read.targets, frozenset({label}))
        owners = read.stream.owners([read.number(position) for position in positions])
        owners = np.minimum(owners, owned - 1)  # of padding: any
        yield replace(batch, owners=Owners(torch.from_numpy(owners), owned))


def isolates_documents(data: DataConfig) -> bool:
    return data.isolate_documents or data.mixing == "token"


def check_corpus(corpus: Corpus, config: Config) -> None:
    """Raises ValueError where the corpus lacks a split or a category of `data.upsample`, or does not fit the model's
    vocabulary, the domains or `masking.certify`."""
    for split in ("train", "test"):
        if split not in corpus.manifest.splits:
            raise ValueError(
                f"{corpus.path} has no split {split!r}, its splits are {', '.join(corpus.manifest.splits)}; training "
                f"reads train and evaluation test. A rule such as split: {{hash: {{test: 0.05}}}} makes both"
            )
    vocab, wanted = corpus.vocab_size, config.model.vocab_size
    padded = -(-vocab // PAD_MULTIPLE) * PAD_MULTIPLE
    folder = config.train.init_from
    if folder and vocab > wanted:
        raise ValueError(
            f"model.vocab_size is {wanted}, but the tokenizer of {corpus.path} has {vocab} entries; to start from "
            f"train.init_from {folder}, prepare the data with its tokenizer: --tokenizer {folder}"
        )
    if not folder and not vocab <= wanted <= padded:  # a folder's model may be padded to any size
        raise ValueError(
            f"model.vocab_size is {wanted}, but the tokenizer of {corpus.path} has {vocab} entries; train with "
            f"--model.vocab_size {vocab}{f' (up to {padded} is fine)' if padded > vocab else ''}, or prepare the data "
            f"again with a tokenizer of {wanted} entries: --vocab-size {wanted}"
        )
    corpus.label_of_category(config.space)
    check_upsample(corpus, config.data.upsample)
    check_certified(config.conditions, trained_categories(corpus), bool(len(corpus.spans)))
    for domain in config.masking.domains:
        if f"forget:{domain}" not in corpus.categories.values():
            labels = ", ".join(sorted(set(corpus.categories.values())))
            raise ValueError(
                f"masking.domains names {domain!r}, but no category of {corpus.path} is labelled forget:{domain}; "
                f"its labels are {labels}"
            )


def check_domains_trained(corpus: Corpus, config: Config) -> None:
    """Raises ValueError where a masked run has a domain without training text: split train has none of its own, or
    `data.upsample` leaves that out, and the label channel makes no other text its own."""
    if config.masking.strategy == "none":
        return
    categories = trained_categories(corpus)
    taken = {label for category, label in categories.items() if config.data.upsample.get(category, 1)}
    applied = _applied(config, taken)
    for domain in config.masking.domains:
        label = f"forget:{domain}"
        if label not in taken and not applied[config.space.label(label)]:
            left_out = [category for category, its in categories.items() if its == label]
            why = f"data.upsample leaves out {', '.join(left_out)}" if left_out else "split train has no text of it"
            raise ValueError(
                f"the masks of {domain} have nothing to train on in {corpus.path}: {why}; add text, or for a model "
                f"that never sees {domain} train without masks: --masking.strategy none"
            )


def only_forget(corpus: Corpus, config: Config) -> bool:
    """Whether a masked run would train on nothing that is retain or unlabeled, after the label channel."""
    applied = _applied(config, labels_of(corpus, "train"))
    applied[config.space.forget_labels] = 0
    return config.masking.strategy != "none" and not applied.any()


def _applied(config: Config, true_labels: Iterable[str]) -> np.ndarray:
    """By label the share of text that is trained as it, above 0 where there is any, of text of these true labels."""
    rows = [config.space.label(label) for label in true_labels]
    return np.sum([channel.matrix[rows].sum(0) for _, channel in config.channels], axis=0)


def collate(sequences: list[Sequence], isolated: bool, step_targets: int, step_labels: frozenset[int]) -> Batch:
    """One micro-batch of sequences."""
    context = len(sequences[0].input_ids)
    documents = tuple(
        (row * context + start, row * context + end)
        for row, sequence in enumerate(sequences)
        for start, end in sequence.documents
    )
    return Batch(
        input_ids=torch.from_numpy(np.stack([sequence.input_ids for sequence in sequences])),
        targets=torch.from_numpy(np.stack([sequence.targets for sequence in sequences])),
        labels=tuple(label for sequence in sequences for label in sequence.labels),
        lengths=tuple(length for sequence in sequences for length in sequence.lengths),
        documents=documents if isolated else None,
        step_targets=step_targets,
        step_labels=step_labels,
    )
