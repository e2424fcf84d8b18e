"""What growing must make of a training state, after docs/STACKING.md: NumPy, and nothing of the project.

Every leaf of an MTLM1, of one without a gate and of an MTLM2 is spelled out, as a checkpoint names it,
with its shape.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.checks import require

Leaves = dict[str, np.ndarray]

SIZES = {"V": 97, "C": 96, "D": 48, "F": 80}  # vocabulary, context, width, width of the MLP: tests/models.py
# Leaf -> shape. V C D F are sizes.
OUTSIDE = {
    "mtlm1": {"embed/table": "V D", "norm/scale": "D"},
    "ungated": {"embed/table": "V D", "norm/scale": "D"},
    "mtlm2": {"embed/table": "V D", "positions/table": "C D", "norm/scale": "D", "head/kernel": "D V"},
}
# The same for one layer.
LAYER = {
    "mtlm1": {
        "attn_norm/scale": "D", "attn/q/kernel": "D D", "attn/k/kernel": "D D", "attn/v/kernel": "D D",
        "attn/o/kernel": "D D", "mlp_norm/scale": "D", "mlp/gate/kernel": "D F", "mlp/up/kernel": "D F",
        "mlp/down/kernel": "F D",
    },
    "ungated": {
        "attn_norm/scale": "D", "attn/q/kernel": "D D", "attn/k/kernel": "D D", "attn/v/kernel": "D D",
        "attn/o/kernel": "D D", "mlp_norm/scale": "D", "mlp/up/kernel": "D F", "mlp/down/kernel": "F D",
    },
    "mtlm2": {
        "attn_norm/scale": "D", "attn/q/kernel": "D D", "attn/q/bias": "D", "attn/k/kernel": "D D",
        "attn/k/bias": "D", "attn/v/kernel": "D D", "attn/v/bias": "D", "attn/o/kernel": "D D",
        "attn/o/bias": "D", "mlp_norm/scale": "D", "mlp/up/kernel": "D F", "mlp/up/bias": "F",
        "mlp/down/kernel": "F D", "mlp/down/bias": "D",
    },
}  # fmt: skip
# Through these a block writes into the residual stream; identity growth zeroes them.
WRITES = ("attn/o/kernel", "attn/o/bias", "mlp/down/kernel", "mlp/down/bias")
# Guard's window and counters -> shape; W is the window.
GUARD = {"losses": "W", "norms": "W", "accepted": "", "streak": "", "skipped": ""}

# The table of operators for layers 0 1 2 3: old layers in their new order; c copy, i identity, f fresh.
OPERATORS = {
    "stack": ("0 1 2 3 0 1 2 3", "cccccccc"),
    "interleave": ("0 0 1 1 2 2 3 3", "cccccccc"),
    "overlap": ("0 1 2 1 2 3", "cccccc"),
    "middle": ("0 1 2 1 2 3", "cccccc"),
    "identity": ("0 1 2 3 0 1 2 3", "cccciiii"),
    "random": ("0 1 2 3 0 1 2 3", "ccccffff"),
}


def homes(model: str, optimizer: str) -> Iterator[tuple[str, bool, str, dict[str, str]]]:
    """Every parameter: its name, whether it belongs to a layer, its shape (of one layer), and its moments'
    paths by kind: AdamW has two; Muon's matrices inside the layers have one, all else AdamW's two."""
    for layered, table in ((False, OUTSIDE[model]), (True, LAYER[model])):
        for name, shape in table.items():
            path = f"layers/{name}" if layered else name
            if optimizer == "adamw":
                place, kinds = "opt_state/0", ("mu", "nu")
            elif layered and name.endswith("kernel"):
                place, kinds = "opt_state/inner_states/muon/inner_state/0", ("mu",)
            else:
                place, kinds = "opt_state/inner_states/adam/inner_state/0", ("mu", "nu")
            yield name, layered, shape, {kind: f"{place}/{kind}/{path}" for kind in kinds}


def counters(optimizer: str) -> list[str]:
    """The paths of the optimizer's counters of updates."""
    if optimizer == "adamw":
        return ["opt_state/0/count"]
    return [f"opt_state/inner_states/{part}/inner_state/0/count" for part in ("adam", "muon")]


NEWTON_SCHULZ = "opt_state/inner_states/muon/inner_state/0/ns_coeffs"  # three constants of Muon's


