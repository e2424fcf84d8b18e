import bz2
import gzip
import itertools
import json
import lzma
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard

from core.data import file_source, hub_source
from core.data.file_source import cut_point
from core.data.sources import open_sources
from core.errors import UserError

TEXTS = ["First document.\n\nIts second paragraph.", "Zweites, mit Umlauten: äöü 😀", "", "third\r\n  line"]
PACK = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


def texts(*names: str, field: str = "text") -> list[str]:
    return [text for source in open_sources(list(names), field) for text, _ in source.documents()]


def jsonl(rows: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows)).encode()


def parquet(rows: list[str], field: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), field: rows}), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("packed", PACK)
def test_every_format_gives_the_same_documents(tmp_path, packed):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt{packed}").write_bytes(PACK[packed](text.encode()))
    array = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
    for name, content in (
        ("a.jsonl", jsonl(TEXTS)), ("b.ndjson", jsonl(TEXTS)), ("c.json", jsonl(TEXTS)), ("d.json", array),
        ("E.JSONL", b"\xef\xbb\xbf" + jsonl(TEXTS)), ("rows.parquet", parquet(TEXTS)),
    ):  # fmt: skip
        path = tmp_path / f"{name}{packed.upper() if name.isupper() else packed}"
        path.write_bytes(PACK[packed](content))
        assert texts(str(path)) == TEXTS, name
    assert texts(str(tmp_path / f"*.txt{packed}")) == TEXTS


def test_folders_globs_and_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/down/c.txt", "ignored.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(str(tmp_path)) == ["a.txt", "b.txt", "deep/down/c.txt"]
    assert texts(str(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "deep/down/c.txt"]
    assert texts(str(tmp_path / "b.txt"), str(tmp_path / "a.txt")) == ["b.txt", "a.txt"]


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x"], field="body"))
    (tmp_path / "a.parquet").write_bytes(parquet(["y"], field="body"))
    assert texts(str(tmp_path / "a.*"), field="body") == ["x", "y"]


def test_position_reaches_the_size(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(jsonl([f"text {i}" for i in range(5000)])))
    (source,) = open_sources([str(tmp_path / "a.jsonl.xz")])
    positions = [position for _, position in source.documents()]
    assert positions == sorted(positions)
    assert positions[-1] == source.size == (tmp_path / "a.jsonl.xz").stat().st_size


def test_long_text_is_cut_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(file_source, "LONG_TEXT", 1000)
    content = "\n\n".join(f"Paragraph {i} has äöü and words." * (1 + i % 5) for i in range(200))
    (tmp_path / "long.txt").write_text(content, encoding="utf-8")
    parts = texts(str(tmp_path / "long.txt"))
    assert "".join(parts) == content
    assert len(parts) > 10
    assert max(map(len, parts)) <= 1250
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_cut_point():
    assert cut_point("ab cd\nef\n\ngh", 1, within=20) == 10
    assert cut_point("ab cd\nef gh", 1, within=20) == 6
    assert cut_point("ab cd", 1, within=20) == 3
    assert cut_point("abcd", 1, within=20) == 1
    assert cut_point("ab cd\n\nef", 1, within=3) == 3


def damaged(data: bytes) -> bytes:
    return data[: len(data) // 2]


noise = np.random.default_rng(0).bytes(4000).hex()  # so that half a file is not a whole block


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl line 3 has no text in the field 'text'"),
        (
            "a.jsonl",
            b'{"body": "x"}\n',
            r"line 1 has no text in the field 'text' \(its fields: body\).*--field",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 has no text in the field 'text' but a number: remove such"),
        (
            "a.jsonl",
            b'{"data": {"text": "a"}, "n": 1, "tags": []}\n',
            r"\(its fields: data \(an object with 'text'\), n \(a number\), tags \(a list\)\): none of them",
        ),
        ("a.jsonl", b'{"text": [], "body": "x"}\n', r"\(its fields: text \(a list\), body\): .*--field"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl line 1 is not UTF-8 text"),
        ("a.txt", b"good \xff bad", r"a\.txt line 1 is not UTF-8 text"),
        (
            "a.parquet",
            parquet(["x"], field="body"),
            r"a\.parquet has no text in the column 'text' \(its columns: id \(int64\), body\)",
        ),
        ("a.parquet", parquet([{"v": "x"}]), r"text \(struct<v: string>\)\): none of them is a text"),
        ("a.parquet", parquet([["x"]]), r"text \(list<[a-z]+: string>\)\): none of them is a text"),
        ("a.parquet", parquet([b"x", b"\xff"]), r"a\.parquet row 2 is not UTF-8 text"),
        ("a.parquet", b"not parquet at all", r"a\.parquet cannot be read"),
        ("a.txt.gz", damaged(gzip.compress(noise.encode(), mtime=0)), r"a\.txt\.gz cannot be read"),
        ("a.txt.xz", damaged(lzma.compress(noise.encode())), r"a\.txt\.xz cannot be read"),
        ("a.txt.zst", damaged(PACK[".zst"](noise.encode())), r"a\.txt\.zst cannot be read"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz cannot be read"),
        ("a.csv", b"x,y", r"a\.csv has an unknown format .*train_tpu\.prepare .*a\.csv --format text"),
    ],
    ids=itertools.count(),  # of the contents' bytes they would be pages long
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(str(tmp_path / name))


def test_columns_of_bytes_and_of_dotted_names(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([text.encode() for text in TEXTS]))
    (tmp_path / "b.parquet").write_bytes(parquet(TEXTS, field="meta.text"))
    assert texts(str(tmp_path / "a.parquet")) == TEXTS
    assert texts(str(tmp_path / "b.parquet"), field="meta.text") == TEXTS


def test_a_format_can_be_given(tmp_path):
    for name in ("a.raw", "b", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.raw.gz").write_bytes(gzip.compress(b"d.raw.gz"))
    everything = open_sources([str(tmp_path)], form="text")
    found = [text for source in everything for text, _ in source.documents()]
    assert found == ["a.raw", "b", "c.txt", "d.raw.gz"]
    (source,) = open_sources([str(tmp_path / "b")], form="json")
    with pytest.raises(UserError, match="b line 1 is not JSON"):
        list(source.documents())


def test_one_file_is_read_once_and_said(tmp_path, capsys):
    """By whatever name, and in whatever compression."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "link.txt").symlink_to(path)
    (tmp_path / "b.txt").write_text("x")  # a copy under another name is another file
    assert texts(str(path), str(tmp_path / "*.txt*"), str(path)) == ["x", "x"]
    said = capsys.readouterr().out
    assert said.count("a.txt, which is the same or a copy of it, is read") == 4
    assert "a.txt.gz is left out" in said and "link.txt is left out" in said


def test_identity(tmp_path):
    """Changes with the file, the field and the form, and with how a form is read; a file that is read as ever
    has the identity that it always had, so that what was prepared of it is found."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    stat = path.stat()
    (source,) = open_sources([str(path)])
    assert source.identity() == f"{path} {stat.st_size} {stat.st_mtime_ns} text"
    assert open_sources([str(path)], form="text")[0].identity() == source.identity()
    assert open_sources([str(path)], form="json")[0].identity() == f"{source.identity()} json"
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"x"))
    (packed,) = open_sources([str(tmp_path / "a.txt.xz")])
    assert packed.identity().endswith(" text 2")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file, folder or glob '.*missing\.txt'"):
        texts(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="holds no text"):
        texts(str(tmp_path))
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="is a prepared dataset"):
        texts(str(tmp_path))


def test_tfds(tmp_path, monkeypatch):
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="some_text", version=tfds.core.Version("1.0.0"), data_dir=str(tmp_path / "some_text/1.0.0"),
        module_name="tests",
    )  # fmt: skip
    (tmp_path / "some_text/1.0.0").mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)})
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"text": text, "n": i} for i, text in enumerate(TEXTS)]})
    writer.close_all()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert texts("tfds:some_text") == TEXTS
    with pytest.raises(UserError, match=r"no feature 'body' \(its features: .*text"):
        texts("tfds:some_text", field="body")
    with pytest.raises(UserError, match="unknown TFDS dataset 'no_such_text'"):
        texts("tfds:no_such_text")


