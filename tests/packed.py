"""Windows of several documents, and the formulas in float64 for every document run by itself."""

import numpy as np
import torch

from core.config import ModelConfig
from core.model import Params
from core.tokenizer import Tokenizer
from tests.models import flat
from tests.reference import logits64

TEXT_IDS = 95  # ids of text are below


class Marks(Tokenizer):
    """A tokenizer of which only the marks of documents matter."""

    def __init__(self, bos: int | None, eos: int):
        self.bos, self.eos = bos, eos

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        raise NotImplementedError


BOTH_MARKS = Marks(95, 96)
EOS_ALONE = Marks(None, 96)
ONE_MARK = Marks(96, 96)


def stream(marks: Marks, n: int = 40, longest: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 1 to `longest` ids as they are prepared, and the document in which each token is read."""
    rng = np.random.default_rng(0)
    tokens, owners = [], []
    for number in range(n):
        text = rng.integers(0, TEXT_IDS, rng.integers(1, longest + 1)).tolist()
        opening = [] if marks.bos is None else [marks.bos]
        tokens += [*opening, *text, marks.eos]
        # Without a bos, an eos is what the next document follows.
        owners += [number] * len([*opening, *text]) + [number + (marks.bos is None)]
    return np.array(tokens, np.uint16), np.array(owners, np.int32)


def windows(marks: Marks, context: int, longest: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """[N, context + 1] tokens, and [N, context] numbers of the documents in which they are read."""
    tokens, owners = stream(marks, longest=longest)
    cut = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context].copy()
    return cut, owners[: len(cut) * context].reshape(len(cut), context)


def scores64(
    config: ModelConfig, p: dict[str, torch.Tensor], inputs: np.ndarray, documents: np.ndarray
) -> torch.Tensor:
    """Logits [N, S, V] of tokens [N, S] in float64, of every document of a row by itself."""
    scores = [
        logits64(config, p, row[numbers == n][None])[0]
        for row, numbers in zip(inputs, documents, strict=True)
        for n in np.unique(numbers)
    ]
    return torch.cat(scores).view(*inputs.shape, -1)


def alone64(
    config: ModelConfig, params: Params, tokens: np.ndarray, documents: np.ndarray
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits [N, S, V], mean loss and its gradients in float64, of every document of windows by itself."""
    p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in flat(params).items()}
    scores = scores64(config, p, tokens[:, :-1], documents)
    targets = torch.tensor(tokens[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: leaf.grad.numpy() for name, leaf in p.items()}
    return scores.detach().numpy(), loss.item(), gradients
