"""What a replay prints."""

from core.data.dataset import Dataset
from core.progress import make_console
from core.tokenizer import Tokenizer
from train_tpu.replay.compiled import compare, make_again, open_setup
from train_tpu.replay.recorded import Recorded


def replay(recorded: Recorded, dataset: Dataset, tokenizer: Tokenizer) -> int:
    """Makes the update again and says what is found; the exit code."""
    console = make_console()
    setup = open_setup(recorded, dataset, tokenizer, console)
    replayed = make_again(recorded, setup)
    for line in compare(recorded, setup, replayed):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
