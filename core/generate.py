"""Text from a trained model: `python -m core.generate RUN --prompt "..."`.

A prompt is read in one pass that fills the cache of keys and values; then one compiled step makes a
token for every row of the batch. How to sample is an input of that step, so that nothing is compiled
twice, and each row draws from keys of its own: its text does not depend on what else is in the batch.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, UInt32

from core import checks, cli
from core.checkpoint import find_step, load_manifest, restore_params
from core.compilation_cache import keep_compiled
from core.config import ModelConfig
from core.errors import UserError, run_command
from core.keys import Purpose, make_key
from core.model import (
    Compute,
    KVCache,
    Params,
    abstract_params,
    compute_dtype,
    empty_cache,
    forward_cached,
    logits,
)
from core.tokenizer import TextStream, Tokenizer, load_tokenizer, require_same, tokenizer_record

MIN_PREFILL = 16  # prompts are padded to a power of two from here on, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the likeliest token; 1 samples the model's own distribution."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        checks.not_negative(temperature=self.temperature)
        checks.counts(0, top_k=self.top_k)
        checks.above_zero_to_one(top_p=self.top_p)
        checks.seeds(seed=self.seed)


class Rows(NamedTuple):
    """What a decoding step needs of every row."""

    token: Int[Array, " B"]
    """The newest token, not yet in the cache."""
    position: Int[Array, " B"]
    """Where it stands."""


class Knobs(NamedTuple):
    """`Sampling` as inputs of the compiled step."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    seed: UInt32[Array, ""]


def sample(scores: Float[Array, "B V"], position: Int[Array, " B"], knobs: Knobs) -> Int[Array, " B"]:
    """Draws a token a row from softmax(scores / temperature), cut to the top k and the top p.

    The key is that of (seed, row) and the position, so a draw can be repeated on its own.
    """
    greedy = jnp.argmax(scores, axis=-1)
    scaled = scores / jnp.maximum(knobs.temperature, 1e-6)
    ranked = jnp.sort(scaled, axis=-1, descending=True)
    vocab = scores.shape[-1]
    k = jnp.where(knobs.top_k > 0, jnp.minimum(knobs.top_k, vocab), vocab)
    probability = jax.nn.softmax(jnp.where(jnp.arange(vocab) < k, ranked, -jnp.inf), axis=-1)
    # A token stays while those before it have not reached top_p: the likeliest always does.
    before = jnp.cumsum(probability, axis=-1) - probability
    # At top_p = 1 nothing is cut, though the rounded sum may reach 1 before its end.
    n_kept = jnp.minimum(k, jnp.sum((before < knobs.top_p) | (knobs.top_p >= 1), axis=-1))
    least = jnp.take_along_axis(ranked, n_kept[:, None] - 1, axis=-1)
    kept = jnp.where(scaled >= least, scaled, -jnp.inf)

    def draw(row: Array, position: Array, kept: Array) -> Array:
        key = jax.random.fold_in(make_key(knobs.seed, Purpose.SAMPLE, row), position)
        return jax.random.categorical(key, kept)

    drawn = jax.vmap(draw)(jnp.arange(scores.shape[0]), position, kept)
    return jnp.where(knobs.temperature > 0, drawn, greedy).astype(jnp.int32)


