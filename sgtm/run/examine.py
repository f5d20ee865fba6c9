"""What a run's safe models still hold of a domain: the measures of sgtm/evaluation, for every removed set.

Each measure is a function of a `Subject` (a model without some domains) that returns plain JSON. `examine_run` takes
the named ones, on the full model and on the model without each domain, and on a control: a run that was trained
without the domain, which shows what the measure gives where there is nothing to find.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sgtm.evaluation import in_context, probes
from sgtm.evaluation.calibration import calibrated_losses
from sgtm.evaluation.estimates import Estimate, token_mean
from sgtm.evaluation.memorisation import Recital, membership, recital
from sgtm.evaluation.pair import guided_recital
from sgtm.evaluation.quantisation import quantised
from sgtm.evaluation.subject import Subject
from sgtm.files import write_atomically
from sgtm.masking.labels import FULL, removal_name
from sgtm.run.evaluate import check_precision, check_sample, load_bases, load_model
from sgtm.run.opened import OpenedRun, check_control, knowing_control, open_with_corpus
from sgtm.words import counted

BITS = (8, 4)
STRENGTHS = (0.5, 1.0, 2.0)  # of guided decoding
FILE = "examination.json"
SETTINGS = ("split", "sequences", "control")
SAMPLES = ("fit_sequences", "passages", "texts")
"""What examinations of the same weights differ in; those of older versions have no `SAMPLES`, which counts as null."""


@dataclass(frozen=True)
class Question:
    """What the measures are about.

    forget, retain  categories; forget: those of the domain
    texts           passages as token ids, for extraction and guided decoding
    """

    forget: tuple[str, ...]
    retain: tuple[str, ...]
    split: str
    sequences: int | None
    texts: tuple[tuple[int, ...], ...]
    fit_sequences: int | None = None  # of each category, in the training split; of the calibration


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "error": estimate.error}


def _recital(recited: Recital) -> dict[str, Any]:
    return {
        "extraction_strength": _estimate(recited.extraction_strength),
        "exact_memorisation": _estimate(recited.exact_memorisation),
        "texts": recited.texts,
    }


def calibrated(subject: Subject, about: Question) -> dict[str, Any]:
    losses = calibrated_losses(
        subject,
        forget=about.forget,
        retain=about.retain,
        split=about.split,
        sequences=about.sequences,
        fit_sequences=about.fit_sequences,
    )
    by_name = {
        when: {name: _estimate(loss) for name, loss in of.items()}
        for when, of in (("before", losses.before), ("after", losses.after))
    }
    return {**by_name, "targets": losses.targets}


def recitation(subject: Subject, about: Question) -> dict[str, Any]:
    return _recital(recital(subject, about.texts))


def members(subject: Subject, about: Question) -> dict[str, Any]:
    return {category: _estimate(membership(subject, category, about.sequences)) for category in about.forget}


def _loss(subject: Subject, category: str, about: Question) -> Estimate:
    scores = subject.scores(about.split, category, about.sequences)
    return token_mean(scores.losses, scores.document)


def in_few_bits(subject: Subject, about: Question) -> dict[str, Any]:
    """Losses by number of bits and category; `unrounded` are those of the weights as they are."""
    removed = subject.removed if subject.config.removes_groups else ()
    losses = {}
    for bits in (None, *BITS):
        model = quantised(subject.model, bits, removed) if bits else subject.model
        rough = replace(subject, model=model)
        losses[str(bits or "unrounded")] = {
            category: _estimate(_loss(rough, category, about)) for category in (*about.forget, *about.retain)
        }
    return losses


def gain_by_context(subject: Subject, about: Question) -> dict[str, Any]:
    """By category, behind text of the first retain category."""
    by_category = {}
    for category in about.forget:
        count = about.sequences or in_context.PASSAGES
        gain = in_context.context_gain(subject, category, about.retain[0], split=about.split, passages=count)
        by_category[category] = {
            name: value if isinstance(value, int) else _estimate(value) for name, value in gain._asdict().items()
        }
    return by_category


def linear_probes(subject: Subject, about: Question) -> dict[str, Any]:
    """By category and layer."""
    count = about.sequences or probes.SEQUENCES
    return {
        category: {
            str(layer): {
                "own_head": _estimate(probe.own_head),
                "fitted": _estimate(probe.fitted),
                "rate": probe.rate,
                "chosen": probe.chosen,
            }
            for layer, probe in probes.probes(subject, category, split=about.split, sequences=count).items()
        }
        for category in about.forget
    }


MEASURES: dict[str, Callable[[Subject, Question], dict[str, Any]]] = {
    "calibrated": calibrated,
    "recital": recitation,
    "membership": members,
    "quantised": in_few_bits,
    "context": gain_by_context,
    "probes": linear_probes,
}
GUIDED = "guided"  # of the full model and an ablated one together
PASSAGES = 100
"""To recite, at most, where no number is given."""


def examine_run(
    run: str | Path,
    *,
    measures: Sequence[str] = (),
    control: str | Path | None = None,
    split: str = "test",
    sequences: int | None = None,
    texts: Sequence[str] = (),
    passages: int | None = None,
    fit_sequences: int | None = None,
    data: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The measures of a run, as `examination.json` holds them: settings, and by domain the measures of each model.

    Of a run from which nothing can be removed, such as a filtered or unlearned one, the full model alone is examined.

    measures   names of `MEASURES` or `guided`; none: all
    control    a run that was trained without the domains, on the same corpus, taken without the domain where that can
               be removed from it; None: no control
    split      whose documents the losses are of
    sequences  of each category, at most, and passages of `context`; None: all, of `context` 200, of `probes` 400
    texts      passages for recital and guided decoding; none: the beginnings of `passages` training documents of the
               domain, of its categories in turn, each as long as the context; None: up to `PASSAGES`
    fit_sequences  as in sgtm/evaluation/calibration.py
    data       `data.path` to take, of the same corpus; None: that of the run

    Raises ValueError before any model is loaded for a folder that is no run, data that are not those of the run, an
    unknown measure, passages without a measure that takes them, a run without domains, `guided` of a run from which
    nothing can be removed, a domain or retain data without text in the split or too little of it for a measure, fewer
    sequences or passages than were asked for, a passage without a second token, and a control that is the run itself or
    has another corpus or context.
    """
    names = list(measures) or [*MEASURES, GUIDED]
    if unknown := [name for name in names if name not in (*MEASURES, GUIDED)]:
        raise ValueError(f"unknown measure {unknown[0]!r}; the measures are {', '.join((*MEASURES, GUIDED))}")
    if texts and not {"recital", GUIDED} & {*names}:
        raise ValueError("passages are for the measures recital and guided, which --only leaves out")
    target = open_with_corpus(run, data)
    domains = target.removable or tuple(target.config.masking.domains)
    if not domains:
        raise ValueError(f"{run} has no domain (masking.domains): there is nothing to examine")
    if not target.removable:
        if GUIDED in measures:
            raise ValueError(f"guided takes a full and an ablated model; from {run} nothing can be removed")
        names = [name for name in names if name != GUIDED]
    beside = open_with_corpus(control, data) if control else None
    if beside:
        check_control(target, beside)
    questions = {
        domain: replace(_question(target, domain, split, sequences, texts, passages), fit_sequences=fit_sequences)
        for domain in domains
    }
    for about in questions.values():
        _check_text(target, about, names)
    warning = knowing_control(beside, domains) if beside else ""
    if warning:
        log(f"warning: {warning}")
    check_precision(target.config, "fp32")
    full = _subject(target)
    other = _subject(beside) if beside else None
    results: dict[str, Any] = {"checkpoint": target.checkpoint.name, "weights": target.weights}
    results |= {"split": split, "sequences": sequences, "control": str(control) if control else None}
    own = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest() if texts else None
    results |= {"fit_sequences": fit_sequences, "passages": passages, "texts": own}
    results |= {"control_warning": warning, "domains": {}}
    for domain, about in questions.items():
        models = {FULL: full}
        if target.removable:
            models[removal_name((domain,))] = full.without(domain)
        if beside and other:
            models["control"] = other.without(domain) if domain in beside.removable else other
        by_measure: dict[str, Any] = {}
        results["domains"][domain] = {"forget": about.forget, "retain": about.retain, "measures": by_measure}
        for name in names:
            log(f"{domain}: {name}")
            if name == GUIDED:
                by_measure[name] = {
                    f"{strength:g}": _recital(guided_recital(full, full.without(domain), about.texts, strength))
                    for strength in (0.0, *STRENGTHS)
                }
            else:
                by_measure[name] = {model: MEASURES[name](subject, about) for model, subject in models.items()}
    return results


