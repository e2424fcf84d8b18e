"""`bench.ladder`: both libraries compute the same, and the command runs and reports."""

import functools
import json

import jax
import numpy as np
import pytest
import torch

from bench import ladder
from bench.ladder_rows import PIECES, example, torch_way
from tests.train_tpu.processes import refusal_here


@pytest.mark.parametrize("piece", PIECES)
def test_both_compute_the_same(piece: str):
    """A dozen float32 operations at most, twenty times over: each may round by 6e-8 of numbers of about 1."""
    x = example(1024)
    ours = PIECES[piece].torch(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, jax.jit(PIECES[piece].jax)(x), rtol=2e-5, atol=2e-5)


def test_every_piece_and_size_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """More of them in one process than the eight versions that torch.compile keeps of one code."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        compiled.append(inputs[0].numel())
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    sizes = (256, 512)
    for piece in PIECES.values():
        for size in sizes:
            function, x, _ = torch_way("compile", piece, size, "cpu")
            function(x)
    assert compiled == len(PIECES) * [*sizes]


def test_eager_calls_are_of_the_operation_alone():
    """A no_grad around each call took 2.5 us of the 5.5 that an addition took on a CPU."""
    for piece in PIECES.values():
        function, x, _ = torch_way("torch", piece, 256, "cpu")
        assert function is piece.torch and not x.requires_grad


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    small = ["--device", "cpu", "--pieces", "add", "--sizes", "256"]
    monkeypatch.setattr("sys.argv", ["bench.ladder", *small, *files])
    ladder.main()
    assert "x + 1" in capsys.readouterr().out and (tmp_path / "rows.png").stat().st_size > 1000
    report = json.loads((tmp_path / "rows.json").read_text())
    assert (
        report["device"] == "cpu"
        and report["torch"] == torch.__version__
        and report["jax"] == jax.__version__
    )
    rows = report["rows"]
    assert {row["way"] for row in rows} == {"torch", "compile", "jax", "jax-eager"}
    assert all(row["microseconds"] > 0 for row in rows)


def test_a_size_that_makes_no_rows_is_refused():
    assert "multiples of 256, not 300" in refusal_here("--sizes", "300", module="bench.ladder")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "needs an NVIDIA GPU, and PyTorch finds none here: --device cpu" in refusal_here(
        module="bench.ladder"
    )
