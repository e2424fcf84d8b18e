"""Pictures of benchmarks: what cannot be written is refused before anything is measured, and a full disk
leaves the old one."""

import errno
import importlib
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from bench import decode, ladder, train
from kernels_cuda import bench as kernels
from kernels_cuda.bench_tasks import Row
from tests.train_tpu.processes import refusal_here

RATES = {"case": "a", "variant": "ours", "batch": 1, "context": 8, "tokens_per_second": 1.0}
DRAWN = [
    (train, [RATES], "cpu"),
    (decode, [{"model": "a", "batch": 1, "way": "ours", "tokens/s": 1.0}], "gpu"),
    (
        ladder,
        [{"size": 256, "way": way, "microseconds": 1.0} for way in ladder.ways("cpu")],
        ladder.LadderConfig(device="cpu", pieces=("add",), sizes=(256,)),
    ),
    (kernels, [Row("norm", "mtlm", 1.0, 1.0, "TB/s", 0.5, None)], "gpu"),
]


@pytest.mark.parametrize("module", ["bench.train", "bench.decode", "bench.ladder", "kernels_cuda.bench"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("rates.xyz", r"rates.xyz names no kind of picture: end it with .png, .svg or .pdf"),
        ("rates", r"rates names no kind of picture"),
        ("folder.png", "folder.png is a folder: name a file"),
        ("file/rates.png", "file"),
    ],
)
def test_a_place_for_no_picture_is_refused_first(tmp_path, monkeypatch, module, place, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("in_process", "measure", "subprocess"):  # with which the measurements begin
        monkeypatch.setattr(importlib.import_module(module), name, None, raising=False)
    arguments = ["--device", "cpu"] if module in ("bench.train", "bench.ladder") else []
    assert message in refusal_here(*arguments, "--plot", tmp_path / place, module=module)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("module", ["bench.train", "bench.decode"])
def test_a_file_is_no_folder_for_profiles(tmp_path, module: str):
    (tmp_path / "file").touch()
    said = refusal_here("--profile", tmp_path / "file", module=module)
    assert "file is a file: name another folder" in said


@pytest.mark.parametrize(("module", "rows", "about"), DRAWN, ids=lambda one: getattr(one, "__name__", ""))
def test_a_picture_is_whole_and_of_the_format_that_its_name_says(
    tmp_path, monkeypatch, module: ModuleType, rows: list, about: object
):
    for suffix, begins in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        module.plot(rows, tmp_path / f"deeper/a{suffix}", about)
        assert (tmp_path / f"deeper/a{suffix}").read_bytes().startswith(begins)

    def half(_: Figure, path: Path, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    picture = tmp_path / "a.png"
    picture.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        module.plot(rows, picture, about)
    assert picture.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "deeper"}
