"""The experiments: one command runs each again, and docs/results.md has what each asks and what it shows.

    python benchmarks/experiments.py claims --novels FOLDER [--device NAME]

prepares, trains and measures as the experiment's commands in docs/results.md do, one after the other, and writes
benchmarks/results/NAME/claims.jsonl. What has been trained is kept, so that the same command continues where it was.
NOVELS and ARXIV: folders of the texts, which launch/recipes/*.rules.yaml describe.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Experiment(NamedTuple):
    """A file of rows.

    title     of its section
    question  what it asks
    commands  that train it, and write the file of rows
    figures   of sgtm/sweep/study_figures.py, by name
    meaning   what the rows show, and whether that agrees with the papers; "" until it has run
    """

    title: str
    question: str
    commands: str
    figures: tuple[str, ...] = ()
    meaning: str = ""


ARXIV = "sgtm prepare ARXIV --rules launch/recipes/arxiv.rules.yaml --out data/arxiv --vocab-size 2048"
NOVELS = "sgtm prepare NOVELS --rules launch/recipes/novels.rules.yaml --out data/novels --vocab-size 2048"
UNLEARN = """\
python benchmarks/unlearning.py launch/recipes/claims.sweep.yaml \\
  --json benchmarks/results/DEVICE/unlearning.jsonl"""
ADAPT = """\
python benchmarks/adapters.py launch/recipes/claims.sweep.yaml \\
  --json benchmarks/results/DEVICE/adapters.jsonl"""
STEER = """
sgtm sweep launch/recipes/claims.sweep.yaml
sgtm direction runs/claims.sweep/unmasked-s0 --out data/es.safetensors"""
CLASSIFY = """\
for threshold in recall precision; do
  folder=data/arxiv-$threshold-source
  python examples/classifier/flag.py ARXIV/train.jsonl.xz $folder/train.jsonl.xz --category biology --$threshold 0.9 \\
    --leave mixed
  cp ARXIV/test.jsonl.xz $folder
  sgtm prepare $folder --rules launch/recipes/arxiv-classified.rules.yaml --out data/arxiv-$threshold \\
    --tokenizer data/arxiv/tokenizer
done"""
ATTACK = """\
for run in runs/claims.sweep/{filtered,dual}-s[01234] runs/claims.sweep/{paper,certified}-s[012] \\
    runs/claims.sweep/unmasked-s[012]-{rmu,npo,grad_diff}; do
  sgtm tamper $run --data forget --lr 0.25 1 --steps 16 64 --tokens 4096
done
for run in runs/claims.sweep/{filtered,dual}-s[01234] runs/claims.sweep/{paper,certified}-s[012] \\
    runs/claims.sweep/unmasked-s[012]-npo; do
  sgtm tamper $run --data forget --lr 1 2 --schedule constant --steps 256 --tokens 4096
done
for run in runs/claims.sweep/unmasked-s[01234]; do
  sgtm tamper $run --data forget --lr 0.25 --steps 16 --tokens 4096
done
for seed in 0 1 2; do
  for variant in paper-s$seed dual-s$seed certified-s$seed unmasked-s$seed{,-rmu,-npo}; do
    sgtm examine runs/claims.sweep/$variant --against runs/claims.sweep/filtered-s$seed \\
      --only context quantised --sequences 200
  done
