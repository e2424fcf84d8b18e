"""How fast the loader alone is: `python -m bench.loader [--data DIR]`.

Reads shuffled batches as training does, and nothing else: of the dataset alone, and of a mixture that has it
as three sources. Without --data it makes a dataset of random tokens in a temporary folder.
"""

import dataclasses
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from core import checks, cli
from core.console import Table
from core.data.batches import Data, train_batches
from core.data.dataset import TRAIN, Dataset, Split, open_dataset, write_manifest
from core.data.mixture import Mixture, Phase
from core.data.packing import write_splits
from core.errors import UserError, run_command
from core.tokenizer import id_dtype


@dataclasses.dataclass
class LoaderConfig:
    """Measure the data loader."""

    data: Path | None = None
    """A prepared dataset."""
    batches: tuple[int, ...] = (32, 256)
    """Batch sizes to measure, in windows."""
    seconds: float = 5.0
    """How long to read at each batch size."""
    windows: int | None = None
    """Size of the dataset of random tokens. Default: 20,000."""
    context: int | None = None
    """Its context. Default: 1,024."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "batches"))
        checks.positive(seconds=self.seconds)
        for batch in self.batches:
            checks.counts(batches=batch)
        random = checks.fields(self, "windows", "context")
        checks.counts(**random)
        if self.data is not None and (given := [name for name, value in random.items() if value is not None]):
            raise UserError(f"--{given[0]} is of random tokens, and {self.data} has its own: leave it out")


def random_dataset(folder: Path, windows: int, context: int) -> Dataset:
    """A dataset of random tokens, frequent ids more often, about as compressible as text."""
    vocab_size = 32_000
    dtype = id_dtype(vocab_size)
    tokens = np.random.default_rng(0).geometric(1 / 3000, size=(windows, context + 1)) % vocab_size
    write_splits(folder, context, {TRAIN: tokens.astype(dtype)})
    record = {"name": "random", "sha256": "0" * 64, "vocab_size": vocab_size}
    split = Split(TRAIN, documents=0, bytes=0, tokens=windows * context + 1, windows=windows)
    return write_manifest(folder, context, record, [split], dropped={}, sources=["random tokens"])


def measure(dataset: Data, batch: int, seconds: float) -> tuple[float, float]:
    """(tokens/s, longest wait for a batch in ms) after the first batch, which opens the files."""
    batches = train_batches(dataset, seed=0, batch=batch, vocab_size=dataset.tokenizer_record["vocab_size"])
    next(batches)
    started = last = time.perf_counter()
    count, longest = 0, 0.0
    while last - started < seconds:
        next(batches)
        count += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    batches.close()
    return count * batch * dataset.context / (last - started), longest * 1e3


def main(argv: list[str] | None = None) -> int:
    """Times the loader and prints the table."""
    config = cli.parse(LoaderConfig, argv, prog="python -m bench.loader", description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        if config.data:
            dataset = open_dataset(config.data)
        else:
            windows = 20_000 if config.windows is None else config.windows
            context = 1024 if config.context is None else config.context
            dataset = random_dataset(Path(folder), windows, context)
        title = f"loader alone, context {dataset.context}, {len(os.sched_getaffinity(0))} cores"
        table = Table((), ("batch", "sources", "M tokens/s", "batches/s", "longest wait, ms"), title=title)
        counts = (("a", 2800), ("b", 1000), ("c", 200))
        mixture = Mixture({name: dataset for name, _ in counts}, (Phase(0, counts),))
        for batch, data in itertools.product(config.batches, (dataset, mixture)):
            rate, wait = measure(data, batch, config.seconds)
            cells = (f"{rate / 1e6:.1f}", f"{rate / batch / dataset.context:.1f}", f"{wait:.0f}")
            table.add_row(f"{batch}", "3" if data is mixture else "1", *cells)
        table.print()
    return 0


if __name__ == "__main__":
    run_command(main)
