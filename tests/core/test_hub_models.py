"""Names on the Hub: what is downloaded, from where it is taken, and what is refused in one sentence."""

import errno
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest

from core import hub, hub_models
from core.errors import UserError
from core.hub_models import is_content_of, local, origin, parse_hub_name, pinned
from tests.hub import COMMIT, Hub, point_at, write_snapshot

MODEL = Path("hf:me/tiny")
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{} ",
    "tokenizer_config.json": b"{}  ",
}
OTHERS = {
    "README.md": b"a card",
    "modeling_tiny.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"another format",
    "consolidated.safetensors": b"the weights once more",
}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "../outside.safetensors"}}
    ).encode(),
    "part-1.safetensors": b"one",
    "part-2.safetensors": b"two",
    "part-3.safetensors": b"not in the index",
    "tokenizer.model": b"pieces",
}


def away(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No Hub: whoever asks for it fails the test."""
    point_at(monkeypatch, "http://127.0.0.1:9", cache)
    monkeypatch.setattr(hub_models, "require_reachable", lambda what: pytest.fail(f"asks the Hub: {what}"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name", ["hf:", "hf:tiny", "hf:me/", "hf:/tiny", "hf:me /tiny", "hf:me/ti ny", "hf:a/b/c"]
)
@pytest.mark.parametrize("end", ["", "@main"])
def test_a_misspelt_name_is_refused_unasked(name: str, end: str, served: Hub):
    with pytest.raises(UserError, match=r"is no name on the Hugging Face Hub: give hf:OWNER/NAME, or"):
        local(Path(name + end))
    assert not served.asked


@pytest.mark.parametrize(
    "name", ["hf:me/tiny@", "hf:me/tiny@a b", "hf:me/tiny@../x", "hf:a--b/c", "hf:a/b..c", "hf:-a/b"]
)
def test_what_the_hub_does_not_take_is_refused(name: str):
    with pytest.raises(UserError, match="is no name"):
        parse_hub_name(Path(name))


def test_names(tmp_path: Path):
    assert parse_hub_name(Path("hf:me/tiny-1.5B_x")) == ("me/tiny-1.5B_x", "main")
    assert parse_hub_name(Path("hf:me/tiny@refs/pr/3")) == ("me/tiny", "refs/pr/3")
    assert local(tmp_path) == pinned(tmp_path) == tmp_path
    for find in (local, pinned):
        with pytest.raises(UserError, match="is not there: give a folder, or hf:OWNER/NAME"):
            find(tmp_path / "me" / "tiny")


def test_a_model_is_downloaded_without_pickles_and_code(served: Hub, tmp_path: Path, capsys):
    served.models["me/tiny"] = FILES | OTHERS
    folder = local(MODEL)
    assert contents(folder) == FILES
    assert served.downloaded() == sorted(FILES)
    assert f"hf:me/tiny: commit {COMMIT}, downloaded, in {folder}" in capsys.readouterr().err
    assert origin(folder) == f"hf:me/tiny@{COMMIT}"
    assert pinned(MODEL) == Path(f"hf:me/tiny@{COMMIT}")


def test_of_weights_in_parts_those_of_the_index_are_downloaded(served: Hub):
    served.models["me/tiny"] = SHARDED
    wanted = {name: content for name, content in SHARDED.items() if name != "part-3.safetensors"}
    assert contents(local(MODEL)) == wanted


@pytest.mark.parametrize("name", ["hf:me/tiny", "hf:me/tiny@main", f"hf:me/tiny@{COMMIT}"])
@pytest.mark.parametrize("files", [FILES, SHARDED])
def test_a_whole_copy_is_taken_from_the_cache(name, files, monkeypatch, tmp_path, capsys):
    snapshot = write_snapshot(tmp_path, "me/tiny", files)
    away(monkeypatch, tmp_path)
    assert local(Path(name)) == snapshot
    assert "from the cache" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_copy_that_is_not_whole_is_completed(missing: str, served: Hub, tmp_path: Path):
    served.models["me/tiny"] = FILES
    snapshot = write_snapshot(tmp_path / "cache", "me/tiny", FILES)
    (snapshot / missing).resolve().unlink()
    assert local(MODEL) == snapshot
    assert served.downloaded() == [missing] and contents(snapshot) == FILES


def test_another_revision_is_another_copy(served: Hub, tmp_path: Path):
    served.models["me/tiny"] = FILES
    write_snapshot(tmp_path / "cache", "me/tiny", FILES)
    local(Path("hf:me/tiny@v1"))
    assert "GET /api/models/me/tiny/revision/v1" in served.asked
    with pytest.raises(
        UserError, match=r"^hf:me/tiny@v2 is not there: see .*/me/tiny/tree/main for branches"
    ):
        local(Path("hf:me/tiny@v2"))


def test_a_download_that_breaks_off_continues_where_it_was(served: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    served.models["me/tiny"] = FILES
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served.cut.add("model.safetensors")
    assert contents(local(MODEL)) == FILES
    resumed = [line for line in served.asked if " from " in line]
    assert resumed == [f"GET /me/tiny/resolve/{COMMIT}/model.safetensors from 3000"]


def test_what_is_complete_is_not_downloaded_again(served: Hub, monkeypatch: pytest.MonkeyPatch):
    served.models["me/tiny"] = FILES
    served.errors["model.safetensors"] = (500, "")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(
        UserError, match=r"^hf:me/tiny could not be downloaded \(.*\): run the same command again"
    ):
        local(MODEL)
    served.errors.clear()
    served.asked.clear()
    assert contents(local(MODEL)) == FILES
    assert served.downloaded() == ["model.safetensors"]


@pytest.mark.parametrize(
    ("files", "error", "sentence"),
    [
        (None, None, "^there is no model hf:me/tiny, or it is private: .*/me/tiny, and .*`hf auth login`"),
        (FILES, (401, ""), r"^hf:me/tiny may not be read \(.*\): log in with `hf auth login`"),
        (FILES, (403, ""), r"^hf:me/tiny may not be read \(.*\): log in with `hf auth login`"),
        (FILES, (403, "GatedRepo"), "^hf:me/tiny is gated: accept .* on .*/me/tiny, .*`hf auth login`"),
        ({"README.md": b""}, None, "^hf:me/tiny has no config.json: see .*/me/tiny/tree/main"),
        ({"config.json": b"", "pytorch_model.bin": b""}, None, "model.bin, a pickle, .* is not downloaded"),
        ({"config.json": b"", "model.gguf": b""}, None, "has neither model.safetensors nor model.safe"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_sentence(files, error, sentence, served: Hub):
    if files is not None:
        served.models["me/tiny"] = files
    if error:
        served.errors["me/tiny"] = error
    with pytest.raises(UserError, match=sentence) as refused:
        local(MODEL)
    assert "\n" not in str(refused.value)
    assert not served.downloaded()


def test_terms_that_are_not_accepted_show_at_the_first_file(served: Hub):
    served.models["me/tiny"] = FILES
    served.errors |= dict.fromkeys(FILES, (403, "GatedRepo"))
    with pytest.raises(UserError, match=r"^hf:me/tiny is gated"):
        local(MODEL)


def test_a_full_disk_is_told_first(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    served.models["me/tiny"] = FILES
    free = shutil.disk_usage(tmp_path)._replace(free=7000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=rf"the disk of {tmp_path}/cache has .* set HF_HOME"):
        local(MODEL)
    assert not served.downloaded()


def test_a_disk_that_becomes_full_is_told_as_everywhere(served: Hub, monkeypatch: pytest.MonkeyPatch):
    served.models["me/tiny"] = FILES

    def download(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError, match="No space left"):  # core.errors.tell makes a sentence of it
        local(MODEL)


def test_offline_without_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(
        UserError, match=r"^hf:me/tiny is not complete in this machine's cache, and .*refused"
    ):
        local(MODEL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "why_unreachable", lambda: pytest.fail("asks the Hub"))
    with pytest.raises(UserError, match="cache, and HF_HUB_OFFLINE forbids"):
        local(MODEL)


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_cache_stay_in_it(shared: bool, tmp_path: Path):
    snapshot = write_snapshot(tmp_path / "cache", "me/tiny", FILES, shared)
    for file in FILES:
        assert is_content_of(snapshot, (snapshot / file).resolve())
    (tmp_path / "link").symlink_to(snapshot)
    assert origin(tmp_path / "link") == f"hf:me/tiny@{COMMIT}"
    assert is_content_of(tmp_path / "link", (snapshot / "config.json").resolve())


def test_a_folder_that_only_looks_like_the_cache_is_none(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    snapshot = write_snapshot(tmp_path / "cache", "me/tiny", FILES)
    repository = snapshot.parents[1]
    for target in (outside, tmp_path / "cache" / "blobs" / outside.name, repository / "refs" / "main"):
        assert not is_content_of(snapshot, target)
    # Named like a snapshot, in another place or without contents.
    for other in (repository / COMMIT, repository / "snapshots" / "main", tmp_path / "snapshots" / COMMIT):
        other.mkdir(parents=True)
        assert origin(other) is None and not is_content_of(other, repository / "blobs" / "x")
    # The folder of contents is itself a link.
    (repository / "blobs").rename(tmp_path / "moved")
    (repository / "blobs").symlink_to(tmp_path / "moved")
    assert not is_content_of(snapshot, (snapshot / "config.json").resolve())