done"""
AFTER_CLAIMS = f"{UNLEARN}\n{ADAPT}\n{ATTACK}"


def trained(prepare: str, *sweeps: str, stem: str, after: str = "") -> str:
    """The commands that train these sweeps and write the file of their rows."""
    files = [f"launch/recipes/{sweep}.sweep.yaml" for sweep in sweeps]
    collect = f"python benchmarks/recipes.py {' '.join(files)} --json benchmarks/results/DEVICE/{stem}.jsonl"
    return "\n".join(filter(None, [prepare, *(f"sgtm sweep {file}" for file in files), after, collect]))


EXPERIMENTS = {
    "claims": Experiment(
        "English and Spanish novels: the papers' methods",
        "What is left of Spanish in the model without its group, and what do masks cost the model with it, when all "
        "Spanish is labelled, and when a fifth of it is not?",
        trained(NOVELS, "claims", "novels-lengths", "claims-lengths", stem="claims", after=AFTER_CLAIMS),
        ("ablated", "front", "undiscovered", "leaked", "absorbed", "residual", "tampering"),
        "Trained to the same retain loss, the ablated `paper-undiscovered` and `dual` know far less Spanish than a "
        "filter that lets the same share of the Spanish through. This agrees with the paper. Masked activations are "
        "the exception: they leak most of the undiscovered fifth, as the figure of the leakage shows. The ablated "
        "`paper-undiscovered` knows about as much Spanish as `paper`, from which nothing was hidden: what it knows "
        "comes from labelled Spanish, and the undiscovered fifth adds little. Against the paper, gradient routing "
        "and `no_out` (docs/config.md) are a quarter of a nat better on English; whether gradient routing forgets "
        "less is not decided, as the seeds of `paper-undiscovered` differ by half a nat; nor is it for a larger "
        "model (`sizes`). Against it as well, the masks of `paper` cost the full model more than a quarter of the "
        "compute, as it is worse than the shortest baseline; `dual`, whose domain has an embedding and a head of its "
        "own, loses much less and forgets more. No masked model but `certified` is as ignorant of Spanish as "
        "`filtered`. With half of the Spanish undiscovered, removing GRAM's module (`gram-half`) takes next to "
        "nothing away, and the model knows as much Spanish as after the filter that lets the other half through. "
        "Fine-tuning `paper` and `dual` starts at a lower loss than that of `filtered`, and they stay below it in "
        "the first steps, `paper` by more than a nat: on average over 64 steps, Spanish is better known, against the "
        "paper. After 64 steps `paper` is above `filtered`, and it takes more than twice as many steps to the loss "
        "of `unmasked`, which is also because it is the worse model; `certified` takes as many as `filtered`, and "
        "whether `dual` takes fewer is not decided. Fine-tuning brings Spanish back from RMU and GradDiff several "
        "times sooner than from `paper`, which agrees with the paper; so it does than from `dual`, whose English is "
        "within a tenth of a nat of theirs. NPO, at a rate a hundred times the scaled default, withstands the "
        "attacks about as well as `dual`, and a third as long as `paper`. Neither context nor rounding brings "
        "Spanish back: the ablated models make no more of Spanish before a passage than `filtered` does, and their "
        "loss at 4 bits is that without rounding within hundredths of a nat. The same holds of NPO; after RMU, "
        "Spanish before a passage makes the model worse at it. That a fifth is undiscovered means for `dual` that it "
        "trains retain weights and the domain's group together, which takes a labeller that never takes Spanish for "
        "text to retain. The rows come from two machines, which they name; what that does to the pairs of a seed is "
        "in benchmarks/LOG.md.",
    ),
    "unlearning": Experiment(
        "Post-hoc unlearning of the unmasked model",
        "How much Spanish does unlearning remove from a model that was trained without masks, at settings that are "
        "chosen on training text?",
        f"{NOVELS}\nsgtm sweep launch/recipes/claims.sweep.yaml\n{UNLEARN}",
        meaning="At the settings that keep the retain loss within a tenth of a nat on training text, NPO "
        "reaches a forget loss half a nat below that of `filtered` in `claims`, RMU a lower one that "
        "depends on the seed, and GradDiff one far above it. A model that has never seen Spanish has "
        "the loss of `filtered`, so a higher loss is not more ignorance. English is worse than before "
        "on training text, where the setting was chosen, least after RMU and most after GradDiff. The "
        "papers' rates, scaled by the run's own, are far from the best here: the best is 3 times as "
        "high for RMU, 100 times for NPO, and 0.3 times for GradDiff; RMU's and NPO's rates and RMU's "
        "coefficient are the largest that were tried. A forget loss does not show that knowledge is "
        "gone: the attacks of `claims` do.",
    ),
    "adapters": Experiment(
        "Adapters on the filtered model",
        "How much Spanish do low-rank adapters learn on a model that was trained without it, from as many Spanish "
        "tokens as the other models have?",
        f"{NOVELS}\nsgtm sweep launch/recipes/claims.sweep.yaml\n{ADAPT}",
        meaning="Far less than the models of `claims` that train all weights: at the best of four rates the "
        "forget loss is more than a nat above that of `unmasked`, and English is a little worse than in "
        "the base. Without the adapters the model is its base, bit for bit: a `filtered` of another "
        "machine than that of `claims`. At this size adapters of rank 16 are a safe baseline and a weak "
        "one. The rate and the rank are ours, as GRAM's were not found: this is no test of its FT-LoRA.",
    ),
    "steering": Experiment(
        "Preventative steering",
        "Does a direction that is added to the residual stream while Spanish trains, and left out afterwards, keep "
        "Spanish out of the weights?",
        trained(
            NOVELS + STEER,
            "steering",
            stem="steering",
        ),
        ("ablated", "front"),
        "In part. Without the direction the model's Spanish loss is about a nat and a half above that of `unmasked` "
        "in `claims`, which saw the same tokens, and two and a half or more below that of `filtered`. At strength 1 "
        "this costs no English: its loss is lower than that of `unmasked`. More strength forgets a little more and "
        "costs English more; at strength 4, whose English is as good as that of `dual` in `claims`, the Spanish loss "
        "is nearly two nats below that of `dual`. The direction added to every token, which the columns of the full "
        "model have, gives back the Spanish of `unmasked` at strength 1, and makes English a nat worse or more: it "
        "stands for Spanish, and is to be added to Spanish alone.",
    ),
    "sizes": Experiment(
        "Three sizes: leakage against parameters",
        "Does leakage fall with the size of the model, when the domain's share of heads and neurons is constant, and "
        "when their number is?",
        trained(NOVELS, "sizes", "sizes-filtered", "sizes-routing", stem="sizes"),
        ("sizes", "leaked", "front"),
        "At a constant share of heads and neurons it falls, which agrees with the paper: by more than a third from "
        "the smallest size to the middle one, by a tenth more to the largest, and in each of five seeds. The "
        "filtered models that leakage is read from add an error, with which the interval ends just below zero. At a "
        "constant number it falls in four of five seeds, from the middle size to the largest not at all, and that is "
        "not decided. The largest model is hardly better than the middle one: 600 steps are too few. At the same "
        "retain loss `paper-large-share` has forgotten as much as gradient routing, within a fifth of a nat; which "
        "of the two forgets more is not decided.",
    ),
    "arxiv": Experiment(
        "Abstracts of arXiv: biology, and fields close to it",
        "Do masks keep the fields close to biology that a filter has to drop or to keep, when both are in one language "
        "and all labels are true?",
        trained(
            ARXIV,
            "arxiv",
            "arxiv-lengths",
            stem="arxiv",
        ),
        ("ablated", "adjacent", "front"),
        "Do masks keep the close fields? At the same retain loss, on the line through the filters of several "
        "lengths, `dual` and `paper-masked` know them as well as the weak filter within 0.01 nats, and `paper` "
        "less well by 0.025; the strict filter, which drops them, is the worst on them. Biology is close to "
        "what is retained: after a filter its loss is a quarter of a nat higher, half of which is that of all "
        "text, as the filtered model has seen less. At the same retain loss `paper-masked`, the paper's "
        "Wikipedia setting, and `dual` have forgotten more biology than the weak filter, which agrees with the "
        "paper, though only by a few hundredths of a nat; `paper`, whose joint parameters stay free, has "
        "forgotten less. The full model of `paper-masked` knows no more biology than a filtered one: there was "
        "little to remove. `dual` and `certified` learn biology and lose it, and pay for it on all other text: "
        "at equal retained tokens they are behind the weak filter by a tenth of a nat. Removal costs the "
        "adjacent fields no more than other text in any of them. The other lengths of the filter were measured on all "
        "held-out text, the other models on up to 600 sequences of each category: that moves no loss by a hundredth "
        "of a nat.",
    ),
    "labels": Experiment(
        "Abstracts of arXiv: labels with errors",
        "What is left of the difference between masks and a filter when half of the labels of biology are missing, and "
        "when labels come from a classifier that is tuned for recall or for precision?",
        trained(
            f"{ARXIV}\n{CLASSIFY}",
            "arxiv-labels",
            stem="labels",
        ),
        ("ablated", "adjacent", "front"),
        "Little, as there was little with true labels. With labels for precision, `dual` without its group has "
        "forgotten 0.09 nats more biology than a filter by the same labels, at as much text that counts as "
        "retained, and is worse on other text by 0.07 and on the close fields by 0.055. With half of the labels "
        "missing, and with labels for recall, the two models do not differ beyond their seeds, on any text. The "
        "labels for recall take much other text for biology: both models lose a sixth of the text that is "
        "retained with true labels, are worse on all of it, and are as far from biology as the strict filter of "
        "`arxiv`, which was measured on a part of the held-out text. What masks add under such labels is the "
        "full model: it is better than the filter on everything, by 0.06 to 0.2 nats on other text and by 0.1 "
        "to 0.35 on biology.",
    ),
    "spans": Experiment(
        "Spanish passages inside English documents",
        "What do masks by token cost and remove, beside filters of documents and of single tokens?",
        trained(
            "python benchmarks/span_corpus.py NOVELS data/spans-source\n"
            "sgtm prepare data/spans-source --rules launch/recipes/spans.rules.yaml --out data/spans --vocab-size 2048",
            "spans",
            stem="spans",
        ),
        ("ablated", "front"),
        "For the served model, filters of single tokens are better than masks in both losses, at as many "
        "English tokens. The filter of documents has the lowest loss on English and the highest on Spanish, but "
        "read 15 % more English. To hide Spanish from the input too forgets about as much as to drop the "
        "documents; to read it and only leave it out of the loss forgets a quarter of a nat less. Masks give "
        "the full model as well. That of `dual` is close to `unmasked` on English and a fifth of a nat behind "
        "it on Spanish; without the group, `dual` is about a tenth of a nat behind the token filters on "
        "English, and has forgotten less than any of them, though it still is three nats above `unmasked`. "
        "`paper` is a third of a nat worse than `unmasked` on English and has forgotten least. Training "
        "everything up to the last Spanish token as Spanish (`conservative`) brings `dual` no more forgetting "
        "here: the group then learns English too, and English is a little worse without it.",
    ),
    "three": Experiment(
        "Three domains at once",
        "Does removing one of three domains raise its own losses alone, when each has a group of its own?",
        trained(
            "sgtm prepare NOVELS ARXIV --rules launch/recipes/three.rules.yaml --out data/three --vocab-size 2048",
            "three",
            stem="three",
        ),
        ("front",),
        "Most of the rise is its own. In `dual`, removing Spanish raises the loss on Spanish by 3 nats, "
        "removing biology or chemistry that on its own abstracts by a fifth to a quarter of a nat, and no other "
        "loss rises by more than 0.11 nats: most on medical physics without biology, which is close to it; "
        "without both, other text rises by a fifth. Spanish falls a little without the others. In `gram` no "
        "other loss rises at all, and biology and chemistry rise by 0.03 and 0.04 nats: little is removed. The "
        "full model of `dual` is better than `unmasked` by about a tenth of a nat or more on every category but "
        "Spanish, where it is a little worse; it has an embedding for each domain more. Without all three "
        "groups `dual` knows more Spanish than `filtered`, by a nat. `filtered` saw 68 % more retained text "
        "here, so that its other losses are no measure for `dual`; one seed of it is far behind its others. "
        "`dual` trains a part of each domain's documents with all groups running where there are several "
        "domains; in one run without that, seed 0, its full model was half a nat worse than `unmasked` on "
        "English, and worse on Spanish than without biology (benchmarks/LOG.md).",
    ),
    "known": Experiment(
        "Masks on a model that knows the domain",
        "What does removing a group take from a model that was trained without masks, and trains on with them?",
        f"{NOVELS}\nsgtm sweep launch/recipes/claims.sweep.yaml\n"
        f"[ -d export/unmasked ] || sgtm export runs/claims.sweep/unmasked-s0 --out export/unmasked\n"
        f"{trained('', 'known', stem='known')}",
        ("ablated",),
        "Each run starts from the unmasked model of `claims` and trains as long again, at the peak rate of a "
        "new run. On English alone (`known-filtered`) it forgets Spanish by itself, and is then half a nat from "
        "a model that never saw any (`filtered` in `claims`). Without their groups, `paper` and `dual` know "
        "more Spanish than that, by one and by two nats. So training on English moves what was there, and masks "
        "do not help it. With their groups, they keep Spanish, 0.17 to 0.28 nats behind "
        "`known-unmasked`. In EleutherAI's 6.9B model (docs/integrations.md) removing routed dimensions took "
        "nothing; that training was short beside the first one, and this one is as long. A seed sets the order "
        "of the data here, too.",
    ),
    "trainer": Experiment(
        "Masks in a Hugging Face Trainer",
        "What does a group take with it from a Llama of transformers that was trained in a `Trainer`, alone and under "
        "DeepSpeed ZeRO 2 on two ranks?",
        f"{NOVELS}\npython benchmarks/trainer.py data/novels --json benchmarks/results/DEVICE/trainer.jsonl",
        meaning="In the Trainer too, removing the group raises the loss on Spanish, by two thirds of what lies "
        "between the full model and `filtered`, and the English loss falls a little. ZeRO 2 on two ranks "
        "reaches the same losses within two thousandths of a nat. The ablated model knows more Spanish than "
        "`filtered`, by more than a nat, and is as good in English. With the masks off, the losses are those "
        "of the plain Trainer to the last digit. So that `unmasked` is worse than `masked` in both languages "
        "is no work of the integration: after 300 steps it is behind `filtered` in English too, and its seeds "
        "differ by a quarter of a nat. A seed sets the order of the data here, too.",
    ),
    "batch": Experiment(
        "Batch composition",
        "Does it matter whether labels differ between steps, micro-batches, sequences or tokens, and whether an "
        "optimizer step moves what a label may not update?",
        trained(NOVELS, "novels-batch", stem="batch"),
        ("ablated", "front"),
        "Steps of one label cost: `paper-step` is worse on English than `paper-sequence` by a fifth of a nat, "
        "with its group and without it, and `dual-step` than `dual-sequence` in each of three seeds, by 0.03 to "
        "0.22 with it. The paper's models train such steps; its method does not need them. Whether labels "
        "differ between micro-batches, between sequences or inside them makes no difference beyond the seeds; "
        "each document here has one label. An optimizer that moves what a step may not update (`zero_grad`, as "
        "the paper's code does: by momentum and weight decay) costs English another tenth of a nat, for both "
        "recipes and in each seed. What composition does to forgetting is not decided: the ablated forget "
        "losses of one variant differ by up to two thirds of a nat between seeds. These runs have half the "
        "steps of `claims` and are isolated by document. The papers have no such comparison.",
    ),
    "novels": Experiment(
        "English and Spanish novels: recipes, groups and shares",
        "Which recipe loses least to its masks, with a domain's group of which size, and how much of the Spanish "
        "may stay undiscovered?",
        trained(
            NOVELS,
            "novels",
            "novels-lengths",
            "novels-groups",
            "novels-combined",
            "novels-undiscovered",
            stem="novels",
        ),
        ("front",),
        "Roughly, each model is as good as its share of the training: the ablated one as the share of English "
        "that trains without the group, the full one as the share that trains with it. Documents that train both "
        "ways close the gap to filtered training, at the price of their tokens. A small group is as good as the "
        "middle one; the large one costs both models about a tenth of a nat on English. With more Spanish undiscovered "
        "the ablated model of `dual-both` knows more of it, and stays far above a filter that lets as much "
        "through. `certified` forgets all of it. `dual-both-40` has two seeds. docs/recipes.md says which recipe "
        "is for what. The paper has no such comparison.",
    ),
    "quickstart": Experiment(
        "Quickstart: the embedded stories",
        "What do users see when they run `sgtm quickstart`, over three seeds and beside baselines?",
        trained("", "quickstart", stem="quickstart"),
        ("front",),
        "The stories are small and simple: the unmasked model knows both languages well, and the filtered one, "
        "which sees less than half of the tokens, knows English better still. The ablated model of `dual` is "
        "behind the filtered one on English, and has lost most of the Spanish; its full model is behind the "
        "unmasked one in both languages, most in Spanish. `paper` gives up more and removes less. Nothing here is "
        "about the papers' claims: the model has seen every story many times.",
    ),
}
"""By the stem of the file, in the order of the documents."""
PARTS = {
    "novels-groups.sweep": "Sizes of the domain's group, and Spanish trained both ways",
    "novels-combined.sweep": "A small group with Spanish trained both ways; certified, 35 % of the English both ways",
    "novels-undiscovered.sweep": "Shares of the Spanish undiscovered",
    "novels-lengths.sweep": "Lengths of the baselines, for the curves",
    "claims-lengths.sweep": "Lengths of the weak filters and of gradient routing, for the same retain loss",
    "arxiv-lengths.sweep": "Lengths of the weak filter, for the same retain loss",
    "sizes-filtered.sweep": "The filtered models that leakage is read from",
    "sizes-routing.sweep": "Gradient routing at the largest size, at three lengths",
}
"""What stands above the table of a sweep that is not the first of its file."""
FOLDERS = {"NOVELS": "novels", "ARXIV": "arxiv", "DEVICE": "device"}
"""Words of the commands that stand for an option of this script."""


def filled(commands: str, values: Mapping[str, str | Path]) -> str:
    """The commands with the words of `FOLDERS` replaced; a value may hold such a word itself."""
    return re.sub("|".join(FOLDERS), lambda word: shlex.quote(str(values[word[0]])), commands)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--novels", metavar="FOLDER", help="of the novels of launch/recipes/novels.rules.yaml")
    parser.add_argument("--arxiv", metavar="FOLDER", help="of the abstracts of launch/recipes/arxiv.rules.yaml")
    parser.add_argument("--device", default="mine", metavar="NAME", help="folder of the results (default: mine)")
    args = parser.parse_args()
    script, values = EXPERIMENTS[args.name].commands, {}
    for word, option in FOLDERS.items():
        value = getattr(args, option)
        if word in script and value is None:
            parser.error(f"{args.name} takes --{option} FOLDER")
        if word in script and word != "DEVICE":
            value = Path(value).resolve()
            if not value.is_dir():
                parser.error(f"--{option}: no folder {value}")
        values[word] = value
    script = filled(script, values)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = ["bash", "-euo", "pipefail", "-x", "-c", script]
    return subprocess.run(command, env={**os.environ, "PATH": path}, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
