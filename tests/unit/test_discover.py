"""Any tree of files, links, hidden names and compressions: each real record is read once, all else is accounted for."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from corpora import record, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sgtm.data.discover import ABOVE, AGAIN, BROKEN, HIDDEN, SPECIAL, WRITTEN, find_sources, open_sources
from sgtm.data.prepare import prepare
from sgtm.data.readers import Source
from sgtm.data.rules import Rules

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".zstd": zstandard.ZstdCompressor().compress,
}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(texts: list[str], delimiter: str) -> bytes:
    rows = csv.writer(buffer := io.StringIO(newline=""), delimiter=delimiter)
    rows.writerows([["text"], *([text] for text in texts)])
    return buffer.getvalue().encode()


def columns(texts: list[str]) -> bytes:
    parquet.write_table(pa.table({"text": texts}), buffer := io.BytesIO())
    return buffer.getvalue()


WRITE = {
    ".txt": lambda texts: texts[0].encode(),
    ".jsonl": lines,
    ".ndjson": lines,
    ".jsonlines": lines,
    ".JSONL": lines,
    ".json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    ".csv": lambda texts: table(texts, ","),
    ".tsv": lambda texts: table(texts, "\t"),
    ".parquet": columns,
}
UNREAD = (".md", ".py", ".docx", ".tar.gz", "")


def texts_of(sources: list[Source]) -> list[str]:
    return [
        entry.fields["text"] for source in sources for block in source.blocks(["text"]) for entry in block.records()
    ]


@st.composite
def trees(draw) -> list[tuple]:
    """Steps that make a tree: (kind, folder or target by number, name, suffix)."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["folder", "file", "file", "file", "link", "link", "hard link", "broken", "unread"]),
                st.integers(0, 30),
                st.integers(0, 30),
                st.sampled_from(["a", "b", "c", ".h"]),
                st.sampled_from(list(WRITE)),
                st.sampled_from(list(COMPRESS)),
                st.sampled_from(UNREAD),
            ),
            max_size=25,
        )
    )
    return steps


def make(root: Path, steps: list[tuple]) -> dict[Path, list[str]]:
    """Makes the tree; the texts of each real file. Links lead anywhere in it, also to folders above and to links."""
    folders, everything, contents = [root], [root], {}
    for number, (kind, where, target, name, suffix, compression, unread) in enumerate(steps):
        folder, target = folders[where % len(folders)], everything[target % len(everything)]
        path = folder / f"{name}{number}"
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "file":
            compression = "" if suffix == ".parquet" else compression
            path = path.with_name(path.name + suffix + compression)
            texts = [f"text {number} {part}" for part in range(1 if suffix == ".txt" else 3)]
            path.write_bytes(COMPRESS[compression](WRITE[suffix](texts)))
            contents[path] = texts
        elif kind == "unread":
            (path := path.with_name(path.name + unread)).write_text("not to be read")
        elif kind == "broken":
            path.symlink_to(folder / "nothing.jsonl")
        else:
            endings = "".join(target.suffixes) if target.is_file() else ""
            path = path.with_name(path.name + endings)
            if kind == "hard link":
                if not target.is_file():
                    continue
                os.link(target, path)
            else:
                path.symlink_to(os.path.relpath(target, folder))
        everything.append(path)
    return contents


def names_in(root: Path) -> list[Path]:
    """Every name that is not hidden nor in a hidden folder; without what lies behind links."""
    paths = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if not name.startswith(".")]
        paths += [Path(folder, name) for name in [*inside, *files] if not name.startswith(".")]
    return paths


def reachable(root: Path) -> set[Path]:
    """Real paths of the folders that a search from the root gets to, whatever it does to read each once."""
    folders, to_do = set(), [root]
    while to_do:
        folder = to_do.pop().resolve()
        if folder not in folders:
            folders.add(folder)
            to_do += [child for child in folder.iterdir() if child.name[0] != "." and child.is_dir()]
    return folders


@settings(max_examples=150, deadline=None)
@given(trees())
def test_each_real_record_is_read_once_and_everything_else_is_counted(steps):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "data"
        root.mkdir()
        contents = make(root, steps)
        seen = [child for folder in reachable(root) for child in folder.iterdir()]
        by_file = {(path.stat().st_dev, path.stat().st_ino): texts for path, texts in contents.items()}
        visible = [child for child in seen if child.name[0] != "." and child.is_file()]
        inodes = {(child.stat().st_dev, child.stat().st_ino) for child in visible}
        expected = sorted(text for key, texts in by_file.items() if key in inodes for text in texts)
        if not expected:
            with pytest.raises(ValueError, match="nothing to read"):
                find_sources([root])
            return
        sources, account = find_sources([root])
        assert sorted(texts_of(sources)) == expected
        folders = len(reachable(root)) - 1
        passed = sum(map(len, account.passed.values()))
        assert len(seen) == account.read.total() + account.unread.total() + passed + folders
        assert len(account.passed.get(HIDDEN, [])) == sum(child.name[0] == "." for child in seen)
        assert len(account.passed.get(BROKEN, [])) == sum(not child.exists() for child in seen if child.name[0] != ".")
        read, *others = map(printed, account.lines())
        assert read == account.read.total() and sum(others) == account.unread.total() + passed
        again = find_sources([root / "..", *names_with_records(root), root, root])
        assert sorted(texts_of(again.sources)) == expected, "overlapping and repeated folders"


def printed(line: str) -> int:
    """The sum of the numbers in a line of the account, without the paths in brackets."""
    return sum(int(number.replace(",", "")) for number in re.findall(r"(?<= )[\d,]+(?= )", line.split(" (")[0] + " "))