class Generator:
    """Compiled generation for one model; keeps its compiled functions from call to call."""

    def __init__(self, config: ModelConfig, compute: Compute):
        self.config = config
        self.compute = compute
        self._prefill = jax.jit(self._prefill_pass)
        self._decode = jax.jit(self._decode_step, donate_argnums=(1,))

    def _prefill_pass(self, params, tokens, lengths, knobs) -> tuple[Rows, KVCache]:
        batch, width = tokens.shape
        cache = empty_cache(self.config, batch, self.config.context, self.compute.dtype)
        positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
        hidden, cache = forward_cached(self.config, params, tokens, positions, cache, self.compute)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        token = sample(logits(self.config, params, last), lengths, knobs)
        return Rows(token, lengths), cache

    def _decode_step(self, params, cache, rows, knobs) -> tuple[Rows, KVCache]:
        hidden, cache = forward_cached(
            self.config, params, rows.token[:, None], rows.position[:, None], cache, self.compute
        )
        # A row that has ended idles at the last position; what it makes there is not read.
        position = jnp.minimum(rows.position + 1, self.config.context - 1)
        token = sample(logits(self.config, params, hidden[:, 0]), position, knobs)
        return Rows(token, position), cache

    def stream(
        self,
        params: Params,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        eos: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of every prompt, step by step; None for a row that has ended.

        A row ends after `eos` (which it does not yield), `max_new_tokens` or at the model's context.

        Raises:
            UserError: a prompt is empty or leaves no room in the context.
        """
        context = self.config.context
        require_room(prompts, context)
        lengths = np.array([len(p) for p in prompts], np.int32)
        width = min(context, max(MIN_PREFILL, 1 << int(lengths.max() - 1).bit_length()))
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        knobs = Knobs(
            np.float32(sampling.temperature), np.int32(sampling.top_k),
            np.float32(sampling.top_p), np.uint32(sampling.seed),
        )  # fmt: skip

        def steps() -> Iterator[list[int]]:
            rows, cache = self._prefill(params, tokens, lengths, knobs)
            while True:
                yield np.asarray(rows.token).tolist()
                rows, cache = self._decode(params, cache, rows, knobs)

        yield from until_ended(steps(), prompts, context, max_new_tokens, eos)

    def complete(self, *args, **kwargs) -> list[list[int]]:
        """All new tokens of every prompt; the arguments are those of `stream`."""
        columns = list(self.stream(*args, **kwargs))
        return [[t for t in row if t is not None] for row in zip(*columns, strict=True)]


def require_room(prompts: list[list[int]], context: int) -> None:
    """A UserError for a prompt that is empty or leaves no room in the context."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1:
        raise UserError("a prompt has no tokens; give at least the begin-of-sequence token")
    if longest >= context:
        raise UserError(
            f"a prompt is {longest} tokens long, but the model's context is {context}: shorten it to at most "
            f"{context - 1}"
        )


def until_ended(
    steps: Iterable[list[int]], prompts: list[list[int]], context: int, max_new_tokens: int, eos: int | None
) -> Iterator[list[int | None]]:
    """The tokens of every step, None for a row that has ended; asks for no step that nobody needs.

    A row ends after `eos` (which it does not yield), `max_new_tokens` or at the model's context.
    """
    room = np.array([context - len(prompt) for prompt in prompts])
    ended = np.zeros(len(prompts), bool)
    for made, new in enumerate(itertools.islice(steps, max_new_tokens), 1):
        if eos is not None:
            ended |= np.array(new) == eos
        yield [None if done else token for done, token in zip(ended, new, strict=True)]
        ended |= made >= room
        if ended.all():
            return


def pieces(
    tokenizer: Tokenizer, prompts: list[list[int]], steps: Iterable[list[int | None]]
) -> Iterator[list[str]]:
    """The text that each step of `stream` adds to each row, in whole characters; at the end what is left.

    prompts: the ids before it; whether the first new token begins with a space depends on them.
    """
    streams = [TextStream(tokenizer) for _ in prompts]
    for stream, prompt in zip(streams, prompts, strict=True):
        for token in prompt:
            stream.push(token)
    for tokens in steps:
        yield [
            "" if token is None else stream.push(token) for stream, token in zip(streams, tokens, strict=True)
        ]
    yield [stream.flush() for stream in streams]


def show(texts: list[str], added: Iterable[list[str]]) -> None:
    """Prints texts and what is added to them (`pieces`): one as it comes, several when all are done."""
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
        for (piece,) in added:
            print(piece, end="", flush=True)
        print()
    else:
        for text, *parts in zip(texts, *added, strict=True):
            print(f"{text}{''.join(parts)}\n-----")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generate text with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, or one checkpoint in it."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """What to go on from; repeat it for several at once. Default: the beginning of a document."""
    max_new_tokens: int = 200
    sampling: Sampling = Sampling()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; auto is bfloat16 on GPU and TPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        checks.counts(max_new_tokens=self.max_new_tokens)


def main() -> int:
    """The command: one prompt streams, several are printed one after the other when all are done."""
    config = cli.parse(GenerateConfig, prog="python -m core.generate")
    keep_compiled()
    step_dir = find_step(config.run)
    manifest = load_manifest(step_dir)
    model = ModelConfig(**manifest.config["model"])
    tokenizer = load_tokenizer(manifest.tokenizer["name"])
    require_same(manifest.tokenizer, tokenizer_record(tokenizer), str(step_dir), "the tokenizer here")
    params = restore_params(step_dir, abstract_params(model))
    generator = Generator(model, Compute(dtype=compute_dtype(config.dtype, jax.default_backend())))
    texts = config.prompt or [""]
    prompts = [tokenizer.begin(text) for text in texts]
    steps = generator.stream(params, prompts, config.sampling, config.max_new_tokens, tokenizer.eos)
    show(texts, pieces(tokenizer, prompts, steps))
    return 0


if __name__ == "__main__":
    run_command(main)
