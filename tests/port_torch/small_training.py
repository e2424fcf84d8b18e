"""Training runs of seconds in this process, and plain loops to compare them with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import port_torch.finetune
import port_torch.train
from core.config import ModelConfig
from core.data.examples import IGNORE
from core.data.sequences import Rows
from core.run.log import read_log
from port_torch.hf.modeling_mtlm import MtlmForCausalLM
from port_torch.hf_config import stock_type
from port_torch.model import Decoder
from port_torch.training.distributed import Distributed
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep

ALONE = Distributed(0, 1, torch.device("cpu"))

# 12 updates of 4 x 32 tokens on a model of 29k parameters; dropout, so that its masks matter too.
TINY = (
    "--preset", "mtlm1-tiny", "--tokenizer", "bytes", "--context", "32", "--d-model", "32", "--n-layers", "2",
    "--n-heads", "2", "--d-mlp", "64", "--dropout", "0.1", "--steps", "12", "--batch", "4", "--lr", "0.01",
    "--warmup", "4", "--eval-every", "5", "--sample-every", "100", "--save-every", "3", "--log-every", "1",
    "--eval-windows", "4", "--prompts", "a",
)  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, module, *arguments: str | Path) -> int:
    """A command in this process; its exit code."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        return module.main()


def train_here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """`python -m port_torch.train`."""
    return call(monkeypatch, port_torch.train, *arguments)


def finetune_here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """`python -m port_torch.finetune`."""
    return call(monkeypatch, port_torch.finetune, *arguments)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every update, exactly as a run logged them."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(folder, "train")]


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], None]) -> None:
    """Has `how` called instead of (if it raises) or just before the update of that step."""
    update = TrainStep.update

    def stopping(self, rows, parts, number, lr, flags):
        if number == step:
            how()
        return update(self, rows, parts, number, lr, flags)

    monkeypatch.setattr(TrainStep, "update", stopping)


class Killed(BaseException):
    """What no handler of ours catches."""


def kill() -> None:
    raise Killed


def make_train_step(decoder: Decoder, optim: MirrorOptimizerConfig, **options) -> TrainStep:
    return TrainStep(decoder, optim, ALONE, seed=0, **options)


def update_losses(
    train_step: TrainStep, batches: list[Rows], rates: list[float], parts: int = 1
) -> list[list[float]]:
    """(loss, nll, gradient norm) of an update on each of the batches."""
    made = [
        train_step.update(rows, parts, step, lr)[:3].tolist()
        for step, (rows, lr) in enumerate(zip(batches, rates, strict=True))
    ]
    return made


def plain_losses(
    model: nn.Module,
    batches: list[list[tuple[Tensor, Tensor]]],
    rates: list[float],
    optim: MirrorOptimizerConfig,
    z_loss: float = 0.0,
) -> list[list[float]]:
    """The same of transformers' model with torch.optim.AdamW, one sequence after the other, nothing packed.

    batches: for each update its sequences: (ids [n], targets [n]), targets of -1 not counted.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    made = []
    for sequences, lr in zip(batches, rates, strict=True):
        counted = sum(int((targets != IGNORE).sum()) for _, targets in sequences)
        total = nll = 0.0
        for ids, targets in sequences:
            logits = model(ids[None], use_cache=False).logits[0].float()
            rows = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
            squares = (logits.logsumexp(-1) ** 2)[targets != IGNORE].sum()
            loss = (rows + z_loss * squares) / counted
            loss.backward()
            total, nll = total + loss.item(), nll + rows.item() / counted
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        made.append([total, nll, float(norm)])
    return made


def theirs_of(folder: Path, config: ModelConfig) -> nn.Module:
    """The model of transformers in a folder, or our own code for it."""
    kind = AutoModelForCausalLM if stock_type(config) else MtlmForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32)


def sequences_of(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """Whole rows as sequences of `plain_losses`."""
    tokens, targets = (torch.from_numpy(array.astype(np.int64)) for array in rows[:2])
    return list(zip(tokens, targets, strict=True))
