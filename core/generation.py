"""Text from a trained model, token by token.

A prompt is read in large pieces that fill the cache of keys and values; then one compiled step makes a
token for every row of the batch. How to sample is an input of that step, so that nothing is compiled
twice, and each row draws from keys of its own: its text does not depend on what else is in the batch.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from core.batch_file import generation_settings, write_texts
from core.chat import Template, open_template
from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import load_manifest, recorded_hash
from core.checkpoint.steps import find_step, tokenizer_carriers
from core.compilation_cache import keep_compiled
from core.config import ModelConfig, compute_dtype
from core.conversation import Answers, Session, answer_file, converse
from core.data.conversations import Turn
from core.gpu_memory import require_free_memory
from core.keys import Purpose, make_key
from core.model import Compute, KVCache, Params, abstract_params, empty_cache, forward_cached, logits
from core.sampling import Sampling, pieces, require_room, show, until_ended
from core.tokenizer import load_tokenizer_of

if TYPE_CHECKING:
    from core.generate import GenerateConfig

MIN_PREFILL = 16  # prompts are padded to a power of two from here on, so that few shapes are compiled
PREFILL = 2048
"""Positions of a prompt that are read at once: scores are of all of them by the whole context, so a prompt of
32,768 tokens in one piece would have 48 GiB of them in a layer of 12 heads."""


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
    first_row: Int[Array, ""] = np.int32(0)
    """The number of the batch's first row, which its keys are made of."""


def sample(scores: Float[Array, "B V"], position: Int[Array, " B"], knobs: Knobs) -> Int[Array, " B"]:
    """Draws one token per row from softmax(scores / temperature), cut to the top k and the top p.

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

    rows = knobs.first_row + jnp.arange(scores.shape[0])
    drawn = jax.vmap(draw)(rows, position, kept)
    return jnp.where(knobs.temperature > 0, drawn, greedy).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Generator:
    """Compiled generation for one model; what is compiled is kept from call to call."""

    config: ModelConfig
    compute: Compute

    @functools.partial(jax.jit, static_argnums=0)
    def _prefill(self, params, tokens, lengths, knobs) -> tuple[Rows, KVCache]:
        batch, width = tokens.shape
        size = min(width, PREFILL)
        tokens = jnp.pad(tokens, ((0, 0), (0, -width % size)))  # what is written beyond the cache is dropped
        starts = jnp.arange(0, tokens.shape[1], size)

        def read(cache: KVCache, start: Int[Array, ""]) -> tuple[KVCache, Float[Array, "B S D"]]:
            positions = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
            part = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
            hidden, cache = forward_cached(self.config, params, part, positions, cache, self.compute)
            return cache, hidden

        cache = empty_cache(self.config, batch, self.config.context, self.compute.dtype)
        cache, hidden = jax.lax.scan(read, cache, starts)  # hidden: [pieces, B, S, D]
        piece, place = (lengths - 1) // size, (lengths - 1) % size
        last = hidden[piece, jnp.arange(batch), place]
        token = sample(logits(self.config, params, last), lengths, knobs)
        return Rows(token, lengths), cache

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _decode(self, params, cache, rows, knobs) -> tuple[Rows, KVCache]:
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
        eos: int | Sequence[int] | None = None,
        first_row: int = 0,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of every prompt, step by step; None for a row that has ended.

        A row ends after `eos` (which it does not yield), `max_new_tokens` or at the model's context. Row i
        draws from keys of (seed, first_row + i): its text does not depend on what else is in the batch.

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
            np.float32(sampling.top_p), np.uint32(sampling.seed), np.int32(first_row),
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


class Writer:
    """A checkpoint's model with its tokenizer, to write as the command was told to."""

    def __init__(self, config: "GenerateConfig", n_lines: int) -> None:
        """Opens all but the parameters, for a file of so many lines.

        Raises:
            UserError: the checkpoint or its tokenizer is not what it should be.
        """
        require_free_memory()
        keep_compiled()
        self.config, self.step_dir = config, find_step(config.run)
        manifest = load_manifest(self.step_dir)
        self.model = ModelConfig(**manifest.config["model"])
        carriers = tokenizer_carriers(self.step_dir)
        self.tokenizer = load_tokenizer_of(manifest.tokenizer, carriers, str(self.step_dir), config.tokenizer)
        self.dtype = compute_dtype(config.dtype, jax.default_backend())
        self.batch = min(config.files.batch, n_lines)
        """Prompts to a batch: fewer are filled up, so that nothing is compiled again."""

    def load(self) -> None:
        """Reads the parameters."""
        self.params = restore_params(self.step_dir, abstract_params(self.model))
        self.generator = Generator(self.model, Compute(dtype=self.dtype))

    def stream(
        self, prompts: list[list[int]], first_row: int, ends: int | Sequence[int]
    ) -> Iterator[list[int | None]]:
        """`Generator.stream` of this model; ends: the ids that end a row."""
        filled = prompts + prompts[-1:] * (self.batch - len(prompts))
        steps = self.generator.stream(
            self.params, filled, self.config.sampling, self.config.max_new_tokens, ends, first_row
        )
        return (step[: len(prompts)] for step in steps)

    def added(self, prompts: list[list[int]], first_row: int = 0) -> Iterator[list[str]]:
        """What is added to each prompt, step by step, in whole characters."""
        return pieces(self.tokenizer, prompts, self.stream(prompts, first_row, self.tokenizer.eos))

    def settings(self) -> dict[str, Any]:
        """What texts depend on besides their prompts."""
        return generation_settings(
            self.config.sampling, self.config.max_new_tokens, self.tokenizer, recorded_hash(self.step_dir),
            dtype=self.dtype, device=jax.default_backend(),
        )  # fmt: skip


def generate(config: "GenerateConfig", lines: list[dict[str, Any]], texts: list[str]) -> int:
    """Continues `texts`: one streams, several are printed one after the other when all are done; `lines` of a
    batch file are written as they are done. Returns the exit code of `python -m core.generate`."""
    writer = Writer(config, len(lines))
    prompts = [writer.tokenizer.begin(text) for text in texts]
    require_room(prompts, writer.model.context)
    writer.load()
    if lines:
        files = config.files
        return write_texts(files.out, lines, prompts, files.batch, writer.settings(), writer.added)
    show(texts, writer.added(prompts))
    return 0


def chat(
    config: "GenerateConfig",
    lines: list[dict[str, Any]],
    questions: list[tuple[Turn, ...]],
    template: Template,
) -> int:
    """Converses, or answers the questions in the `lines` of a batch file. Returns the exit code of
    `python -m core.generate --chat`."""
    writer = Writer(config, len(lines))
    form = open_template(writer.tokenizer, template)
    answers = Answers(form, writer.model.context, config.max_new_tokens, writer.stream)
    session = Session(answers, config.conversation.system)
    writer.load()
    if lines:
        return answer_file(session, config.files, lines, questions, writer.settings())
    about = f"{config.run}: {writer.model.n_params:,} parameters, decoded by JAX in {writer.dtype}"
    return converse(session, f"{about} on {jax.default_backend()}")
