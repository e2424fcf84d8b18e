"""`python -m eval.items --tasks TASK... --data-dir DIR --out FILE`: the texts of evaluation items.

For `train_tpu.prepare --overlap count --eval-items FILE`, which looks for them in the training text. A text
is a question, a choice, a sentence or a page: every text of what a task scores, as it is in the files of the
task, once for every task; one on each line.
"""

import dataclasses
import json
from pathlib import Path

from core import cli
from core.errors import UserError, run_command
from core.folders import require_new, write_atomically
from eval.local_data import SOURCES, local_source, read_local
from eval.questions import texts


@dataclasses.dataclass
class ItemsConfig:
    """Write the texts of evaluation items into a file, to look for them in training text."""

    tasks: tuple[str, ...] = tuple(SOURCES)
    """Names of tasks that --data-dir may hold, as eval.run names them; of BLiMP, its parts (blimp_NAME)."""
    data_dir: Path | None = None
    """The folder of the tasks' files, as that of eval.run."""
    out: Path | None = None
    """The file to write; it must not exist."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    config = cli.parse(ItemsConfig, argv, prog="python -m eval.items")
    if config.data_dir is None or config.out is None:
        raise UserError(
            "give the folder of the tasks' files with --data-dir, and the file to write with --out"
        )
    require_new(config.out)
    sources = {task: local_source(task) for task in config.tasks}
    for task, source in sources.items():
        if source is None:
            raise UserError(f"unknown task {task!r}: files are read of {', '.join(SOURCES)}, and blimp_NAME")
    lines = []
    for task, source in sources.items():
        items = next(iter(read_local(task, source, config.data_dir).splits.values()))
        found = dict.fromkeys(text for item in items for text in texts(item))
        lines += [json.dumps({"task": task, "text": text}, ensure_ascii=False) + "\n" for text in found]
        print(f"{task}: {len(items):,} items, {len(found):,} different texts")
    write_atomically(config.out, "".join(lines))
    return 0


if __name__ == "__main__":
    run_command(main)
