"""Whether a run has begun: a start that ends before its first update leaves nothing that binds the next one.

Much can end it there: a step that does not fit into memory, data found to be unreadable, Ctrl-C while it
compiles. What it wrote by then says what was asked for and holds no result.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from core.checkpoint.steps import HIDDEN_NAME
from core.folder_kinds import RESULT
from core.run.log import EVENTS, METRICS, SAMPLES, WATCHED, read_log
from core.run.profiling import FOLDER as PROFILE
from core.run.steering import RECORD
from core.tokenizer import TOKENIZER_FILE

CHECKPOINTS = "checkpoints"
# What a start writes before its first update. config.json comes last: as long as it is there, the others are
# known to be a run's.
WRITTEN = (CHECKPOINTS, EVENTS, PROFILE, METRICS, WATCHED, SAMPLES, TOKENIZER_FILE, "config.json")


def has_begun(out: Path) -> bool:
    """Whether the run folder `out` has what a later start must keep to: a checkpoint (also one set aside), an
    update in the log, a result, or a record of steering."""
    if any((out / name).exists() for name in (RESULT, RECORD)):
        return True
    steps = out / CHECKPOINTS
    saved = steps.is_dir() and any(not HIDDEN_NAME.fullmatch(path.name) for path in steps.iterdir())
    return saved or bool(read_log(out, "train"))


def remove_start(out: Path, but: Collection[str] = ()) -> None:
    """Removes what a start wrote into `out`, where no run has begun, except the names in `but` and links."""
    for name in WRITTEN:
        path = out / name
        if name in but or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
