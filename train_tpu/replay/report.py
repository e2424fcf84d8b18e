"""What a replay prints."""

import math
from collections.abc import Iterator

import numpy as np

from core.console import make_console
from core.data.batches import Data
from core.run.watching import Sizes, growth
from core.tokenizer import Tokenizer
from train_tpu.replay.compiled import Replayed, compare, make_again, open_setup
from train_tpu.replay.layers import Layer, Passage, go_through
from train_tpu.replay.recorded import Recorded

WORST = 3  # records whose text is shown
SHOWN = 200  # characters of it


def replay(recorded: Recorded, dataset: Data, tokenizer: Tokenizer) -> int:
    """Makes the update again and says what is found; the exit code."""
    console = make_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    setup = open_setup(recorded, dataset, tokenizer, console)
    replayed = make_again(recorded, setup)
    for line in compare(recorded, setup, replayed):
        say(line)
    passage = go_through(setup, replayed)
    for line in (*layer_table(passage), "", *verdict(passage), "", *record_losses(replayed, passage), ""):
        say(line)
    for line in worst_texts(replayed, passage, tokenizer):
        say(line)
    return 0


def layer_table(passage: Passage) -> Iterator[str]:
    """What went through every layer, a line each."""
    yield ""
    yield (
        f"layer by layer (loss {passage.loss:.7g}, gradient norm {passage.grad_norm:.7g}): the residual "
        "stream after each layer, and the gradient with respect to it; growth is that of the rms, over the "
        "layer before; of gradients, over the layer above"
    )
    column = f"{'rms':>9} {'largest':>9} {'not finite':>10} {'growth':>7}"
    yield f"{'':<10} | {'activation':^38} | {'gradient':^38} | of weights"
    yield f"{'':<10} | {column} | {column} | {'norm':>10}"
    layers = passage.layers
    for i, layer in enumerate(layers):
        below = layers[i - 1].activation if i else None
        above = layers[i + 1].gradient if i + 1 < len(layers) else None
        sizes = f"{_sizes(layer.activation, below)} | {_sizes(layer.gradient, above)}"
        yield f"{layer.name:<10} | {sizes} | {layer.weights:>10.3g}"


def _sizes(sizes: Sizes, before: Sizes | None) -> str:
    grown = "" if before is None or math.isnan(ratio(sizes, before)) else f"{ratio(sizes, before):.2f}x"
    rms, largest = (f"{x:.3g}" if sizes.bad < sizes.n else "" for x in (sizes.rms, sizes.largest))
    return f"{rms:>9} {largest:>9} {sizes.bad / sizes.n:>10.2%} {grown:>7}"


def ratio(sizes: Sizes, before: Sizes) -> float:
    """How much larger the rms has become; NaN where one of them is that of no value."""
    return growth(sizes.rms, before.rms) if sizes.bad < sizes.n else math.nan


def verdict(passage: Passage) -> Iterator[str]:
    """What went wrong first, by name; or where values grow the most."""
    for name, bad, n in passage.bad_parameters:
        yield f"not finite before the update already: {bad:,} of {n:,} values of {name}"
    if wrong := passage.wrong:
        way = "the gradient of " if wrong.backward else ""
        how = "made of finite values" if wrong.made else "made of values that were not finite"
        yield f"went wrong first: {way}{wrong.where}, in {wrong.operation}, {how}"
        return
    layers = passage.layers
    up, down = layers[1:], layers[:-1]
    grown = max(zip(up, down, strict=True), key=lambda pair: ratio(pair[0].activation, pair[1].activation))
    back = max(zip(down, up, strict=True), key=lambda pair: ratio(pair[0].gradient, pair[1].gradient))
    heaviest: Layer = max(layers, key=lambda layer: layer.weights)
    yield (
        f"every value is finite; activations grow the most in {grown[0].name} "
        f"({ratio(grown[0].activation, grown[1].activation):.2f}x), gradients on the way back to "
        f"{back[0].name} ({ratio(back[0].gradient, back[1].gradient):.2f}x); the largest gradient of weights "
        f"is that of {heaviest.name} ({heaviest.weights:.3g})"
    )


def by_loss(replayed: Replayed, passage: Passage) -> list[int]:
    """Rows from the largest loss down, those that are not finite first; a left-out row is none of them."""
    order = np.argsort(-np.nan_to_num(passage.losses, nan=np.inf), kind="stable")
    return [int(row) for row in order if not replayed.batch.bad[row]]


def record_losses(replayed: Replayed, passage: Passage) -> Iterator[str]:
    """The loss of every record of the batch, largest first."""
    batch, rows = replayed.batch, by_loss(replayed, passage)
    left_out = batch.records[batch.bad].tolist()
    median = np.median(passage.losses[rows]) if rows else math.nan
    yield f"losses of the records, nats per token (median {median:.4g}):"
    texts = [f"{batch.records[row]}: {passage.losses[row]:.4g}" for row in rows]
    width = max(map(len, texts), default=0) + 2
    for start in range(0, len(texts), 6):
        yield "  " + "".join(text.ljust(width) for text in texts[start : start + 6]).rstrip()
    if left_out:
        yield f"  left out: {', '.join(map(str, left_out))}"


def worst_texts(replayed: Replayed, passage: Passage, tokenizer: Tokenizer) -> Iterator[str]:
    """The beginnings of the records with the largest losses."""
    for row in by_loss(replayed, passage)[:WORST]:
        text = tokenizer.decode(replayed.batch.tokens[row].tolist())
        shown = text[:SHOWN] + ("..." if len(text) > SHOWN else "")
        yield f"record {replayed.batch.records[row]} ({passage.losses[row]:.4g}): {shown!r}"
