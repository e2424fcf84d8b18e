"""What looks unhealthy in the watched updates of a run, each with its rule and the figures that break it.

The limits are where no healthy run of ours has been seen (docs/LOG.md): a symptom is a reason to look.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from core.run.watching import Watched, growth

SETTLED = 2
"""Newest watched updates that must all show what is said of a run's state now."""
ADDS_NOTHING = 0.01
NO_GRADIENT = 1e-3
LARGE_UPDATE = 0.2
GROWN_WEIGHTS = 20.0
LOW_ENTROPY = 0.1
BLOW_UP = 10.0
SEAM = 2.0


@dataclasses.dataclass(frozen=True)
class Symptom:
    """Something that looks unhealthy."""

    name: str
    where: str
    """Rows, as `core.run.watching.row_names` has them."""
    figures: str
    rule: str

    def __str__(self) -> str:
        return f"{self.name}: {self.where}: {self.figures} (rule: {self.rule})"


def find_symptoms(watched: Watched, grown: Mapping[str, Any] | None = None) -> list[Symptom]:
    """All that looks unhealthy, the worst first.

    grown: the manifest's record of the run's last growth, if it was grown.
    """
    with np.errstate(invalid="ignore"):  # a rule that is given NaN is not broken
        return [
            *_not_finite(watched), *_exploding_update(watched), *_dead_layer(watched),
            *_loss_of_entropy(watched), *_blow_up(watched), *(_seam(watched, grown) if grown else ()),
        ]  # fmt: skip


def _not_finite(watched: Watched) -> Iterator[Symptom]:
    names, rows = watched.names, watched.of_rows
    kinds = (
        ("the weights", ~np.isfinite(rows["weight"])),
        ("the residual stream after it", rows["not_finite"] > 0),
        ("the gradient", ~np.isfinite(rows["gradient"])),
    )
    for what, bad in kinds:
        if bad.any():
            at = int(np.flatnonzero(bad.any(axis=1))[0])
            first = int(np.flatnonzero(bad[at])[0])
            yield Symptom(
                "not finite", names[first],
                f"{what}, first seen at update {watched.steps[at]}, in {_list(names, bad[at])}",
                "no value may be infinite or NaN; train_tpu.replay finds the operation",
            )  # fmt: skip


def _exploding_update(watched: Watched) -> Iterator[Symptom]:
    ratio = np.nan_to_num(watched.update_over_weight, nan=0.0, posinf=0.0)
    # The first update of random weights may be large in a healthy run, too.
    late = watched.steps > watched.steps[0]
    large = (ratio > LARGE_UPDATE) & late[:, None]
    if large.any():
        at, row = np.unravel_index(int(np.argmax(np.where(large, ratio, 0))), ratio.shape)
        n = int(large.any(axis=1).sum())
        yield Symptom(
            "exploding update", _list(watched.names, large.any(axis=0)),
            f"update {watched.steps[at]} changed {watched.names[row]} by {ratio[at, row]:.0%} of its norm; "
            f"{n} of {len(watched.steps)} watched updates changed something by more than {LARGE_UPDATE:.0%}",
            f"after the first at most {LARGE_UPDATE:.0%}; lower the learning rate or warm up longer",
        )  # fmt: skip
    weight = watched.of_rows["weight"]
    grown = np.divide(weight[-1], weight[0], out=np.zeros(weight.shape[1]), where=weight[0] > 0)
    if (far := np.isfinite(grown) & (grown > GROWN_WEIGHTS)).any():
        row = int(np.argmax(np.where(far, grown, 0)))
        yield Symptom(
            "exploding update", _list(watched.names, far),
            f"the weights of {watched.names[row]} are {grown[row]:.0f}x what they were at update "
            f"{watched.steps[0]}", f"at most {GROWN_WEIGHTS:.0f}x; lower the learning rate",
        )  # fmt: skip


