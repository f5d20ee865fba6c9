"""Train the debug preset from Python, evaluate it, and print the losses with and without Spanish.

python examples/train.py [FOLDER]
"""

import sys

import sgtm

folder = sys.argv[1] if len(sys.argv) > 1 else "runs"
config = sgtm.load_config("debug", [f"--runs={folder}", "--name=example", "--train.steps=30"])
run = sgtm.train(config, overwrite=True)
for removed, losses in sgtm.evaluate(run, sequences=16)["losses"].items():
    print(removed, {category: round(loss, 3) for category, loss in losses.items()})
