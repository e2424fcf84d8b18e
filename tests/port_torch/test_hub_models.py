"""The commands on a model of the Hub, and which links of its cache a folder may hold."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import port_torch.convert
import port_torch.generate
import port_torch.import_checkpoint
import port_torch.train
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest, seal
from core.checkpoint.steps import find_step
from core.errors import UserError
from core.tokenizer import load_tokenizer
from eval.models import open_model
from eval.settings import require_model
from port_torch.card import model_card
from port_torch.export import CODE, without_local_paths
from port_torch.folder import inside, open_folder
from port_torch.hf_tokenizer import write_tokenizer
from port_torch.model import load
from port_torch.training.pretrained import open_pretrained
from tests.hub import COMMIT, Hub, point_at, write_snapshot
from tests.models import random_params
from tests.port_torch.folders import SMALL, manifest_of, tensors_of, write_folder
from tests.port_torch.small_training import call, finetune_here

NAME = f"hf:me/tiny@{COMMIT}"
CONFIG = SMALL["llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_folder(folder, CONFIG, tensors_of(CONFIG, random_params(CONFIG)))
    write_tokenizer(folder, load_tokenizer("bytes"), CONFIG.context)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cached(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Llama in a cache, and no Hub."""
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    return write_snapshot(tmp_path / "cache", "me/tiny", files_of(folder))


def assert_same_model(one: Path, other: Path) -> None:
    ours, theirs = load(one).state_dict(), load(other).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_import_and_generate_take_a_name(served: Hub, folder: Path, tmp_path: Path, monkeypatch, capsys):
    served.models["me/tiny"] = files_of(folder)
    assert call(monkeypatch, port_torch.import_checkpoint, "hf:me/tiny", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert f"imported {NAME} (llama)" in printed.out
    assert f"hf:me/tiny: commit {COMMIT}, downloaded" in printed.err
    (entry,) = load_manifest(tmp_path / "out").lineage
    assert (entry["operation"], entry["path"]) == ("import", NAME)
    assert without_local_paths(load_manifest(tmp_path / "out")).lineage == [entry]
    served.asked.clear()
    options = ("--prompt", "a", "--max-new-tokens", "4", "--device", "cpu", "--temperature", "0")
    call(monkeypatch, port_torch.generate, "hf:me/tiny", *options)
    from_name = capsys.readouterr().out
    call(monkeypatch, port_torch.generate, folder, *options)
    assert from_name == capsys.readouterr().out
    assert not served.asked


def test_what_starts_from_a_name_says_its_commit(cached: Path):
    lineage = open_pretrained(Path("hf:me/tiny"), "finetune", None).lineage
    assert lineage[-1]["path"] == NAME
    manifest = dataclasses.replace(manifest_of(CONFIG), lineage=lineage)
    card = model_card("tuned", CONFIG, manifest, [], load_tokenizer("bytes"))
    assert "base_model: me/tiny\n" in card and "license:" not in card and f"path {NAME}" in card
    assert "from scratch" not in card
    assert "license: mit" in model_card("ours", CONFIG, manifest_of(CONFIG), [], load_tokenizer("bytes"))


def test_every_held_out_set_has_its_own_results_for_the_hub():
    """As huggingface_hub reads them: sets of one type were merged under the first name."""
    rows = [
        {"split": split, "bits_per_byte": nll / 3, "nll": nll, "perplexity": 2**nll}
        for split, nll in (("wikipedia", 3.0), ("books", 4.0))
    ]
    card = model_card("ours", CONFIG, manifest_of(CONFIG), rows, load_tokenizer("bytes"))
    read = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(card).data.eval_results}
    metrics = ("bits_per_byte", "nll", "perplexity")
    assert read == {(row["split"], metric): row[metric] for row in rows for metric in metrics}


