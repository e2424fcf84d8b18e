"""What the pictures of a run show, by the figures that are handed to the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from core.run import curve
from core.run.folder import write_config
from core.run.log import CARRIED, METRICS

STEPS, TOKENS = 120, 10_000
LOSSES = 6 - np.log1p(np.arange(STEPS)) + np.random.default_rng(0).normal(0, 0.1, STEPS)
MIXTURE = {"sources": {}, "phases": [{"first": 0, "windows": {"a": 1}}, {"first": 90, "windows": {"b": 4}}]}


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[Path, Figure]]:
    """The pictures that are written."""
    written: list[tuple[Path, Figure]] = []
    monkeypatch.setattr(curve, "write_picture", lambda figure, path, dpi: written.append((path, figure)))
    return written


def write_log(folder: Path, losses: np.ndarray, grown: int = 0, evals: tuple = ()) -> None:
    """A log of one update for each loss, those before step `grown` of the run that it was grown from."""
    folder.mkdir()
    rows = [
        {"step": step, "kind": "train", "tokens": step * TOKENS, "loss": loss, "nll": loss}
        | ({CARRIED: grown} if step < grown else {})
        for step, loss in enumerate(losses.tolist())
    ]
    for step, split, nll, bits in evals:
        score = {"split": split, "tokens": step * TOKENS, "nll": nll, "bits_per_byte": bits}
        rows.append({"step": step, "kind": "eval", **score})
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of every line in a legend, by its name."""
    named = {text.get_text() for text in axes.get_legend().get_texts()}
    found = {line.get_label(): tuple(np.asarray(x).tolist() for x in line.get_data()) for line in axes.lines}
    assert named <= set(found)
    return {name: found[name] for name in named}


def test_the_curve_shows_the_log(tmp_path: Path, drawn):
    evals = ((0, "b", 6.5, 2.5), (0, "a", 6.0, 2.0), (60, "b", "nan", "nan"), (60, "a", 3.0, "nan"),
             (120, "b", 2.25, 1.125), (120, "a", 2.0, 1.0))  # fmt: skip
    losses = LOSSES.copy()
    write_log(tmp_path / "run", losses, grown=50, evals=evals)
    path = tmp_path / "run" / METRICS
    path.write_text(path.read_text().replace(str(losses[7]), '"nan"'))
    data = {"fingerprint": "f", "mixture": MIXTURE}
    write_config(tmp_path / "run", {"run": {}, "tokenizer": {}, "model": {"context": 500}, "data": data})
    assert curve.plot_curve(tmp_path / "run") == tmp_path / "run" / "loss_curve.png"
    ((path, figure),) = drawn
    (axes,) = figure.axes
    found = lines(axes)
    assert path.name == "loss_curve.png"
    assert axes.get_title() == "run: held-out loss on a from 6.00 to 2.00 nats per token"

    finite = [step for step in range(STEPS) if step != 7]
    x, y = found.pop("training, each step")
    assert x == pytest.approx([step * 0.01 for step in finite]) and y == losses[finite].tolist()
    smoothed_x, smoothed = found.pop("training, smoothed")
    reach = [min(i, len(y) - 1 - i, 2) for i in range(len(y))]  # 119 steps: a fiftieth to either side
    means = [np.mean(y[i - r : i + r + 1]) for i, r in enumerate(reach)]
    assert smoothed_x == x and smoothed == pytest.approx(means, rel=1e-12)
    assert found.pop("held-out a: 2.000 (1.000 bits per byte)") == ([0, 0.6, 1.2], [6, 3, 2])
    assert found.pop("held-out b: 2.250 (1.125 bits per byte)") == ([0, 1.2], [6.5, 2.25])
    assert found.pop("grown at step 50")[0] == [0.5, 0.5]
    assert found.pop("from here b 100%")[0] == [0.045, 0.045]  # 90 windows of 500 tokens
    assert not found


def test_a_run_of_one_step_has_a_curve(tmp_path: Path, drawn):
    write_log(tmp_path / "run", LOSSES[:1], evals=((0, "valid", 6.0, "nan"),))
    curve.plot_curve(tmp_path / "run")
    axes = drawn[0][1].axes[0]
    assert axes.get_title() == "run: held-out loss from 6.00 to 6.00 nats per token"
    assert lines(axes)["training, smoothed"] == ([0], [LOSSES[0]])
    assert lines(axes)["held-out valid: 6.000"] == ([0], [6])  # a split of which nobody knows the bytes


def test_a_branch_is_shown_against_its_run(tmp_path: Path, drawn):
    """From the branch's first update to its last, which the run may have passed or not reached."""
    write_log(tmp_path / "run", LOSSES)
    write_log(tmp_path / "branch", LOSSES[:100] + np.where(np.arange(100) < 40, 0, 0.25))
    path = curve.plot_branch(tmp_path / "run", tmp_path / "branch", 40)
    assert path == drawn[0][0] == tmp_path / "branch" / "branch.png"
    upper, lower = drawn[0][1].axes
    steps = list(range(40, 100))
    assert lines(upper) == {
        "run (run)": (steps, LOSSES[40:100].tolist()),
        "branch (branch)": (steps, (LOSSES[40:100] + 0.25).tolist()),
    }
    x, difference = lower.lines[0].get_data()
    assert x.tolist() == steps and difference == pytest.approx(0.25)
    assert "branch of run from update 40 on" in upper.get_title()
