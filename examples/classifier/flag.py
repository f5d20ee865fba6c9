"""Label a large set of documents by a classifier that has seen a few hundred labels.

python examples/classifier/flag.py IN.jsonl OUT.jsonl --category biology --recall 0.9 [--documents 600] [--seed 0]

IN and OUT hold a JSON object with `text` and `category` on each line, and may be compressed (.gz, .bz2, .xz). The
labels of `--documents` lines, drawn at random, train a logistic regression on TF-IDF features; the threshold is the
highest that reaches the recall, or the lowest that reaches the precision (`--precision 0.9` in place of `--recall`), on
predictions for the same documents by models that have not seen them (5 folds). In OUT the category of a document is
`biology-missed` where the classifier takes one of biology for something else, and `CATEGORY-flagged` where it takes one
of another category for biology, so that rules can give either a label of its own. Lines of `--leave mixed` keep theirs
and are not drawn. scikit-learn is needed. One JSON line is printed: precision and recall on all other documents.
"""

import argparse
import bz2
import gzip
import json
import lzma
import random
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FOLDS, LEAST_HITS = 5, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--category", required=True, help="the one to recognise")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--recall", type=float, metavar="R", help="least share of the category's documents to flag")
    target.add_argument("--precision", type=float, metavar="P", help="least share of the flagged that are of it")
    parser.add_argument("--documents", type=int, default=600, metavar="N", help="labels to learn from")
    parser.add_argument("--leave", nargs="*", default=[], metavar="CATEGORY", help="categories to leave as they are")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 < (share := args.recall or args.precision or 0.0) <= 1:
        parser.error(f"--recall and --precision take a share above 0 and at most 1, got {share:g}")
    with open_text(args.source, "rt") as file:
        documents = [json.loads(line) for line in file]
    others = [n for n, document in enumerate(documents) if document["category"] not in args.leave]
    random.Random(args.seed).shuffle(others)
    drawn, rest = others[: args.documents], others[args.documents :]
    truth = np.array([document["category"] == args.category for document in documents])
    if min(truth[drawn].sum(), (~truth[drawn]).sum()) < FOLDS:
        sys.exit(f"fewer than {FOLDS} of {len(drawn)} documents are {args.category}, or are not; raise --documents")
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000))
    texts = [documents[n]["text"] for n in drawn]
    unseen = cross_val_predict(model, texts, truth[drawn], cv=FOLDS, method="predict_proba")[:, 1]
    threshold = chosen_threshold(unseen, truth[drawn], args.recall, args.precision)
    model.fit(texts, truth[drawn])
    flagged = np.zeros(len(documents), bool)
    flagged[others] = model.predict_proba([documents[n]["text"] for n in others])[:, 1] >= threshold
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open_text(args.out, "wt") as file:
        for n, document in enumerate(documents):
            if flagged[n] != truth[n]:
                document["category"] += "-missed" if truth[n] else "-flagged"
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    hits = (flagged & truth)[rest].sum()
    precision, recall = hits / max(1, flagged[rest].sum()), hits / max(1, truth[rest].sum())
    shown = {"documents": len(rest), "threshold": threshold, "precision": precision, "recall": recall}
    print(json.dumps({name: round(float(value), 4) for name, value in shown.items()}))


def chosen_threshold(scores: np.ndarray, truth: np.ndarray, recall: float | None, precision: float | None) -> float:
    """The highest threshold with that recall, or the lowest with that precision; ends the script where none has it."""
    candidates = np.unique(scores)
    hits = np.array([(truth & (scores >= candidate)).sum() for candidate in candidates])
    if recall is not None:
        reached = candidates[hits >= recall * truth.sum()]
        return float(reached[-1])
    flagged = np.array([(scores >= candidate).sum() for candidate in candidates])
    reached = candidates[(hits >= precision * flagged) & (hits >= LEAST_HITS)]  # fewer could be luck
    if not len(reached):
        sys.exit(f"no threshold has a precision of {precision}; raise --documents")
    return float(reached[0])


def open_text(path: Path, mode: str):
    return OPENERS.get(path.suffix, open)(path, mode, encoding="utf-8")


if __name__ == "__main__":
    main()