def test_what_others_made_is_not_said_to_be_ours(folder: Path, tmp_path: Path, monkeypatch):
    """A folder of this machine: what is exported of it has its license, whatever that is, and not ours."""
    started = open_pretrained(folder, "finetune", None).lineage
    assert call(monkeypatch, port_torch.import_checkpoint, folder, tmp_path / "base") == 0
    imported = load_manifest(tmp_path / "base").lineage
    for lineage in (started, imported):
        manifest = dataclasses.replace(manifest_of(CONFIG), lineage=lineage)
        card = model_card("tuned", CONFIG, manifest, [], load_tokenizer("bytes"))
        assert "license:" not in card and "from scratch" not in card and str(folder.parent) not in card
        assert f"from weights that were imported (`{folder.name}`), whose license applies" in card
    call(monkeypatch, port_torch.convert, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out/LICENSE").exists()


@pytest.mark.slow
def test_training_records_the_commit_and_resumes(cached: Path, folder: Path, tmp_path: Path, monkeypatch):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}."}) + "\n" for i in range(8)))
    options = ("--data", rows, "--out", out, "--batch", "2", "--validation", "0", "--lora-rank", "2")
    assert finetune_here(monkeypatch, "hf:me/tiny", *options, "--steps", "1") == 0
    assert json.loads((out / "config.json").read_text())["run"]["init_from"] == NAME
    assert load_manifest(find_step(out)).lineage[-1]["path"] == NAME
    # The same model from a folder of real files: what it is counts, not where it is.
    more = ("--steps", "2", "--allow-change", "steps")
    assert finetune_here(monkeypatch, folder, *options, *more) == 0
    assert load_manifest(find_step(out)).step == 2


@pytest.mark.slow
def test_pretraining_starts_from_a_name(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("\n\n".join(f"Paragraph {i} of a text, for a test." for i in range(400)))
    options = ("--data", text, "--out", out, "--steps", "1", "--batch", "2", "--eval-windows", "1")
    assert call(monkeypatch, port_torch.train, "--from", "hf:me/tiny", *options) == 0
    assert load_manifest(find_step(out)).lineage[-1]["path"] == NAME
    assert json.loads((out / "config.json").read_text())["run"]["init_from"] == NAME


def test_evaluation_takes_a_name_and_a_folder_of_the_cache(cached: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_model(Path("hf:me/tiny"))  # without looking for it
    with pytest.raises(UserError, match=r"'hf:tiny' is no name"):
        require_model(Path("hf:tiny"))
    model = open_model(cached, "float32", "cpu")
    assert model.identity["name"] == NAME
    assert model.results == tmp_path / "tiny-eval"


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_cache_is_opened(shared: bool, folder: Path, tmp_path: Path):
    snapshot = write_snapshot(tmp_path, "me/tiny", files_of(folder), shared)
    assert_same_model(snapshot, folder)


@pytest.mark.parametrize("where", ["snapshot", "content", "shared content"])
@pytest.mark.parametrize("target", ["secret", "ab/secret"])
def test_what_leads_out_of_the_cache_is_refused(where: str, target: str, folder: Path, tmp_path: Path):
    """Also by a second link, and to a file that lies where shared contents do and is none."""
    snapshot = write_snapshot(tmp_path / "cache", "me/tiny", files_of(folder), where == "shared content")
    secret = tmp_path / "cache" / "blobs" / target if "/" in target else tmp_path / target
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("{}")
    link = snapshot / "config.json"
    if where != "snapshot":
        link = link.parent / link.readlink()
    if where == "shared content":
        link = link.resolve()
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(UserError, match=r"is a link to .*secret, outside of its folder.*hf download REPO"):
        open_folder(snapshot)


def test_contents_of_another_model_are_refused(folder: Path, tmp_path: Path):
    snapshot = write_snapshot(tmp_path, "me/tiny", files_of(folder))
    other = write_snapshot(tmp_path, "me/other", {"config.json": b"{ }"})
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to((other / "config.json").resolve())
    with pytest.raises(UserError, match="outside of its folder"):
        inside(snapshot, "config.json")


def test_an_export_without_its_code_is_whole(folder: Path, tmp_path: Path):
    """Code is neither downloaded nor run; every other file must be there."""
    export = tmp_path / "export"
    shutil.copytree(folder, export)
    for name in (*CODE, "LICENSE"):
        (export / name).write_text(name)
    seal(export, manifest_of(CONFIG), EXPORT_MANIFEST)
    for name in CODE:
        (export / name).unlink()
    open_folder(export)
    (export / "LICENSE").unlink()
    with pytest.raises(UserError, match="LICENSE is missing"):
        open_folder(export)