def _dead_layer(watched: Watched) -> Iterator[Symptom]:
    layers, share = watched.names[1:-1], watched.share_added
    gradient = watched.of_rows["gradient"][:, 1:-1]
    median = np.median(gradient, axis=1, keepdims=True)
    relative = np.divide(gradient, median, out=np.ones(gradient.shape), where=median > 0)
    finite = watched.of_rows["not_finite"][:, 1:-1] == 0
    rules = (
        (finite & (share < ADDS_NOTHING), share, "{} adds {:.2%} of the residual stream's rms to it",
         f"{ADDS_NOTHING:.0%}"),
        (relative < NO_GRADIENT, relative, "the gradient of {} is {:.1e} of the median layer's",
         f"{NO_GRADIENT:g}"),
    )  # fmt: skip
    for broken, values, figures, least in rules:
        if (dead := _lasting(broken)).any():
            row = int(np.argmin(np.where(dead, values[-1], np.inf)))
            rule = f"at least {least} in the newest {SETTLED} watched updates"
            yield Symptom(
                "dead layer", _list(layers, dead), figures.format(layers[row], values[-1, row]), rule
            )


def _loss_of_entropy(watched: Watched) -> Iterator[Symptom]:
    layers, entropy = watched.names[1:-1], watched.of_layers["entropy"]
    share = np.divide(entropy, watched.uniform[:, None])
    if (lost := _lasting(share < LOW_ENTROPY)).any():
        row = int(np.argmin(np.where(lost, share[-1], np.inf)))
        yield Symptom(
            "loss of entropy", _list(layers, lost),
            f"the attention of {layers[row]} has {entropy[-1, row]:.2g} nats, {share[-1, row]:.0%} of what "
            f"uniform attention has ({share[0, row]:.0%} at update {watched.steps[0]}): a query sees one key",
            f"at least {LOW_ENTROPY:.0%} in the newest {SETTLED} watched updates",
        )  # fmt: skip


def _blow_up(watched: Watched) -> Iterator[Symptom]:
    rms = watched.of_rows["rms"][:, 1:-1]  # from the first layer on: an embedding is small
    grown = np.vectorize(growth, otypes=[float])(rms[:, 1:], rms[:, :-1])
    for layer in np.flatnonzero(_lasting(grown > BLOW_UP)):
        yield Symptom(
            "activations blow up", watched.names[1:-1][layer + 1],
            f"the residual stream grows {grown[-1, layer]:.1f}x in it, to an rms of {rms[-1, layer + 1]:.3g}",
            f"at most {BLOW_UP:.0f}x from the layer before, in the newest {SETTLED} watched updates",
        )  # fmt: skip


def _seam(watched: Watched, grown: Mapping[str, Any]) -> Iterator[Symptom]:
    layers = watched.names[1:-1]
    new = new_layers(grown["sources"], grown["how"])
    if not 0 < new.sum() < len(new) or len(new) != len(layers):
        return
    of_rows, of_layers = watched.of_rows, watched.of_layers
    measures = {
        "weights": of_rows["weight"][:, 1:-1],
        "gradients": of_rows["gradient"][:, 1:-1],
        "updates over weights": watched.update_over_weight[:, 1:-1],
        "share added to the stream": watched.share_added,
        "attention entropies": of_layers["entropy"],
    }
    for what, values in measures.items():
        ratios = [growth(float(np.median(v[new])), float(np.median(v[~new]))) for v in values]
        if math.isfinite(ratios[-1]) and not 1 / SEAM <= ratios[-1] <= SEAM:
            yield Symptom(
                "growth's seam", _list(layers, new),
                f"{what} of the new layers are {ratios[-1]:.2g}x those of the old ones (median), "
                f"{ratios[0]:.2g}x at update {watched.steps[0]}; grown at {grown['step']}",
                f"within {SEAM:.0f}x of each other at the newest watched update",
            )  # fmt: skip


def new_layers(sources: Sequence[int], how: Sequence[str]) -> np.ndarray:
    """[layers]: which layers of a grown model are new: not copies, or copies of a layer that came before."""
    seen: set[int] = set()
    new = []
    for source, made in zip(sources, how, strict=True):
        new.append(made != "copy" or source in seen)
        seen |= {source} if made == "copy" else set()
    return np.array(new)


def _lasting(rows: np.ndarray) -> np.ndarray:
    """What holds at the newest watched updates, of those that there must be."""
    return rows[-SETTLED:].all(axis=0) if len(rows) >= SETTLED else np.zeros(rows.shape[1], bool)


def _list(names: Sequence[str], chosen: np.ndarray) -> str:
    """The chosen names; several layers in a row as "layers/3 to layers/7"."""
    parts, at = [], np.flatnonzero(chosen)
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        first, last = names[run[0]], names[run[-1]]
        parts.append(first if len(run) == 1 else f"{first} to {last}")
    return ", ".join(parts)