def test_tfds_that_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(
        UserError, match=r"tiny_shakespeare cannot be built without TensorFlow.*pip install tensor"
    ):
        texts("tfds:tiny_shakespeare")


class FakeHub:
    """Two methods of the hub's client, over a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloaded = []

    def dataset_info(self, dataset, files_metadata):
        if dataset != "someone/stories":
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")
        files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        siblings = [
            types.SimpleNamespace(rfilename=str(p.relative_to(self.folder)), size=p.stat().st_size)
            for p in files
        ]
        configs = [
            {"config_name": "sample-1", "data_files": [{"split": "train", "path": "one/train-*"}]},
            {
                "config_name": "sample-2",
                "data_files": [
                    {"split": "train", "path": ["two/*", "one/train-1.jsonl"]},
                    {"split": "test", "path": "one/*"},
                ],
            },
            {"config_name": "sample-3", "data_files": "two/*"},
        ]
        card = huggingface_hub.DatasetCardData(configs=configs)
        return types.SimpleNamespace(sha="abc", siblings=siblings, card_data=card)

    def download(self, dataset, file, repo_type, revision):
        assert (repo_type, revision) == ("dataset", "abc")
        self.downloaded.append(file)
        return str(self.folder / file)


def test_hub(tmp_path, monkeypatch, capsys):
    for name in (
        "one/train-0.jsonl",
        "one/train-1.jsonl",
        "one/test-0.jsonl",
        "two/train-0.jsonl",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(hub_source, "require_reachable", lambda what: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    assert texts("hf:someone/stories:one") == ["one/train-0.jsonl", "one/train-1.jsonl"]
    assert texts("hf:someone/stories:sample-1") == ["one/train-0.jsonl", "one/train-1.jsonl"]
    assert texts("hf:someone/stories:sample-2") == ["one/train-1.jsonl", "two/train-0.jsonl"]
    assert texts("hf:someone/stories:sample-3") == ["two/train-0.jsonl"]
    hub.downloaded.clear()
    (source,) = open_sources(["hf:someone/stories"])
    documents = source.documents()
    next(documents)
    assert hub.downloaded == ["one/train-0.jsonl"]  # one by one: the rest is not fetched yet
    assert len(list(documents)) == 2
    assert texts("hf:someone/stories:one/test*") == ["one/test-0.jsonl"]  # a glob takes what it names
    assert texts("hf:someone/stories:test") == ["one/test-0.jsonl"]
    (heldout,) = open_sources(["hf:someone/stories"], heldout=True)
    assert [text for text, _ in heldout.documents()] == ["one/test-0.jsonl"]
    capsys.readouterr()
    open_sources(["hf:someone/stories"])
    said = capsys.readouterr().out
    assert "README.md) of documentation" in said and "one/test-0.jsonl) of the split test" in said
    with pytest.raises(UserError, match=r"no .* file in its configuration or folder 'three'"):
        texts("hf:someone/stories:three")
    with pytest.raises(
        UserError, match=r"not download someone/else .*offline.*check the name and your connection"
    ):
        texts("hf:someone/else")
