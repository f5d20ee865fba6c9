"""Write a task of lm-eval for every category of a run: the perplexity of its held-out documents, from a local file.

python examples/lm_eval/write_tasks.py RUN FOLDER

FOLDER gets CATEGORY.jsonl, the text of up to 100 documents of the split test, and CATEGORY.yaml, the task
`held_out_CATEGORY`, which holds the path of that file. lm-eval takes them with `--include_path FOLDER` and needs
neither this code nor a network (docs/evaluation.md).
"""

import json
import sys
from pathlib import Path
from urllib.parse import quote

import yaml

from sgtm.config.load import load_run_config
from sgtm.data.open import open_corpus
from sgtm.run.located import locate_data

DOCUMENTS = 100
METRICS = {"byte_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}  # with their aggregations

if len(sys.argv) != 3:
    sys.exit(__doc__)
run, folder = (Path(argument) for argument in sys.argv[1:])
corpus = open_corpus(locate_data(load_run_config(run), run), write=False)
folder.mkdir(parents=True, exist_ok=True)
for category in corpus.categories:
    documents = [corpus.tokens(int(document))[:-1] for document in corpus.select("test", category)[:DOCUMENTS]]
    if not documents:
        continue
    name = quote(category, safe="")  # a file name, and no pattern of lm-eval
    texts = [corpus.tokenizer.decode(tokens.tolist()) for tokens in documents]
    jsonl = (folder / f"{name}.jsonl").absolute()
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    task = {
        "task": f"held_out_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(jsonl)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in METRICS.items()
        ],
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), "utf-8")
    counts = f"{len(texts)} documents, {sum(map(len, documents))} tokens, {sum(len(t.encode()) for t in texts)} bytes"
    print(f"{task['task']}: {counts}")