def names_with_records(root: Path) -> list[Path]:
    """Folders in the tree that are not empty when read alone."""
    return [path for path in names_in(root) if path.is_dir() and not path.is_symlink() and _reads(path)][:3]


def _reads(path: Path) -> bool:
    try:
        return bool(open_sources([path]))
    except ValueError:
        return False


def tree(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(root / path, [record(number)])
    return root


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    data = tree(tmp_path, "data/a/x.jsonl", "other.jsonl").joinpath("data")
    (data / "a/up").symlink_to("..")
    (data / "a/out").symlink_to("../..")
    sources, account = find_sources([data])
    assert len(texts_of(sources)) == 1
    assert account.passed == {ABOVE: [data / "a/out", data / "a/up"]}
    assert texts_of(open_sources([data / "a/out/other.jsonl"])) == [record(1)["text"]], "what is named is read"


def test_a_link_out_of_the_tree_is_followed(tmp_path):
    data = tree(tmp_path, "data/a.jsonl", "far/b.jsonl", "far/c/d.jsonl").joinpath("data")
    (data / "far").symlink_to("../far")
    (data / "z.jsonl").symlink_to("../far/c/d.jsonl")
    (tmp_path / "far/back").symlink_to("../data")
    sources, account = find_sources([data])
    assert len(texts_of(sources)) == 3
    assert account.passed == {AGAIN: [data / "far/back", data / "z.jsonl"]}


def test_the_name_that_is_no_link_counts(tmp_path):
    """The folder of a text file is its category."""
    (tmp_path / "virology").mkdir()
    (tmp_path / "all").mkdir()
    (tmp_path / "virology/a.txt").write_text("text")
    (tmp_path / "all/a.txt").symlink_to("../virology/a.txt")
    (source,), account = find_sources([tmp_path])
    assert source.files == [tmp_path / "virology/a.txt"] and account.passed == {AGAIN: [tmp_path / "all/a.txt"]}


def test_a_link_whose_target_has_another_kind_of_name_is_read(tmp_path):
    """As in the cache of the Hugging Face hub."""
    (tmp_path / "blobs").mkdir()
    write_jsonl(tmp_path / "blobs/0a1b", [record(0)])
    for snapshot in ("one", "two"):
        (tmp_path / "snapshots" / snapshot).mkdir(parents=True)
        (tmp_path / "snapshots" / snapshot / "x.jsonl").symlink_to("../../blobs/0a1b")
    sources, account = find_sources([tmp_path])
    assert len(texts_of(sources)) == 1 and account.unread == Counter({"without a suffix": 1})
    assert account.passed == {AGAIN: [tmp_path / "snapshots/two/x.jsonl"]}


def test_a_path_of_the_command_line_is_read_whatever_its_name(tmp_path):
    data = tree(tmp_path, ".cache/a.jsonl", ".cache/.b.jsonl").joinpath(".cache")
    assert len(texts_of(open_sources([data]))) == 1
    assert len(texts_of(open_sources([data, data / ".b.jsonl"]))) == 2


def test_the_account_is_printed_and_an_error_has_it(tmp_path):
    tree(tmp_path, "d/a.jsonl", "d/b.NDJSON", "d/.h.jsonl", "d/c.md", "d/e.md", "d/f.tar.gz")
    assert find_sources([tmp_path / "d"]).account.lines() == [
        "reading 1 .jsonl, 1 .ndjson",
        "passed over, of a kind that is not read: 2 .md, 1 .tar.gz",
        f"passed over, hidden: 1 ({tmp_path / 'd/.h.jsonl'})",
    ]
    tree(tmp_path, "e/c.md", "e/.ipynb_checkpoints/a.jsonl")
    with pytest.raises(ValueError, match=r"nothing to read in .*(?s:.)*: 1 \.md(?s:.)*hidden: 1 .*\.ipynb_checkpoints"):
        open_sources([tmp_path / "d", tmp_path / "e"])


def test_what_is_neither_file_nor_folder(tmp_path):
    data = tree(tmp_path, "data/a.jsonl").joinpath("data")
    os.mkfifo(data / "b.jsonl")
    assert find_sources([data]).account.passed == {SPECIAL: [data / "b.jsonl"]}
    with pytest.raises(ValueError, match=r"b\.jsonl is neither file nor folder"):
        open_sources([data / "b.jsonl"])


def test_a_corpus_inside_the_data_is_not_data(tmp_path):
    """Its tokenizer.json and job.json have the name of input."""
    data = write_jsonl(tmp_path / "data.jsonl", [record(number) for number in range(9)]).parent
    rules = Rules.model_validate({"split": {"field": "split"}, "labels": {"en": "retain"}})
    for _ in range(2):
        sources, account = find_sources([data])
        prepare(sources, rules, "train", tmp_path / "corpus", vocab_size=257, workers=1)
    assert account.passed == {WRITTEN: [tmp_path / "corpus"]}
    with pytest.raises(ValueError, match=r"nothing to read in .*corpus(?s:.)*folders that prepare has written: 1"):
        open_sources([tmp_path / "corpus"])


def test_a_url_is_no_file():
    with pytest.raises(ValueError, match=r"^s3://bucket/a\.jsonl is a URL, but DATA takes local files and folders"):
        find_sources(["s3://bucket/a.jsonl"])


def test_another_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("text;category\na;b\n")
    (source,) = find_sources([tmp_path / "a.csv"]).sources
    with pytest.raises(ValueError, match=r"a\.csv:1: semicolons divide the fields of this row, but it takes commas"):
        list(source.blocks(["category", "text"]))