def shapes(model: str, optimizer: str, n_layers: int, window: int, sizes: dict = SIZES) -> dict[str, tuple]:
    """Every leaf of a training state and its shape."""

    def shape(words: str) -> tuple[int, ...]:
        return tuple((sizes | {"W": window})[word] for word in words.split())

    state: dict[str, tuple] = {}
    for name, layered, words, moments in homes(model, optimizer):
        whole = (n_layers, *shape(words)) if layered else shape(words)
        state[f"params/layers/{name}" if layered else f"params/{name}"] = whole
        state |= dict.fromkeys(moments.values(), whole)
    state |= dict.fromkeys(counters(optimizer), ())
    if optimizer == "muon":
        state[NEWTON_SCHULZ] = (3,)
    return state | {f"guard/{name}": shape(words) for name, words in GUARD.items()}


def grown(
    model: str, optimizer: str, old: Leaves, sources: str, how: str, *, drawn: Leaves | None = None,
    reset: bool = False,
) -> Leaves:  # fmt: skip
    """The leaves of the grown state.

    Args:
        sources, how: the plan, as in `OPERATORS`.
        drawn: new parameters of the grown model, by path, for fresh layers.
        reset: the optimizer starts anew.
    """
    plan = list(zip(map(int, sources.split()), how, strict=True))
    new: Leaves = {}
    for name, layered, _, moments in homes(model, optimizer):
        if not layered:
            new[f"params/{name}"] = old[f"params/{name}"]
            new |= {path: np.zeros_like(old[path]) if reset else old[path] for path in moments.values()}
            continue
        rows = {"params": [], **{kind: [] for kind in moments}}
        for layer, (source, kind) in enumerate(plan):
            zeroed = kind == "i" and name in WRITES
            row = old[f"params/layers/{name}"][source]
            if kind == "f":
                row = drawn[f"params/layers/{name}"][layer]
            rows["params"].append(np.zeros_like(row) if zeroed else row)
            for moment, path in moments.items():
                row = old[path][source]
                empty = reset or (moment == "mu" and (zeroed or kind == "f"))
                rows[moment].append(np.zeros_like(row) if empty else row)
        new[f"params/layers/{name}"] = np.stack(rows["params"])
        new |= {path: np.stack(rows[moment]) for moment, path in moments.items()}
    for path in counters(optimizer):
        new[path] = np.zeros_like(old[path]) if reset else old[path]
    if optimizer == "muon":
        new[NEWTON_SCHULZ] = old[NEWTON_SCHULZ]
    new |= {f"guard/{name}": np.zeros_like(old[f"guard/{name}"]) for name in GUARD}
    return new | {"guard/skipped": old["guard/skipped"]}


def rates(
    steps: int,
    warmup: int,
    decay: int,
    *,
    shape: str = "linear",
    schedule: str = "keep",
    at: int = 0,
    rewarm: int = 0,
) -> list[float]:
    """The learning rate of every update, as a part of the peak, of a warmup-stable-decay run grown at `at`.

    The warmup rises linearly over `warmup` updates and reaches 1 in the last of them; the rate of the last
    `decay` ones falls from 1 and would be 0 in the update after the end: linearly, or as the root of the
    part that is done rises. `rewarm` scales the rate as the warmup does; `restart` begins anew at `at`.
    """
    if schedule == "restart":
        return [1.0] * at + rates(steps - at, warmup, decay, shape=shape)
    values = []
    for step in range(steps):
        rate = min(1.0, (step + 1) / warmup if warmup else 1.0)
        if step >= steps - decay:
            done = 1 - (steps - step) / decay
            rate *= 1 - (done if shape == "linear" else done**0.5)
        if schedule == "rewarm" and at <= step < at + rewarm:
            rate *= (step + 1 - at) / rewarm
        values.append(rate)
    return values


def read(step_dir: Path) -> Leaves:
    """The leaves of a checkpoint off the disk: each is one zarr array of one uncompressed chunk."""
    leaves = {}
    for folder in (path.parent for path in (step_dir / "state").glob("*/.zarray")):
        array = json.loads((folder / ".zarray").read_text())
        require(array["chunks"] == array["shape"] and array["compressor"] is None, folder)
        (chunk,) = folder.glob("[0-9]*")
        values = np.frombuffer(chunk.read_bytes(), array["dtype"])
        require(values.size == math.prod(array["shape"]), folder, values.size, array["shape"])
        leaves[folder.name.replace(".", "/")] = values.reshape(array["shape"])
    return leaves


def assert_equal(found: Leaves, expected: Leaves) -> None:
    """To the bit, type and path."""
    require(found.keys() == expected.keys(), found.keys() ^ expected.keys())
    for path, leaf in expected.items():
        require(found[path].dtype == leaf.dtype and found[path].shape == leaf.shape, path)
        require(found[path].tobytes() == leaf.tobytes(), path)
