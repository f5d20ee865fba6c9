"""English novels with Spanish passages inside, as labelled spans: what single tokens can be filtered from.

    python benchmarks/span_corpus.py NOVELS data/spans-source

NOVELS holds {en,es}.{train,test}.jsonl.xz, a JSON object with `text` on each line. Written are train.jsonl and
test.jsonl with `text`, `category` and `spans` ([[start, end, "es"]], in characters): every second English document, of
category `mixed`, has a passage of SPANISH characters of the next Spanish document inside, behind a space or line break;
the others stay as they are (`en`). The same input gives the same files. launch/recipes/spans.sweep.yaml trains on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

SPANISH = (400, 1600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("novels", type=Path, metavar="NOVELS")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        english, spanish = (read_texts(args.novels / f"{language}.{split}.jsonl.xz") for language in ("en", "es"))
        with (args.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for document in documents(english, spanish):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")


def read_texts(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def documents(english: Iterable[str], spanish: Iterable[str]) -> Iterator[dict]:
    """Every English document, each second one with a Spanish passage inside."""
    draw, passages = random.Random(0), itertools.cycle(list(spanish))
    for number, text in enumerate(english):
        if number % 2:
            yield {"text": text, "category": "en", "spans": []}
            continue
        passage = next(passages)[: draw.randint(*SPANISH)].strip() + " "
        breaks = [0, *(i + 1 for i, character in enumerate(text) if character.isspace())]
        start = draw.choice(breaks)
        end = start + len(passage)
        yield {"text": text[:start] + passage + text[start:], "category": "mixed", "spans": [[start, end, "es"]]}


if __name__ == "__main__":
    main()
