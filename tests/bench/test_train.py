"""`bench.train`: the peers compute what ours does, and the command runs, fails and reports as it says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import train as command
from bench.plain_torch import GPT
from bench.train import goals
from bench.train_rows import stock_mirror
from core.config import ModelConfig, preset
from port_torch.model import Decoder
from tests.models import BOTH, GROUPED, LLAMA

MODELS = BOTH | {"grouped": GROUPED}

UNIT = 2.0**-24  # of float32, relative


def random_mirror(config: ModelConfig) -> Decoder:
    """Weights of which every one matters: no norm is 1, no bias 0."""
    torch.manual_seed(0)
    model = Decoder(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    return model


def random_tokens(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(config.vocab_size, (2, config.context + 1))
    return tokens[:, :-1], tokens[:, 1:]


def mirror_loss(model: Decoder, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return model.loss(model(tokens), targets).total / targets.numel()


@pytest.mark.parametrize("kind", MODELS)
def test_plain_torch_is_the_same_function(kind: str):
    config = MODELS[kind]
    mirror = random_mirror(config)
    plain = GPT(config).take_weights(mirror).double()
    mirror.double()
    tokens, targets = random_tokens(config)
    expected, loss = mirror_loss(mirror, tokens, targets), plain(tokens, targets)
    # All in float64, but for the peer's logits and cross-entropy: each logit is rounded once, the sum over
    # the vocabulary and the mean over the targets at most once an element.
    largest = mirror.logits(mirror(tokens)).abs().max()
    bound = UNIT * (2 * largest + config.vocab_size + targets.numel() * expected)
    assert abs(loss - expected) <= bound < 1e-3 * expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_plain_torch_has_the_same_size_and_operations(kind: str):
    config = MODELS[kind]
    mirror = random_mirror(config)
    plain = GPT(config).take_weights(mirror)
    for model in (mirror, plain):
        assert sum(p.numel() for p in model.parameters()) == config.n_params
    tokens, targets = random_tokens(config)
    attention = 6 * config.n_layers * config.q_width * config.context  # not a product of matrices
    for loss_of in (lambda *batch: mirror_loss(mirror, *batch), plain):
        with FlopCounterMode(display=False) as counter:
            loss_of(tokens, targets).backward()
        counts = counter.get_flop_counts()["Global"]
        products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
        assert products == (config.flops_per_token() - attention) * tokens.numel()


@pytest.mark.parametrize("narrow", [False, True])
def test_the_residual_stream_is_as_wide_as_said(narrow: bool):
    plain = GPT(LLAMA, narrow)
    seen = []
    plain.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        plain(*random_tokens(LLAMA))
    assert seen == [torch.bfloat16 if narrow else torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [LLAMA, dataclasses.replace(GROUPED, qkv_biases=False)], ids=["llama", "qwen3"]
)
def test_hugging_face_is_the_same_function(config: ModelConfig):
    mirror = random_mirror(config)
    model = stock_mirror(mirror, liger=False)
    assert sum(p.numel() for p in model.parameters()) == config.n_params
    tokens, _ = random_tokens(config)
    expected = mirror_loss(mirror, tokens[:, :-1], tokens[:, 1:])
    # Logits of the two are 2e-5 apart at most (test_model.py), a loss is at most twice that.
    assert abs(model(input_ids=tokens, labels=tokens).loss - expected) <= 4e-5


def test_goals_are_of_the_rows_measured():
    case = "mtlm1-200m"
    rows = [
        {"case": case, "variant": "ours", "tokens_per_second": 122.0, "peak_gib": 9.0},
        {"case": case, "variant": "plain", "tokens_per_second": 100.0, "peak_gib": 30.0},
        {"case": case, "variant": "hf-liger", "tokens_per_second": 80.0, "peak_gib": 10.0},
        {"case": "mtlm2-40m", "variant": "ours", "failed": "why"},
    ]
    assert [(goal["value"], goal["met"]) for goal in goals(rows)] == [
        (1.22, True),
        (1.525, False),
        (0.9, True),
        (None, None),
    ]


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """In this process, but for the row that fails and one of those that it measures."""
    report, picture, profile = tmp_path / "bench.json", tmp_path / "bench.png", tmp_path / "profile"
    variants = ["ours", "ours-no-kernels", "plain", "hf"]
    arguments = (
        "--device", "cpu", "--cases", "mtlm1-tiny", "mtlm2-tiny", "--variants", *variants, "--steps", 2,
        "--batch", 2, "--context", 16, "--json", report, "--plot", picture, "--profile", profile,
    )  # fmt: skip
    in_process = command.in_process

    def run_here(row: str, argv: list[str], device: str) -> command.Row:
        if row in ("mtlm1-tiny/ours", "mtlm1-tiny/hf"):
            return in_process(row, argv, device)
        if row == "mtlm2-tiny/ours":
            return {"failed": "error: our kernels run on a GPU alone"}  # as the other one
        return command.run_row(command.cli.parse(command.TrainBenchConfig, argv, prog="bench"), row)

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(command, "in_process", run_here)
    monkeypatch.setattr(sys, "argv", ["bench.train", *map(str, arguments)])
    assert command.main() == 1  # a row failed
    said = capsys.readouterr().out
    rows = json.loads(report.read_text())["rows"]
    of_llama, of_gpt = ([r for r in rows if r["case"] == case] for case in ("mtlm1-tiny", "mtlm2-tiny"))
    assert [row["variant"] for row in of_llama] == variants
    assert [row["variant"] for row in of_gpt] == variants[:-1]
    for of_case in (of_llama, of_gpt):
        kernels, *others = of_case
        assert kernels["failed"] == "error: our kernels run on a GPU alone"
        for row in others:
            seconds = row["milliseconds"] / 1e3
            assert row["tokens_per_second"] == pytest.approx(2 * 16 / seconds)
            assert row["loss"] < row["first_loss"] - 0.1
        # The same weights, batches and updates: the same loss after seven, float32's rounding apart. (The
        # last place of a row is no target of transformers' Llama.)
        ours, plain = (row["loss"] for row in others[:2])
        assert ours == pytest.approx(plain, rel=1e-4)
    written = sorted(path.name for path in profile.iterdir())
    assert written == [f"{case}-{way}.txt" for case in ("mtlm1-tiny", "mtlm2-tiny") for way in variants[1:3]]
    assert "aten::mm" in (profile / "mtlm1-tiny-plain.txt").read_text()
    assert picture.stat().st_size > 10_000
    assert "failed: mtlm1-tiny, ours: kernels, compiled: error: our kernels" in said
    assert "Hugging Face has no model like it" in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench.train needs an NVIDIA GPU")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, without the minutes that compiling takes on a CPU."""
    command = [sys.executable, "-m", "bench.train", *map(str, arguments)]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_models_are_those_of_the_goals():
    large, small = preset("mtlm1-200m"), preset("mtlm2-40m")
    assert (large.n_layers, large.d_model, large.d_mlp, large.vocab_size) == (24, 768, 2176, 32000)
    assert large.tied and large.context == small.context == 1024
