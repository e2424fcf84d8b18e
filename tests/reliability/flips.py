"""One byte changed in a file of ours: it is refused by name, or nothing that is read of it differs.

Half of the bytes are drawn evenly over all bytes of a folder, half after drawing one of its files evenly,
so that small files are met as often as large ones. A byte becomes any of the other 255.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.checkpoint.checkpointer import nest, restore
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.data.dataset import open_dataset, open_windows
from core.errors import UserError
from core.run.folder import read_config
from core.run.log import read_log
from core.tokenizer import load_tokenizer_of
from kernels_cuda.compiler import made_of
from port_torch.formats import exported
from port_torch.model import load

Opened = Any
"""What a user gets of the files: compared as JSON."""


def arrays(tree: Any) -> dict[str, str]:
    """The sha256 of every array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {str(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves}


def open_checkpoint(folder: Path) -> Opened:
    """The whole state, as a resume restores it, and what its manifest says."""
    step_dir = find_step(folder)
    manifest = load_manifest(step_dir)
    shapes = {
        path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
        for path, leaf in manifest.tree.items()
    }
    return [arrays(restore(step_dir, nest(shapes))), manifest.config, manifest.step, manifest.tokenizer]


def open_data(folder: Path) -> Opened:
    """Every window of every split, with what the metadata says, as training and evaluation read them."""
    dataset = open_dataset(folder)
    vocab_size = dataset.tokenizer_record["vocab_size"]
    tokens = {}
    for name in dataset.splits:
        windows = open_windows(dataset, name)
        tokens[name] = windows.read(list(range(len(windows))), vocab_size)
    splits = {name: [split.documents, split.bytes, split.tokens] for name, split in dataset.splits.items()}
    tokenizer = load_tokenizer_of(dataset.tokenizer_record, [folder], str(folder), None)
    return [arrays(tokens), splits, dataset.fingerprint, tokenizer.sha256, dataset.context]


def open_export(folder: Path) -> Opened:
    """The model that import, generation and fine-tuning read."""
    imported = exported.read(folder)
    decoder = load(folder)
    state = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    return [arrays(imported.params), arrays(state), repr(imported.config)]


def open_run(folder: Path) -> Opened:
    """The settings that a resume takes, and the state; its log may be damaged, but stops nothing."""
    for kind in ("train", "eval", "sample", "event"):
        read_log(folder, kind)
    return [read_config(folder), *open_checkpoint(folder)]


def open_kernels(folder: Path) -> Opened:
    """What is checked before the library is loaded."""
    facts = made_of(folder / "mtlm_kernels.so")
    if facts is None:
        raise UserError(f"{folder / 'mtlm_kernels.so'} or its .json is damaged")
    return facts


def flip(folder: Path, read: Callable[[Path], Opened], count: int, seed: int = 0) -> Counter[str]:
    """Outcomes of `count` flips in files of `folder`: refused, equal, or what else happened to which file."""
    rng, outcomes = random.Random(seed), Counter()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    expected = as_json(read(folder))
    for number in range(count):
        file = rng.choices(files, sizes)[0] if number % 2 else rng.choice(files)
        at = rng.randrange(file.stat().st_size)
        with file.open("r+b") as opened:
            opened.seek(at)
            old = opened.read(1)[0]
            opened.seek(at)
            opened.write(bytes([(old + rng.randrange(1, 256)) % 256]))
        try:
            equal = as_json(read(folder)) == expected
            outcome = "equal" if equal else f"another result: {file.relative_to(folder)}"
        except UserError as error:
            outcome = "refused" if str(folder) in str(error) else f"refused without its name: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {file.relative_to(folder)}"
        outcomes[outcome] += 1
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([old]))
    return outcomes


def as_json(opened: Opened) -> str:
    """One spelling of what was read."""
    return json.dumps(opened, sort_keys=True, default=str)
