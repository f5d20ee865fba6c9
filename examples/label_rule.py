"""Label documents by a rule of your own, here by a list of words, and prepare a corpus of them.

python examples/label_rule.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import sgtm

WORDS = {"virus", "toxin", "pathogen"}
SENTENCES = ["The house is green.", "A virus has a genome.", "We walk to the lake.", "This toxin is a protein."]
TEXTS = [f"{sentence} Example {number}." for number in range(50) for sentence in SENTENCES]

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/example")
folder.mkdir(parents=True, exist_ok=True)
with (folder / "texts.jsonl").open("w") as file:
    for text in TEXTS:
        category = "virology" if WORDS & set(text.lower().split()) else "web"
        file.write(json.dumps({"text": text, "category": category}) + "\n")
(folder / "rules.yaml").write_text("labels: {web: retain, virology: forget:bio}\nsplit: {hash: {test: 0.1}}\n")
corpus = sgtm.prepare(folder / "texts.jsonl", folder / "rules.yaml", folder / "corpus", vocab_size=300, workers=1)
for category, count in corpus.manifest.counts["train"].items():
    print(f"{category}: {corpus.categories[category]}, {count.documents} documents, {count.tokens} tokens")
