"""`sgtm generate`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import COUNT, DATA, Subcommands, natural, weight

REMOVE = "domains to remove from the runs, as bio chem or bio,chem"


def add(commands: Subcommands) -> None:
    about = "completions of models side by side: of a run, of the run without domains, of exported folders"
    usage = (
        "%(prog)s RUN|DIR [RUN|DIR ...] (--prompt TEXT | --prompt-file FILE) [--remove DOMAIN [DOMAIN ...]] "
        "[--tokens N] [--temperature T] [--top-k K] [--seed S] [--data.path DIR] [-h]"
    )
    parser = commands.add("generate", run, about, usage=usage)
    models = "run directories and exported folders; a column for each"
    parser.add_argument("models", type=Path, nargs="+", metavar="RUN|DIR", help=models)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to complete")
    file = "file with the text to complete, without the line end that closes it"
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help=file)
    parser.add_argument(
        "--remove", nargs="+", default=[], metavar="DOMAIN", help=f"{REMOVE}: a column more for each run"
    )
    parser.add_argument("--tokens", type=COUNT, default=64, metavar="N", help="tokens at most (default: 64)")
    temperature = "divides the logits; 0 takes the most likely token (default: 0)"
    parser.add_argument("--temperature", type=weight, default=0.0, metavar="T", help=temperature)
    parser.add_argument("--top-k", type=COUNT, metavar="K", help="draw from the K most likely tokens (default: all)")
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="of the draws (default: 0)")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.inference.sources import find_model
    from sgtm.masking.labels import removal_name

    prompt = _prompt(options)
    if options.top_k is not None and options.temperature == 0:
        raise ValueError(f"--top-k {options.top_k} draws tokens, and --temperature 0 draws none; set --temperature 1")
    sources = [find_model(path, options.data_path) for path in options.models]
    remove = listed_domains(options.remove)
    runs = [source for source in sources if source.config is not None]
    if remove and not runs:
        sources[0].removed(remove)  # raises
    removals = {source.path: [(), *([source.removed(remove)] if remove else [])] for source in runs}
    from sgtm.inference.decoding import Sampling, complete
    from sgtm.inference.text_model import open_models
    from sgtm.report.completions import print_completions

    sampling, completions = Sampling(options.temperature, options.top_k, options.seed), {}
    for source in sources:
        sets = removals.get(source.path, [()])
        alone = len(sources) == 1 and source.config is not None
        names = [removal_name(of) if alone else named(source.path, of) for of in sets]
        for model in open_models(source, sets, names):
            completions[model.name] = complete(model, prompt, options.tokens, sampling)
    print_completions(prompt, completions)


def listed_domains(words: list[str]) -> list[str]:
    """Those of `--remove`, each once."""
    return list(dict.fromkeys(domain for word in words for domain in word.split(",") if domain))  # no name has a comma


def named(path: Path, removed: tuple[str, ...]) -> str:
    """What output calls a model where there are several, such as `runs/mine without bio`."""
    from sgtm.masking.labels import removal_name

    return f"{path} {removal_name(removed)}" if removed else str(path)


def _prompt(options) -> str:
    if options.prompt_file is None:
        return options.prompt
    try:
        text = options.prompt_file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompt_file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    return text.removesuffix("\n")
