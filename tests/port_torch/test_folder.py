"""Folders of weights: what is whole comes back bit for bit, what was changed or leads out is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.checkpoint.manifest import EXPORT_MANIFEST
from core.errors import UserError
from core.tokenizer import load_tokenizer
from port_torch.folder import open_folder
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.hf_tokenizer import write_tokenizer
from tests.models import random_params
from tests.port_torch.folders import SMALL, tensors_of, write_export, write_folder

CONFIG = SMALL["llama"]
PARAMS = random_params(CONFIG)
NORM = "model.norm.weight"


@pytest.fixture
def export(tmp_path) -> Path:
    return write_export(tmp_path / "export", CONFIG, PARAMS)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Two files and an index, without a manifest."""
    tensors = tensors_of(CONFIG, PARAMS)
    folder = write_folder(tmp_path / "sharded", CONFIG, {NORM: tensors.pop(NORM)})
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    save_file(tensors, folder / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def refuse(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_in_their_type(tmp_path, dtype):
    tensors = tensors_of(CONFIG, PARAMS, dtype)
    folder = open_folder(write_folder(tmp_path / "folder", CONFIG, tensors))
    assert folder.tensors.keys() == tensors.keys() and folder.manifest is None
    assert folder.config["hidden_size"] == CONFIG.d_model
    for name, tensor in tensors.items():
        assert folder.tensors[name].shape == tensor.shape
        assert f"torch.{folder.tensors[name].dtype}" == str(dtype) == str(folder.read(name).dtype)
        assert torch.equal(folder.read(name), tensor)
        assert folder.read_float32(name).dtype == np.float32
        assert np.array_equal(folder.read_float32(name), tensor.float().numpy())


def test_shards_are_one_folder(sharded):
    folder, tensors = open_folder(sharded), tensors_of(CONFIG, PARAMS)
    assert folder.tensors.keys() == tensors.keys()
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors.items())


def test_an_export_is_proved_by_its_manifest(export):
    assert open_folder(export).manifest.step == 7
    (export / ".gitattributes").write_text("what the hub keeps beside it")
    open_folder(export)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", EXPORT_MANIFEST])
def test_changed_bytes_are_refused(export, name):
    path = export / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    refuse(export, f"{name} .*(match its own sha256|match its sha256|is damaged)")


def test_missing_and_surplus_files_of_an_export_are_refused(export):
    (export / "model.safetensors.index.json").write_text("{}")
    refuse(export, f"index.json is not listed in {EXPORT_MANIFEST}, .*export it again")
    (export / "model.safetensors.index.json").unlink()
    (export / "config.json").unlink()
    refuse(export, "config.json is missing")


@pytest.mark.parametrize("cut", [4, 300, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    folder = write_folder(tmp_path / "folder", CONFIG, tensors_of(CONFIG, PARAMS))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refuse(folder, "model.safetensors is not a whole safetensors file")


@pytest.mark.parametrize(
    "outside", ["../elsewhere.safetensors", "sub/../../elsewhere.safetensors", "ABSOLUTE"]
)
def test_an_index_does_not_lead_out_of_the_folder(sharded, outside):
    shutil.copy(sharded / "b.safetensors", sharded.parent / "elsewhere.safetensors")
    if outside == "ABSOLUTE":
        outside = str(sharded.parent / "elsewhere.safetensors")
    edit_index(sharded, lambda files: files.update({NORM: outside}))
    refuse(sharded, "which lies outside of it: it is not opened")


READ = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", ["b.safetensors", "config.json", "generation_config.json", *READ])
def test_a_link_does_not_lead_out_of_the_folder(sharded, name):
    if not (sharded / name).exists():
        (sharded / name).write_text("{}")
    (sharded / name).rename(sharded.parent / name)
    (sharded / name).symlink_to(sharded.parent / name)
    refuse(sharded, "is a link to .* outside of its folder")
    (sharded.parent / name).rename(sharded / f"real-{name}")
    (sharded / name).unlink()
    (sharded / name).symlink_to(f"real-{name}")
    open_folder(sharded)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "/".join(["y"] * 3000)])
def test_a_name_that_no_file_can_have_is_refused(sharded, name):
    edit_index(sharded, lambda files: files.update({NORM: name}))
    refuse(sharded, "names the file .*, which cannot be opened|is missing")


def test_links_in_a_circle_and_what_is_no_file_are_refused(sharded):
    (sharded / "b.safetensors").unlink()
    (sharded / "b.safetensors").symlink_to("b.safetensors")
    refuse(sharded, "b.safetensors.* (cannot be opened|is missing|is not a whole)")
    (sharded / "b.safetensors").unlink()
    (sharded / "b.safetensors").mkdir()
    refuse(sharded, "b.safetensors is not a file")
    (sharded / "b.safetensors").rmdir()
    os.mkfifo(sharded / "b.safetensors")  # opening one would wait for ever
    refuse(sharded, "b.safetensors is not a file")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_is_a_link_out_of_the_folder_is_refused(tmp_path, name):
    folder = write_folder(tmp_path / "folder", CONFIG, tensors_of(CONFIG, PARAMS))
    write_tokenizer(folder, load_tokenizer("bytes"), CONFIG.context)
    (tmp_path / "elsewhere").write_text("")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link to .*, outside of its folder.*hf download REPO"):
        folder_tokenizer(folder, None, None, CONFIG.vocab_size)


def test_index_and_files_must_agree(sharded):
    edit_index(sharded, lambda files: files.pop(NORM))
    folder = open_folder(sharded)  # a file that the index does not name is not opened
    assert NORM not in folder.tensors
    edit_index(sharded, lambda files: files.update({NORM: "a.safetensors"}))
    refuse(sharded, f"a.safetensors lacks the tensor {NORM}")
    edit_index(sharded, lambda files: (files.update({NORM: "b.safetensors"}), files.popitem()))
    edit_index(sharded, lambda files: files.update({NORM: "c.safetensors"}))
    refuse(sharded, "c.safetensors is missing")
    shutil.copy(sharded / "a.safetensors", sharded / "model.safetensors")
    refuse(sharded, "holds both model.safetensors and model.safetensors.index.json")
    (sharded / "model.safetensors").unlink()
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refuse(sharded, "has no weight_map")


def test_pickles_are_never_opened(tmp_path):
    folder = write_folder(tmp_path / "folder", CONFIG, tensors_of(CONFIG, PARAMS))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    open_folder(folder)  # beside safetensors it is left alone
    (folder / "model.safetensors").unlink()
    refuse(folder, "pytorch_model.bin, a pickle, which can run arbitrary code")


def test_other_things_are_refused(tmp_path):
    refuse(tmp_path / "nothing", "is not there")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "is a file")
    folder = tmp_path / "folder"
    folder.mkdir()
    refuse(folder, "has no config.json")
    (folder / "config.json").write_text("[]")
    refuse(folder, "is not a JSON object")
    (folder / "config.json").write_text("{")
    refuse(folder, "is not JSON")
    (folder / "config.json").write_text("{}")
    refuse(folder, "holds neither model.safetensors nor")
    save_file({"x": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    refuse(folder, "x in .* is of type I8: .* before they were quantized")
    save_file({"x": torch.ones(2, dtype=torch.float64)}, folder / "model.safetensors")
    refuse(folder, "x in .* is of type F64: .* after converting them to float32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_refused(tmp_path, value):
    tensors = tensors_of(CONFIG, PARAMS)
    tensors[NORM][3] = value
    folder = open_folder(write_folder(tmp_path / "folder", CONFIG, tensors))
    with pytest.raises(UserError, match=f"{NORM} in .* has NaN or infinite values"):
        folder.read(NORM)


def test_the_tensors_must_be_those_expected(export):
    folder = open_folder(export)
    shapes = {name: info.shape for name, info in folder.tensors.items()}
    folder.require(shapes)
    for change, sentence in (
        ({"another": (2,)}, "lacks the tensor another"),
        ({NORM: (3,)}, rf"holds {NORM} of shape \[48\] where \[3\] is expected: it is damaged"),
        ({NORM: (3,), "another": (2,)}, r"\(1 more tensors differ\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            folder.require(shapes | change)
    del shapes[NORM]
    with pytest.raises(UserError, match=f"holds the tensor {NORM}, which this model does not have"):
        folder.require(shapes)
