"""Train the debug preset, export it without Spanish, and generate with transformers alone.

python examples/remove_and_generate.py [FOLDER]
"""

import shutil
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import sgtm

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
run = sgtm.train(
    sgtm.load_config("debug", [f"--runs={folder}", "--name=example-full", "--train.steps=30"]), overwrite=True
)
shutil.rmtree(folder / "example-safe", ignore_errors=True)
safe = sgtm.export(run, ["es"], folder / "example-safe")
model, tokenizer = (kind.from_pretrained(safe) for kind in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
