"""A row's process finds nothing compiled, and runs on the device that its command names."""

import os
from pathlib import Path

import pytest

from bench import devices, eval, finetune_rows, row_process, train
from bench.finetune import FinetuneBenchConfig
from bench.row_process import COMPILED


def test_every_process_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "row.py").write_text(
        "import json, os, sys\n"
        f"found = [os.environ[name] for name in {COMPILED}]\n"
        "print('ROW', json.dumps({'found': found, 'there': [os.path.exists(f) for f in found]}))"
    )
    kept = {name: str(tmp_path / "kept") for name in COMPILED}
    monkeypatch.chdir(tmp_path)
    rows = [row_process.in_process("row", "a", [], os.environ | kept) for _ in range(2)]
    assert not any(rows[0]["there"] + rows[1]["there"])
    assert not set(rows[0]["found"]) & {*rows[1]["found"], kept[COMPILED[0]]}


def test_so_does_evaluation(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def run(command: list[str], env: dict[str, str], check: bool):
        seen.append([env[name] for name in COMPILED])
        Path(command[6]).write_text("{}")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(eval.subprocess, "run", run)
    for _ in range(2):
        eval.in_process([], "jax", "float32")
    assert not set(seen[0]) & set(seen[1])


@pytest.mark.parametrize(
    ("variant", "device", "platform"),
    [("ours-jax", "cuda", "cuda"), ("ours-jax-xla", "cpu", "cpu"), ("ours", "cuda", "cpu")],
)
def test_jax_has_the_device_or_fails(monkeypatch, variant: str, device: str, platform: str):
    """Left to choose, JAX takes a CPU where its plugin for CUDA is missing, and warns where nobody reads."""
    seen = []
    monkeypatch.setattr(row_process, "in_process", lambda *given: seen.append(given[3]["JAX_PLATFORMS"]))
    train.in_process(f"mtlm1-tiny/{variant}", [], device)
    assert seen == [platform]


def test_so_it_has_on_several_gpus(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(devices, "in_process", lambda *given: seen.append(given[3]["JAX_PLATFORMS"]))
    for way in devices.TITLES:
        devices.in_processes("mtlm1-tiny", way, 2, [])
    assert seen == ["cuda", "cuda", "cpu", "cpu", "cpu"]


@pytest.mark.parametrize(("device", "kernels"), [("cuda", "cuda"), ("cpu", "auto")])
def test_fine_tuning_has_the_kernels_or_fails(tmp_path, monkeypatch, device: str, kernels: str):
    """With kernels="auto" a GPU without a library would be timed with the plain formulas, under our name."""
    asked = []

    class Asked(Exception):
        pass

    def config(**settings: object):
        asked.append(settings["kernels"])
        raise Asked

    monkeypatch.setattr(finetune_rows, "FinetuneConfig", config)
    with pytest.raises(Asked):
        finetune_rows.measure_ours(FinetuneBenchConfig(tmp_path, device=device), "ours", tmp_path)
    assert asked == [kernels]
