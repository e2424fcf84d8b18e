"""Text from a folder, with PyTorch: `python -m port_torch.generate FOLDER --prompt "..."`.

Prompts stream; without one a terminal asks for more and more of them; a file of prompts becomes a file of
texts. It draws as core.generate does, but from other random numbers: only greedy texts are the same.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor

from core import checks, cli
from core.errors import EXIT_INTERRUPTED, UserError, run_command
from core.folders import write_atomically
from core.generate import Sampling, pieces, require_room, show, until_ended
from core.model import compute_dtype
from core.text import read_json_lines
from core.tokenizer import Tokenizer
from kernels_cuda import library
from port_torch import decode
from port_torch.decode_rules import why_not
from port_torch.folder import export_manifest
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.model import Decoder, load


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generate text with an exported model, or a Llama's folder that fits."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What port_torch.convert wrote, or a folder of Hugging Face's."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """What to go on from; repeat it for several at once. Default: asked for on a terminal, else the beginning
    of a document."""
    batch_file: Path | None = None
    """Prompts from a JSONL file: a line {"prompt": "..."} each; other fields are kept."""
    out: Path | None = None
    """Where the texts of --batch-file go: the same lines with the field "text"."""
    batch: int = 16
    """Prompts of --batch-file that are worked on at once; it does not change their texts."""
    max_new_tokens: int = 200
    sampling: Sampling = Sampling()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on a GPU, float32 on a CPU."""
    backend: library.Backend = "auto"
    """What makes the tokens: auto is the CUDA kernels where they can (bfloat16 on a GPU), else PyTorch."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the folder's own."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "max_new_tokens", "batch"))
        if (self.batch_file is None) != (self.out is None):
            raise UserError("--batch-file and --out go together: give both or neither")
        if self.batch_file and self.prompt:
            raise UserError("give --prompt or --batch-file, not both")
        if self.out and self.out.exists():
            raise UserError(f"--out {self.out} exists already: give another name, or remove it first")


def main() -> int:
    """The command; 130 when Ctrl-C cut a file of prompts short, after what was done is written."""
    config = cli.parse(GenerateConfig, prog="python -m port_torch.generate")
    device = choose_device(config.device)
    dtype = getattr(torch, compute_dtype(config.dtype, "cpu" if device == "cpu" else "gpu"))
    lines = read_prompts(config.batch_file) if config.batch_file else []
    model = load(config.folder, dtype, device)
    manifest = export_manifest(config.folder)  # verified by `load`
    tokenizer = folder_tokenizer(config.folder, manifest, config.tokenizer, model.config.vocab_size)
    generator = choose_generator(model, config.backend)
    writer = Writer(model, tokenizer, config.sampling, config.max_new_tokens, generator)
    if config.out:
        return write_batches(writer, lines, config.batch, config.out)
    if not config.prompt and sys.stdin.isatty():
        return converse(writer)
    writer.print(config.prompt or [""])
    return 0


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
        raise UserError(f"--backend cuda is not possible: {reason}")
    if reason is not None and model.embed.weight.is_cuda:
        print(f"decoding: plain PyTorch, because {reason}", file=sys.stderr)
    return None


def choose(
    scores: Float[Tensor, "B V"], sampling: Sampling, uniform: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """A token a row from softmax(scores / temperature), cut to the top k and the top p.

    uniform: a random number in [0, 1) a row, float64; the same numbers give the same tokens.
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
    eos: int | None = None,
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
    generator: decode.Generator | None = None
    """Plain PyTorch if None."""

    def added(self, texts: list[str], first_row: int = 0) -> Iterator[list[str]]:
        """What is added to each text, step by step, in whole characters."""
        prompts = [self.tokenizer.begin(text) for text in texts]
        arguments = (prompts, self.sampling, self.max_new_tokens, self.tokenizer.eos, first_row)
        tokens = (
            stream(self.model, *arguments) if self.generator is None else self.generator.stream(*arguments)
        )
        return pieces(self.tokenizer, prompts, tokens)

    def print(self, texts: list[str], first_row: int = 0) -> None:
        """Prints the texts with what is added to them, a single one as it comes."""
        show(texts, self.added(texts, first_row))


def converse(writer: Writer) -> int:
    """Asks for text to go on from until Ctrl-D, and begins anew with each. Ctrl-C stops a text."""
    import readline  # noqa: F401 (so that input() lets lines be edited and recalled)

    print("text to go on from (Ctrl-C stops a text, Ctrl-D ends):", file=sys.stderr)
    number = 0
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            writer.print([text], number)
        except KeyboardInterrupt:
            print()
        except UserError as error:  # a text too long, say: the next may do
            print(f"error: {error}", file=sys.stderr)
        number += 1


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with a text `prompt`; a UserError names the line that is none."""
    objects = []
    for where, content in read_json_lines(path):
        if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
            raise UserError(f'{where} is no object with a text "prompt"')
        objects.append(content)
    if not objects:
        raise UserError(f'{path} is empty: give a line {{"prompt": "..."}} for each text')
    return objects


def write_batches(writer: Writer, lines: list[dict[str, Any]], batch: int, out: Path) -> int:
    """Writes every line with its "text", into a file that is there when it is whole.

    Ctrl-C ends it at the last whole batch; what is done is kept, and the exit code says so.
    """
    room = writer.model.config.context - 1
    for number, line in enumerate(lines, 1):  # before hours of work, not in their middle
        if (n_tokens := len(writer.tokenizer.begin(line["prompt"]))) > room:
            raise UserError(f"prompt {number} is {n_tokens} tokens long: shorten it to at most {room}")
    done: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        for start in range(0, len(lines), batch):
            part = lines[start : start + batch]
            columns = list(writer.added([line["prompt"] for line in part], first_row=start))
            texts = ["".join(row) for row in zip(*columns, strict=True)]
            done += [
                json.dumps({**line, "text": text}, ensure_ascii=False) + "\n"
                for line, text in zip(part, texts, strict=True)
            ]
            print(f"{len(done)} of {len(lines)} prompts", file=sys.stderr)
    if done:
        write_atomically(out, "".join(done))
    if len(done) == len(lines):
        print(f"wrote {out}", file=sys.stderr)
        return 0
    kept = f"{len(done)} of {len(lines)} prompts are in {out}" if done else "nothing was done yet"
    print(f"interrupted: {kept}", file=sys.stderr)
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    run_command(main)
