"""Tokens from the mirror: prompts in, text out, by plain PyTorch or by the CUDA kernels.

It draws as core.generation does, but from other random numbers: only greedy texts are the same.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from core.checkpoint.manifest import EXPORT_MANIFEST, recorded_hash
from core.config import compute_dtype
from core.errors import UserError
from core.sampling import Sampling, pieces, require_room, show, until_ended
from core.tokenizer import Tokenizer
from kernels_cuda import library
from port_torch import decode
from port_torch.decode_rules import why_not
from port_torch.decoding import Decoding
from port_torch.folder import export_manifest, weights_hash
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.model import Decoder, load


def choose_device(requested: str) -> str:
    """The device to run on; a UserError where a GPU is asked for and there is none."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no NVIDIA GPU here; leave it out or give --device cpu")
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return requested


def choose_generator(model: Decoder, backend: library.Backend) -> decode.Generator | None:
    """The kernels' generator, or None for plain PyTorch; says which on stderr where there is a choice.

    Raises:
        UserError: "cuda", and the kernels are not to be had or cannot run this model.
    """
    if backend == "torch":
        return None
    reason = why_not(model)
    if reason is None and library.load(backend).file is not None:
        return decode.Generator(model)
    if backend == "cuda":
        raise UserError(f"cannot use --backend cuda: {reason}")
    if reason is not None and model.embed.weight.is_cuda:
        print(f"decoding: plain PyTorch, because {reason}", file=sys.stderr)
    return None


def choose(
    scores: Float[Tensor, "B V"], sampling: Sampling, uniform: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """One token per row from softmax(scores / temperature), cut to the top k and the top p.

    uniform: one random number in [0, 1) per row, float64; the same numbers give the same tokens.
    """
    if sampling.temperature == 0:
        return scores.argmax(-1)
    ranked, order = (scores.double() / sampling.temperature).sort(dim=-1, descending=True)
    probability = ranked[:, : sampling.top_k or None].softmax(-1)
    # A token stays while those before it have not reached top_p: the likeliest always does.
    before = probability.cumsum(-1) - probability
    kept = probability.where((before < sampling.top_p) | (sampling.top_p >= 1), 0.0)
    edges = kept.cumsum(-1)
    drawn = torch.searchsorted(edges, (uniform[:, None] * edges[:, -1:]).contiguous(), right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # a product rounded up to the sum would pass it
    return order.gather(-1, drawn.minimum(last))[:, 0]


@torch.inference_mode()
def stream(
    model: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
    first_row: int = 0,
) -> Iterator[list[int | None]]:
    """Yields the next token of every prompt, step by step; None for a row that has ended.

    A row ends after `eos` (which it does not yield), `max_new_tokens` or at the model's context. Row i draws
    from numbers of (seed, first_row + i), so its text does not depend on what else is in the batch.

    Raises:
        UserError: a prompt is empty or leaves no room in the context.
    """
    context, device = model.config.context, model.embed.weight.device
    require_room(prompts, context)
    draws = [np.random.default_rng((sampling.seed, first_row + row)) for row in range(len(prompts))]

    def choose_next(hidden: Float[Tensor, "B D"]) -> Int[Tensor, " B"]:
        uniform = torch.tensor([draw.random() for draw in draws], dtype=torch.float64, device=device)
        return choose(model.logits(hidden), sampling, uniform)

    def steps() -> Iterator[list[int]]:
        longest = max(map(len, prompts))
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        length = min(context, longest + max_new_tokens)
        cache = model.empty_cache(len(prompts), length)
        position = torch.tensor([len(prompt) for prompt in prompts], device=device)
        all_positions = torch.arange(longest, device=device).expand(len(prompts), -1)
        hidden = model(torch.tensor(padded, device=device), all_positions, cache)
        token = choose_next(hidden[torch.arange(len(prompts)), position - 1])
        while True:
            yield token.tolist()
            hidden = model(token[:, None], position[:, None], cache)
            # A row that has ended idles at the last position; what it makes there is not read.
            position = (position + 1).clamp(max=length - 1)
            token = choose_next(hidden[:, 0])

    yield from until_ended(steps(), prompts, context, max_new_tokens, eos)


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model with its tokenizer and how to draw from it."""

    model: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int
    generator: decode.Generator | None
    """Plain PyTorch if None."""
    folder: Path
    """Where the model came from."""

    def identity(self) -> str:
        """A hash that proves which model it is: the folder's own, or that of its weights."""
        if export_manifest(self.folder):
            return recorded_hash(self.folder, EXPORT_MANIFEST)
        return weights_hash(self.folder)

    def computed(self) -> dict[str, str]:
        """What the numbers come from besides the model, in words."""
        table = self.model.table
        kernels = "torch" if self.generator is None else "cuda"
        return {"dtype": str(table.dtype), "device": table.device.type, "backend": kernels}

    def about(self) -> str:
        """Model and decoding in words."""
        computed = self.computed()
        kernels = "plain PyTorch" if self.generator is None else "the CUDA kernels"
        return (
            f"{self.folder}: {self.model.config.n_params:,} parameters, decoded by {kernels} in "
            f"{computed['dtype'].removeprefix('torch.')} on {computed['device']}"
        )

    def stream(
        self, prompts: list[list[int]], first_row: int, ends: int | Sequence[int]
    ) -> Iterator[list[int | None]]:
        """`stream` of this model, by the kernels where it has them; ends: the ids that end a row."""
        arguments = (prompts, self.sampling, self.max_new_tokens, ends, first_row)
        return stream(self.model, *arguments) if self.generator is None else self.generator.stream(*arguments)

    def added(self, prompts: list[list[int]], first_row: int = 0) -> Iterator[list[str]]:
        """What is added to each prompt, step by step, in whole characters."""
        return pieces(self.tokenizer, prompts, self.stream(prompts, first_row, self.tokenizer.eos))

    def print(self, texts: list[str], first_row: int = 0) -> None:
        """Prints the texts with what is added to them, a single one as it comes."""
        show(texts, self.added([self.tokenizer.begin(text) for text in texts], first_row))


def open_writer(folder: Path, sampling: Sampling, max_new_tokens: int, decoding: Decoding) -> Writer:
    """The model of a folder, ready to write.

    Raises:
        UserError: the folder, its tokenizer or the device is not what it should be.
    """
    device = choose_device(decoding.device)
    dtype = getattr(torch, compute_dtype(decoding.dtype, "cpu" if device == "cpu" else "gpu"))
    model = load(folder, dtype, device)
    manifest = export_manifest(folder)  # verified by `load`
    tokenizer = folder_tokenizer(folder, manifest, decoding.tokenizer, model.config.vocab_size)
    generator = choose_generator(model, decoding.backend)
    return Writer(model, tokenizer, sampling, max_new_tokens, generator, folder)
