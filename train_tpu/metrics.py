"""What a run reports: metrics.jsonl (every update), TensorBoard, the loss curve, and the derived figures."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

# Peak dense bfloat16 FLOP/s of one device, by what JAX calls it, and PyTorch, too; from the vendors'
# datasheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


CARRIED = "before_growth"
"""Key of the lines that a grown run's log has from the run it was grown from; the step of the growth."""


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: int, device_kind: str, n_devices: int
) -> float | None:
    """The part of the devices' peak that the model's own FLOPs take (MFU); None where the peak is unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * n_devices)


def bits_per_byte(nll_per_token: float, tokens: int, n_bytes: int) -> float:
    """Nats a token to bits a byte of the text: comparable between tokenizers, as perplexity is not.

    Args:
        nll_per_token: mean over the predicted tokens.
        tokens: predicted tokens of the whole text.
        n_bytes: its length in UTF-8.
    """
    return nll_per_token / math.log(2) * tokens / n_bytes


class Score(NamedTuple):
    """The loss of a held-out set."""

    nll: float
    """Nats a predicted token."""
    perplexity: float
    bits_per_byte: float
    """For part of a set: by the whole set's tokens a byte."""
    tokens: int
    """How many predictions were scored."""


def make_score(nll: float, scored: int, tokens: int, n_bytes: int) -> Score:
    """The score of a set of `tokens` predictions and `n_bytes`, of which `scored` have `nll` nats in all."""
    nll /= scored
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return Score(nll, perplexity, bits_per_byte(nll, tokens, n_bytes), scored)


class RunLog:
    """Appends to a run folder's metrics.jsonl, TensorBoard events and samples.txt.

    A line of metrics.jsonl is an object with "step" and "kind": "train" (one an update), "eval", "task",
    "sample", "skip" (an update that was not applied) or "event" (start, resume, halt, end).
    """

    def __init__(self, folder: Path, resume_step: int):
        """Opens the log; what an earlier process logged from `resume_step` on is dropped: it comes again."""
        from tensorboardX import SummaryWriter  # slow: it loads PyTorch where that is installed

        self.folder = folder
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            _truncate(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """One line; finite numbers also go to TensorBoard as kind/name, others become strings."""
        line = {"step": step, "kind": kind} | {k: _jsonable(v) for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, float | int) and math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def sample(self, step: int, texts: list[str]) -> None:
        """Logs samples; samples.txt is written again from all that metrics.jsonl holds."""
        self.write(step, "sample", texts=texts)
        self._board.add_text("samples", "\n\n".join(texts), step)
        parts = []
        for row in read_log(self.folder, "sample"):
            parts += [f"===== step {row['step']} =====", *(f"{text}\n-----" for text in row["texts"]), ""]
        (self.folder / "samples.txt").write_text("\n".join(parts), encoding="utf-8")

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        self._board.close()


class NoLog:
    """The log of a process that is not the first of several: nothing."""

    def write(self, step: int, kind: str, **values: Any) -> None: ...

    def sample(self, step: int, texts: list[str]) -> None: ...

    def close(self) -> None: ...


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind of a run folder's metrics.jsonl, in order.

    A last line that a killed process left incomplete is none.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = (json.loads(line) for line in lines if line.endswith("\n"))
    return [row for row in rows if row["kind"] == kind]


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> None:
    """Drops the lines of steps from `step` on, and a last line that a killed process left incomplete."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and ((row := json.loads(line))["step"] < step or CARRIED in row):
            kept.append(line)
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def carry_log(source: Path, target: Path, step: int) -> None:
    """Gives the run folder `target` the history of the run in `source` up to `step`, where it was grown.

    The evaluation at that step itself is carried too: it is the loss just before. Every carried line says at
    which step the model grew, and so is never taken for the new run's own.
    """
    if not (source / "metrics.jsonl").is_file():
        return
    lines = []
    for kind in ("train", "eval", "task", "sample", "skip"):
        for row in read_log(source, kind):
            if row["step"] < step or (kind in ("eval", "task") and row["step"] == step):
                lines.append({CARRIED: step} | row)
    lines.sort(key=lambda row: row["step"])
    (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def plot_curve(folder: Path) -> Path:
    """Draws loss_curve.png of a run folder: training loss and held-out bits per byte over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [row for row in read_log(folder, "train") if not isinstance(row["loss"], str)]
    evals = [row for row in read_log(folder, "eval") if not isinstance(row["bits_per_byte"], str)]
    tokens = [row["tokens"] / 1e6 for row in train]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    losses = [row["nll"] for row in train]
    left.plot(tokens, losses, color="#9db8d9", linewidth=0.8, label="training loss")
    left.plot(tokens, _smooth(losses), color="#1f4e8c", linewidth=1.6, label="training loss, smoothed")
    for growth in sorted({row[CARRIED] for row in train if CARRIED in row}):
        after = [row["tokens"] / 1e6 for row in train if row["step"] >= growth]
        if after:
            left.axvline(after[0], color="#6b7280", linestyle=":", linewidth=1.2)
            left.annotate(
                " grown", (after[0], 0.98), xycoords=("data", "axes fraction"), va="top", color="#6b7280"
            )
    left.set_xlabel("tokens (millions)")
    left.set_ylabel("nats per token")
    left.grid(alpha=0.25)
    right = left.twinx()
    right.set_ylabel("bits per byte, held out")
    names = sorted({row["split"] for row in evals})
    for name, color in zip(names, ("#c2410c", "#15803d", "#7e22ce", "#a16207") * len(names), strict=False):
        rows = [row for row in evals if row["split"] == name]
        x, y = [row["tokens"] / 1e6 for row in rows], [row["bits_per_byte"] for row in rows]
        right.plot(x, y, "o-", color=color, markersize=4, linewidth=1.2, label=f"{name}: {y[-1]:.3f}")
    handles, labels = (a + b for a, b in zip(left.get_legend_handles_labels(),
                                             right.get_legend_handles_labels(), strict=True))  # fmt: skip
    left.legend(handles, labels, loc="upper right", frameon=False)
    left.set_title(folder.name)
    path = folder / "loss_curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed
