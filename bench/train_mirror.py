"""`python -m bench.train_mirror --data PREPARED --rows ROWS.jsonl --out DIR`: the mirror trained on a GPU.

What the tests cannot show on a CPU: 200 updates with the kernels give the loss curve of 200 without them,
within what bfloat16 itself leaves open (three runs without, two of them with sums in another order); a
deterministic run resumes to the bit; a batch too large for the memory is computed in parts; fine-tuning, of
all weights and with LoRA. Writes report.json and exits with 1 if one of them fails. Runs that do not need
each other go at once: nothing here is timed (`bench.train` does that).
"""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import require_gpu
from core import cli
from core.config import preset
from core.data.dataset import open_dataset
from core.data.tuning_rows import read_rows
from core.errors import run_command
from core.folders import require_new
from core.run.log import read_log


@dataclasses.dataclass(frozen=True)
class Config:
    """Prove the training of the mirror on this machine's GPU."""

    data: Path
    """Prepared data, of the tokenizer mistral and the context 1024."""
    rows: Path
    """Instruction rows for the fine-tuning, JSONL."""
    out: Path
    """Folder for the runs and report.json; it must not exist."""
    preset: str = "mtlm2-40m"
    steps: int = 200
    batch: int = 32
    too_large: int = 2048
    """A batch that does not fit into the memory at once."""


def main() -> int:
    """Runs everything in order; 1 if something is not as it should be."""
    config = cli.parse(Config, prog="python -m bench.train_mirror")
    check(config)
    config.out.mkdir(parents=True)
    report: dict[str, Any] = {}
    with ThreadPoolExecutor() as pool:
        kernels, resume = (pool.submit(compare, config) for compare in (compare_kernels, compare_resume))
        report["kernels"], report["resume"] = kernels.result(), resume.result()
    report["memory"] = "out of memory with" in train(
        config, "large", "--steps", 2, "--batch", config.too_large, "--warmup", 1
    )
    model = config.out / "kernels" / "model"
    with ThreadPoolExecutor() as pool:
        full = pool.submit(finetune, config, model, "full")
        lora = pool.submit(finetune, config, model, "lora", "--lora-rank", 16, "--lr", 1e-3)
        report["finetune"] = {"full": full.result(), "lora": lora.result()}
    (config.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    good = report["kernels"]["within"] and report["resume"] and report["memory"]
    good &= all(tuned["after"] < tuned["before"] for tuned in report["finetune"].values())
    return 0 if good else 1


def check(config: Config) -> None:
    """Refuses what cannot be trained or kept before anything is."""
    preset(config.preset)
    require_new(config.out)
    open_dataset(config.data)
    read_rows(config.rows)
    require_gpu("bench.train_mirror")


def compare_kernels(config: Config) -> dict[str, Any]:
    """How far the loss curves lie apart: with kernels and without, and without and without."""
    # A long warm-up: behind a short one the gradient jumps, and from there on any two runs part ways.
    common = ("--steps", config.steps, "--batch", config.batch, "--warmup", config.steps // 2)
    ways = {
        "plain": ("--kernels", "torch"),
        "plain-2": ("--kernels", "torch", "--grad-accum-steps", 2),
        "plain-4": ("--kernels", "torch", "--grad-accum-steps", 4),
        "kernels": ("--kernels", "cuda"),
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: train(config, name, *common, *ways[name]), ways))
    plain, *others, ours = (curve(config.out / name) for name in ways)
    # Single updates jump; a mean over ten is what a curve is read by.
    *noise, apart = (float(np.abs(smooth(other) - smooth(plain)).max()) for other in (*others, ours))
    return {
        "noise": noise,
        "apart": apart,
        "within": apart <= 2 * max(noise) + 1e-3,
        "last": {"plain": float(plain[-10:].mean()), "kernels": float(ours[-10:].mean())},
    }


def compare_resume(config: Config) -> bool:
    """Whether a deterministic run of 40 updates, stopped at 23, equals one that was not, to the bit."""
    common = ("--steps", 40, "--batch", config.batch, "--deterministic", "--warmup", 10)

    def stopped_and_resumed() -> None:
        train(config, "stopped", *common, "--stop-at", 23)
        train(config, "stopped", *common)

    with ThreadPoolExecutor() as pool:
        parts = pool.submit(train, config, "whole", *common), pool.submit(stopped_and_resumed)
        for part in parts:
            part.result()
    whole, stopped = (config.out / name for name in ("whole", "stopped"))
    files = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    return bool(np.array_equal(curve(whole), curve(stopped))) and files[0] == files[1]


def train(config: Config, name: str, *arguments: Any) -> str:
    """One run of `port_torch.train`; its output, which is shown, too."""
    given = ("--preset", config.preset, "--data", config.data, "--out", config.out / name)
    return run("port_torch.train", *given, *arguments)


def finetune(config: Config, model: Path, name: str, *arguments: Any) -> dict[str, Any]:
    """Held-out loss before and after a fine-tuning, with its samples."""
    out = config.out / f"finetune-{name}"
    run("port_torch.finetune", model, "--data", config.rows, "--out", out, *arguments)
    scores, samples = read_log(out, "eval"), read_log(out, "sample")
    return {
        "before": scores[0]["nll"],
        "after": scores[-1]["nll"],
        "samples before": samples[0]["texts"],
        "samples after": samples[-1]["texts"],
    }


def run(module: str, *arguments: Any) -> str:
    """A command in a process of its own. One that fails has said why: this one ends with its exit code."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"$ {' '.join(command[1:])}\n{done.stdout}", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def curve(folder: Path) -> np.ndarray:
    """The training loss of every update."""
    return np.array([row["nll"] for row in read_log(folder, "train")])


def smooth(losses: np.ndarray) -> np.ndarray:
    """Means over ten updates."""
    return np.convolve(losses, np.ones(10) / 10, "valid")


if __name__ == "__main__":
    run_command(main)