def _subject(target: OpenedRun) -> Subject:
    model, bases = load_model(target.config, target.checkpoint), load_bases(target.config, target.checkpoint)
    return Subject(model, target.corpus, target.config, bases=bases)


def _check_text(target: OpenedRun, about: Question, measures: Sequence[str]) -> None:
    """Raises ValueError where there is too little text for a measure, or less than the sample that was asked for."""
    if "context" in measures:
        for category in (*about.forget, about.retain[0]):
            in_context.long_documents(target.corpus, about.split, category, target.config.model.context // 2)
    categories = (*about.forget, *about.retain)
    if about.sequences:
        check_sample(target.corpus, target.config, about.split, categories, about.sequences)
    if about.fit_sequences and "calibrated" in measures:
        option = ("--fit-sequences", "leave it out for the default")
        check_sample(target.corpus, target.config, "train", categories, about.fit_sequences, *option)


def _question(
    target: OpenedRun, domain: str, split: str, sequences: int | None, texts: Sequence[str], passages: int | None
) -> Question:
    corpus, context = target.corpus, target.config.model.context
    by_label: dict[str, list[str]] = {}
    for category, label in corpus.categories.items():
        if len(corpus.select(split, category)) and len(corpus.select("train", category)):
            by_label.setdefault(label, []).append(category)
    forget, retain = (by_label.get(label, []) for label in (f"forget:{domain}", "retain"))
    for label, categories in ((f"forget:{domain}", forget), ("retain", retain)):
        if not categories:
            raise ValueError(f"{corpus.path} has no category labelled {label} with documents in train and {split}")
    if texts:
        ids = [tuple(encoding.ids) for encoding in corpus.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        if short := [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) < 2]:
            raise ValueError(f"the passage {short[0]!r} is a single token or none: nothing of it can be predicted")
    else:
        documents = in_turn([corpus.select("train", category).tolist() for category in forget])
        long = [document for document in documents if corpus.documents["length"][document] >= context]
        chosen = (long or documents)[: passages or PASSAGES]
        if passages and len(chosen) < passages:
            raise ValueError(
                f"--passages {passages}: {corpus.path} has {counted(len(chosen), 'training document')} of {domain} to "
                f"recite{' that fill the context' * bool(long)}; give at most {len(chosen)}, or leave it out for up to "
                f"{PASSAGES}"
            )
        ids = [tuple(corpus.tokens(document, 0, context).tolist()) for document in chosen]
    return Question(tuple(forget), tuple(retain), split, sequences, tuple(ids))


def in_turn(documents: Sequence[Sequence[int]]) -> list[int]:
    """The first of each, the second of each, and so on."""
    return [document for turn in zip_longest(*documents) for document in turn if document is not None]


def write_examination(run: Path, results: dict[str, Any]) -> list[str]:
    """Add results to `examination.json` of a run, which is written whole.

    The file has an examination for each split, control and sample, the newest last. Measures of the same ones stay,
    unless they are measured again. Those of other weights are removed: returns their names.
    """
    file, weights = run / FILE, ("checkpoint", "weights")
    stored = read_examinations(file) if file.exists() else []
    alike = [old for old in stored if all(old.get(name) == results[name] for name in weights)]
    for old in [old for old in alike if all(old.get(name) == results[name] for name in (*SETTINGS, *SAMPLES))]:
        alike.remove(old)
        for domain, examined in old["domains"].items():
            new = results["domains"].setdefault(domain, {**examined, "measures": {}})
            new["measures"] = {**examined["measures"], **new["measures"]}
    write_atomically(file, json.dumps({"examinations": [*alike, results]}, indent=2) + "\n")
    removed = (old for old in stored if any(old.get(name) != results[name] for name in weights))
    return list(dict.fromkeys(name for old in removed for one in old["domains"].values() for name in one["measures"]))


def read_examinations(file: Path) -> list[dict[str, Any]]:
    """The newest last. Raises ValueError for a damaged file."""
    try:
        stored = json.loads(file.read_text("utf-8"))["examinations"]
        for results in stored:
            _ = [results[name] for name in SETTINGS]
            _ = [(examined["forget"], examined["measures"].keys()) for examined in results["domains"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); remove it, and examine the run again") from None
    return stored
