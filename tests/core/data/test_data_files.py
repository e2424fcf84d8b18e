"""Which files of a folder or repository are data: rules by example, and folders that are drawn."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.data_files import File, choose, split_of
from core.data.sources import open_sources
from core.errors import UserError


def read(*paths: str, **options) -> list[str]:
    return [file.path for file in choose([File(path, 1) for path in paths], **options).read]


def open_folder(path: Path, **options) -> tuple[list[str], str]:
    """(paths of the files that are read within the folder, what was said)."""
    said: list[str] = []
    sources = open_sources([str(path)], say=said.append, **options)
    return [str(Path(source.name).relative_to(path)) for source in sources], "\n".join(said)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"), ("data/train-00000-of-00002.parquet", "train"), ("training/a.txt", "train"),
        ("TinyStoriesV2-GPT4-valid.txt", "valid"), ("pretraining-test.jsonl", "test"),
        ("en/c4-validation.00000-of-00008.json.gz", "validation"), ("wiki.test.raw", "test"),
        ("train_test_split/part.jsonl", "test"), ("held-out/a.txt", "heldout"), ("x_held_out.txt", "heldout"),
        ("Dev/a.txt", "dev"), ("test2019.jsonl", "test"), ("eval/a.jsonl", "eval"),
        ("constraints.txt", None), ("trainers/a.txt", None), ("latest.jsonl", None), ("attest.txt", None),
        ("pretrained.txt", None), ("development.txt", None), ("upheld.outline.txt", None),
    ],
)  # fmt: skip
def test_splits_are_whole_words(path, split):
    assert split_of(path) == split


def test_other_splits_are_not_trained_on_and_train_is_not_held_out():
    paths = ("a.jsonl", "test/a.jsonl", "train-1.jsonl", "valid.jsonl")
    assert read(*paths) == ["a.jsonl", "train-1.jsonl"]
    assert read(*paths, published=True) == ["train-1.jsonl"]
    assert read(*paths, heldout=True) == ["a.jsonl", "test/a.jsonl", "valid.jsonl"]
    assert read(*paths, heldout=True, published=True) == ["test/a.jsonl", "valid.jsonl"]
    assert read("train.jsonl", heldout=True) == ["train.jsonl"]
    assert read("test.jsonl") == []


def test_only_the_form_of_the_data_is_read():
    assert read("urls.txt", "b.jsonl", "c.NDJSON") == ["b.jsonl", "c.NDJSON"]
    assert read("constraints.txt", "a/pretraining-test.jsonl", "LICENSE.txt", "a.txt") == ["a.txt"]
    files = [File("a.parquet", 10), File("a.jsonl", 9), File("a.txt", 1000)]
    assert choose(files).read == [files[0]]
    assert choose([*files, File("b.json.gz", 2)]).read == [files[1], File("b.json.gz", 2)]
    assert read("a.raw", "b.txt", "c.jsonl", form="text") == ["a.raw", "b.txt"]


def test_documentation_is_never_data():
    documentation = (
        "LICENSE",
        "License.md",
        "LICENSE-APACHE.txt",
        "README_en.txt",
        "robots.txt.gz",
        ".x.txt",
    )
    assert read(*documentation) == []
    assert read("README.jsonl", "dataset_info.json", "state.json") == ["README.jsonl"]
    assert read("noticed.txt", "licensed.txt") == ["licensed.txt", "noticed.txt"]


def test_of_several_compressions_one_is_read():
    assert read("a.jsonl.gz", "a.jsonl", "b/a.jsonl.gz", "a.json") == ["a.json", "a.jsonl", "b/a.jsonl.gz"]


def test_links_are_followed_and_what_is_behind_none_is_named(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for path in (folder / "deep", outside):
        path.mkdir(parents=True)
        (path / "a.txt").write_text("text")
    (folder / "again").symlink_to(folder)  # a cycle
    (folder / "deep/deep").symlink_to(folder / "deep")
    (folder / "linked").symlink_to(outside)
    (folder / "copy.txt").symlink_to(folder / "deep/a.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "missing")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    found, said = open_folder(folder)
    assert found == ["deep/a.txt", "linked/a.txt"]
    assert "copy.txt" in said and "broken.txt" in said and "loop.txt" in said and "again" in said
    with pytest.raises(UserError, match=r"broken\.txt is a broken link"):
        open_sources([str(folder / "broken.txt")])


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    for name in ("a", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.txt").write_text("text")
    scan = os.scandir  # what the suite's user may read, root may, so it is refused here

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("core.data.data_files.os.scandir", scandir)
    found, said = open_folder(tmp_path)
    assert found == ["a/b.txt"]
    assert "closed) in folders that cannot be read (Permission denied)" in said


def test_a_folder_that_would_mostly_not_be_read_is_refused(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("x" * 9999)
    with pytest.raises(
        UserError, match=r"holds no text to train on, but 1 file .*LICENSE\.txt\) of documentation"
    ):
        open_folder(tmp_path)
    (tmp_path / "part.json.gz").write_bytes(b"x" * 50)
    assert open_folder(tmp_path)[0] == ["part.json.gz"]
    (tmp_path / "table.csv").write_text("x" * 50)
    found, said = open_folder(tmp_path)
    assert found == ["part.json.gz"]
    assert "1 file (50 bytes: table.csv) of unknown format (.csv)" in said
    (tmp_path / "notes.txt").write_text("y")
    with pytest.raises(
        UserError, match=r"most of .* would not be read: .*table\.csv.*notes\.txt.*/\*\*/\*\.json\.gz'"
    ):
        open_folder(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/test.jsonl").write_text("z" * 9999)  # held-out files are left out on purpose
    (tmp_path / "notes.txt").unlink()
    assert open_folder(tmp_path)[0] == ["part.json.gz"]
    with pytest.raises(UserError, match=r"holds no text to train on, but .*test\.jsonl\) of the split test"):
        open_folder(tmp_path / "deep")
    assert open_folder(tmp_path / "deep", heldout=True) == (["test.jsonl"], "")


SEPARATORS = str.maketrans("/-.", "   ")
NAMES = st.builds(
    lambda parts, form, packed: "/".join(parts) + form + packed,
    st.lists(
        st.sampled_from(["a", "b", "train", "test-1", "LICENSE", ".git", "wiki valid"]),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["", ".txt", ".jsonl", ".JSON", ".parquet", ".csv"]),
    st.sampled_from(["", "", ".gz", ".zst"]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(NAMES, st.integers(0, 99), max_size=12), st.booleans(), st.booleans(),
    st.sampled_from([None, "text", "json"]),
)  # fmt: skip
def test_what_is_read_and_what_is_left_out_is_all_there_is(sizes, heldout, published, form):
    files = [File(path, size) for path, size in sizes.items()]
    choice = choose(files, heldout=heldout, form=form, published=published)
    left_out = [file for group in choice.left_out.values() for file in group]
    assert sorted([*choice.read, *left_out]) == sorted(files)
    assert all(choice.left_out.values()) and set(choice.foreign) <= set(choice.left_out)
    if not heldout:
        words = {word for file in choice.read for word in file.path.translate(SEPARATORS).split()}
        assert not words & {"test", "valid"}
