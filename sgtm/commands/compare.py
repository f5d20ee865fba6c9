"""`sgtm compare`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.generate import REMOVE, listed_domains, named
from sgtm.commands.options import DATA, Subcommands, check_output, natural


def add(commands: Subcommands) -> None:
    about = "losses of two models on the documents of a file, token by token"
    usage = "%(prog)s A [B] --data FILE [--remove DOMAIN [DOMAIN ...]] [--show N] [--html OUT] [--data.path DIR] [-h]"
    parser = commands.add("compare", run, about, usage=usage)
    parser.add_argument("first", type=Path, metavar="A", help="run directory or exported folder")
    second = "the same, to compare with A (default: A without the domains of --remove)"
    parser.add_argument("second", type=Path, nargs="?", metavar="B", help=second)
    data = "documents to read: .txt (one), JSON, csv or parquet with a field `text`, compressed or not; or a folder"
    parser.add_argument("--data", dest="file", type=Path, required=True, metavar="FILE", help=data)
    parser.add_argument("--remove", nargs="+", default=[], metavar="DOMAIN", help=f"{REMOVE.replace('the runs', 'B')}")
    show = "documents whose tokens are shown in colour, from the first on (default: 3)"
    parser.add_argument("--show", type=natural, default=3, metavar="N", help=show)
    parser.add_argument("--html", type=Path, metavar="OUT", help="file to write the comparison to, as HTML")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.data.discover import open_sources
    from sgtm.inference.sources import find_model

    remove, beside = listed_domains(options.remove), options.second or options.first
    if options.second is None and not remove:
        raise ValueError(f"{options.first} is compared with nothing: give a second model, or --remove DOMAIN")
    sources = [find_model(path, options.data_path) for path in (options.first, beside)]
    removed = sources[1].removed(remove)
    same = sources[0].path.resolve() == sources[1].path.resolve()
    if same and not removed:
        raise ValueError(f"{options.first} is compared with itself: give another model, or --remove DOMAIN")
    open_sources([options.file])  # before anything heavy is imported
    if options.html is not None:
        check_output("--html", options.html, options.file, *(source.path for source in sources))
    from sgtm.inference.comparison import compare_models
    from sgtm.inference.text_losses import read_texts
    from sgtm.inference.text_model import open_models
    from sgtm.report.compared_text import print_comparison_of_texts, write_comparison_of_texts

    if same:
        first, second = open_models(sources[0], [(), removed])
    else:
        (first,) = open_models(sources[0], names=[named(sources[0].path, ())])
        (second,) = open_models(sources[1], [removed], [named(sources[1].path, removed)])
    comparison = compare_models(first, second, read_texts(options.file), options.show)
    print_comparison_of_texts(comparison)
    if options.html is not None:
        print(write_comparison_of_texts(comparison, options.html))
