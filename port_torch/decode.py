"""Generation on the decode kernels: the mirror reads the prompts, one captured CUDA graph makes every token.

The mirror's launches take the host several times as long as the GPU needs for them, so its pass is a graph
too, one for each width that prompts are padded to.

A step's inputs (tokens, positions, cache, how to sample) stay on the GPU, so the graph is captured once for a
batch and launched again and again; the host reads a step's tokens while the next one runs. No sum's order
depends on the batch: a row's text is the same whatever else is in it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.config import ModelConfig
from core.sampling import Sampling, require_room, until_ended
from port_torch.model import Decoder, KVCache, RMSNorm

MOST_ROWS = 64  # of a step, see kernels_cuda/csrc/decode_project.cu; more prompts are several steps
CACHE_UNIT = 128  # a cache's length is a multiple of it, so that a graph serves requests of like lengths
# Tokens of a pass of the mirror, and the least that a prompt is padded to. A product's shape decides how a
# library adds up; here it is one of the prompt's own length alone. As few as keep the GPU at work: a single
# prompt takes the same time as a full pass.
PREFILL_TOKENS, MIN_PREFILL = 1024, 16


class Layer(NamedTuple):
    """A block's weights as the kernels read them."""

    attn_norm: Float[Tensor, " D"]
    qkv: Float[Tensor, "H*K+2*G*K D"]
    qkv_bias: Float[Tensor, " H*K+2*G*K"] | None
    q_norm: Float[Tensor, " K"] | None
    k_norm: Float[Tensor, " K"] | None
    o: Float[Tensor, "D H*K"]
    o_bias: Float[Tensor, " D"] | None
    mlp_norm: Float[Tensor, " D"]
    up: Float[Tensor, "F_or_2*F D"]
    up_bias: Float[Tensor, " F"] | None
    down: Float[Tensor, "D F"]
    down_bias: Float[Tensor, " D"] | None


def packed(parts: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of linear layers one after the other; the layers' own become views of them."""

    def together(own: list[nn.Parameter]) -> Tensor:
        whole = torch.cat([p.detach() for p in own])
        for p, view in zip(own, whole.split([len(p) for p in own]), strict=True):
            p.data = view
        return whole

    weight = together([part.weight for part in parts])
    return weight, None if parts[0].bias is None else together([part.bias for part in parts])


def layers_of(model: Decoder) -> list[Layer]:
    """Every block's weights, packed."""

    def weight(norm: RMSNorm | None) -> Tensor | None:
        return None if norm is None else norm.weight.detach()

    layers = []
    for block in model.layers:
        attn, mlp = block.attn, block.mlp
        up = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
        layers.append(
            Layer(
                weight(block.attn_norm),
                *packed([attn.q, attn.k, attn.v]),
                weight(attn.q_norm),
                weight(attn.k_norm),
                *packed([attn.o]),
                weight(block.mlp_norm),
                *packed(up),
                *packed([mlp.down]),
            )
        )
    return layers


def captured(
    launch: Callable[[], None], device: torch.device, pool: tuple[int, int] | None = None
) -> torch.cuda.CUDAGraph | None:
    """What `launch` launches as a graph, its memory from `pool`; None where there is no GPU.

    On the device it is given, whichever is the current one.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        launch()  # loads kernels and libraries, which a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls can spoil it: in training others prepare batches or watch the ranks.
        with torch.cuda.graph(
            graph, pool=pool, stream=capture_stream(device), capture_error_mode="thread_local"
        ):
            launch()
    return graph


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: a pool's memory serves the next graph on the same one alone."""
    return torch.cuda.Stream(device)


class Step:
    """One decoding step for a batch: what it reads and writes, and on a GPU its graph."""

    def __init__(self, model: Decoder, layers: list[Layer], batch: int, length: int):
        """
        Args:
            length: positions of the cache.
        """
        config, like = model.config, model.embed.weight
        self.model, self.layers, self.length = model, layers, length
        self.cache: KVCache = model.empty_cache(batch, length)
        self.angles = (None, None)
        if config.positions == "rope":
            positions = torch.arange(length, device=like.device)[None]
            self.angles = tuple(t[0].contiguous() for t in model.rotary_angles(positions))
        hidden = (config.d_model, config.q_width, config.q_width, config.d_mlp)
        self.x, self.q, self.y, self.h = (like.new_zeros(batch, width) for width in hidden)
        self.scores = like.new_zeros(batch, config.vocab_size, dtype=torch.float32)
        self.token, self.position = like.new_zeros(2, batch, dtype=torch.int64).unbind()
        self.real = self.scores.new_tensor([0.0, 1.0])
        self.whole = self.token.new_zeros(3)
        self.graph = captured(self.launch, like.device)
        if self.graph is not None:
            self.read = [torch.empty(batch, dtype=torch.int64, pin_memory=True) for _ in range(2)]
            self.is_read = [torch.cuda.Event() for _ in range(2)]

    @torch.no_grad()
    def launch(self) -> None:
        """The step's ops: five kernels per layer, six where queries and keys are normed, and three more."""
        ops, config = torch.ops.mtlm, self.model.config
        eps, gated = config.norm_eps, config.mlp == "swiglu"
        learned = None if self.model.positions is None else self.model.positions.weight
        ops.decode_embed_(self.token, self.position, self.model.embed.weight, learned, self.x)
        for w, k, v in zip(self.layers, *self.cache, strict=True):
            angles = self.angles if w.q_norm is None else (None, None)  # they are rotated once normed
            ops.decode_qkv_(self.x, w.attn_norm, eps, w.qkv, w.qkv_bias, *angles, self.position, self.q, k, v)
            if w.q_norm is not None:
                ops.decode_qk_norm_(w.q_norm, w.k_norm, eps, *self.angles, self.position, self.q, k)
            ops.decode_attention_(self.q, k, v, self.position, self.y)
            ops.decode_add_projection_(self.y, w.o, w.o_bias, self.x)
            ops.decode_mlp_(self.x, w.mlp_norm, eps, w.up, w.up_bias, gated, self.h)
            ops.decode_add_projection_(self.h, w.down, w.down_bias, self.x)
        ops.decode_logits_(self.x, self.model.norm.weight, eps, self.model.table, self.scores)
        self.sample()

    def sample(self) -> None:
        """Chooses the next tokens from the scores, and moves the positions to them."""
        torch.ops.mtlm.decode_sample_(
            self.scores, self.real, self.whole, self.length - 1, self.position, self.token
        )

    def run(self) -> None:
        """One step."""
        if self.graph is None:
            self.launch()
        else:
            self.graph.replay()

    def set_sampling(self, sampling: Sampling, first_row: int) -> None:
        """How the next tokens are drawn; row i draws from numbers of (seed, first_row + i)."""
        self.real.copy_(torch.tensor([sampling.temperature, sampling.top_p]))
        self.whole.copy_(torch.tensor([sampling.top_k, sampling.seed, first_row]))

    def tokens(self) -> Iterator[list[int]]:
        """The tokens there are, then those of one step after the other."""
        if self.graph is None:
            while True:
                yield self.token.tolist()
                self.run()
        self._read(0)
        for number in count():
            self.run()  # while the host looks at the last one's tokens
            self._read((number + 1) % 2)
            self.is_read[number % 2].synchronize()
            yield self.read[number % 2].tolist()

    def _read(self, slot: int) -> None:
        self.read[slot].copy_(self.token, non_blocking=True)
        self.is_read[slot].record(torch.cuda.current_stream(self.token.device))


class PromptPass:
    """The mirror's pass over prompts padded to one width, always of the same shape; on a GPU its graph.

    What a graph reads and writes is kept here; what it needs in between is memory that all passes share,
    since one runs at a time.
    """

    def __init__(self, model: Decoder, width: int, cache: KVCache, pool: tuple[int, int] | None):
        """
        Args:
            cache: what the pass fills, [L, rows, width, G, K].
            pool: of the graphs' memory; None where there are none.
        """
        self.model, self.width, self.cache = model, width, cache
        rows, device = cache.k.shape[1], cache.k.device
        self.ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.ends = torch.zeros(rows, dtype=torch.int64, device=device)
        self.every = torch.arange(rows, device=device)
        self.positions = torch.arange(width, device=device).expand(rows, -1)
        self.x = cache.k.new_zeros(rows, model.config.d_model)
        self.scores = self.x.new_zeros(rows, model.config.vocab_size, dtype=torch.float32)
        self.graph = captured(self.launch, device, pool)

    @torch.no_grad()
    def launch(self) -> None:
        """The pass, in PyTorch's own launches: fills the cache, and the scores behind each row's end.

        The scores are made as a step's are, so that the first new token is drawn from what later ones are.
        """
        x, branch = self.model.residual(self.ids, self.positions, self.cache)
        self.x.copy_(x[self.every, self.ends] + branch[self.every, self.ends])
        norm, eps = self.model.norm.weight, self.model.config.norm_eps
        torch.ops.mtlm.decode_logits_(self.x, norm, eps, self.model.table, self.scores)

    def run(self, prompts: list[list[int]]) -> None:
        """One pass over at most as many prompts as it has rows; the rows behind them read zeros."""
        ids = torch.zeros(self.ids.shape, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ends = [len(prompt) - 1 for prompt in prompts]
        self.ids.copy_(ids)
        self.ends.copy_(torch.tensor(ends + [0] * (len(ids) - len(ends))))
        if self.graph is None:
            self.launch()
        else:
            self.graph.replay()


class Generator:
    """Generation with one model, whose weights it packs; keeps a stream's steps for the next.

    One stream at a time.
    """

    def __init__(self, model: Decoder):
        self.model = model
        with torch.no_grad():
            self.layers = layers_of(model)
        self.steps: dict[tuple[int, int], Step] = {}  # of the first row's number and how many there are
        self.passes: dict[int, PromptPass] = {}  # of the width
        self.pool: tuple[int, int] | None = None  # of the passes' graphs
        self.room: KVCache | None = None  # the cache of every pass

    @torch.inference_mode()
    def stream(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        first_row: int = 0,
    ) -> Iterator[list[int | None]]:
        """What `port_torch.sampling.stream` yields, of other random numbers.

        Raises:
            UserError: a prompt is empty or leaves no room in the context.
        """
        context = self.model.config.context
        require_room(prompts, context)
        needed = max(map(len, prompts)) + max_new_tokens
        length = min(context, -(-needed // CACHE_UNIT) * CACHE_UNIT)
        sizes = {
            first: len(prompts[first : first + MOST_ROWS]) for first in range(0, len(prompts), MOST_ROWS)
        }
        # The memory of steps of other sizes, before that of new ones.
        self.steps = {key: step for key, step in self.steps.items() if key in sizes.items()}
        parts = []
        for first in sizes:
            part = prompts[first : first + MOST_ROWS]
            step = self._step(first, len(part), length)
            step.set_sampling(sampling, first_row + first)
            self.read_prompts(part, step)
            step.sample()
            parts.append(step.tokens())
        steps = ([token for new in of_parts for token in new] for of_parts in zip(*parts, strict=True))
        yield from until_ended(steps, prompts, context, max_new_tokens, eos)

    def _step(self, first: int, batch: int, length: int) -> Step:
        """The step of these rows, with a cache of at least this length."""
        step = self.steps.get((first, batch))
        if step is None or step.length < length:
            self.steps.pop((first, batch), None)  # its memory, before the new one's
            step = self.steps[first, batch] = Step(self.model, self.layers, batch, length)
        return step

    def read_prompts(self, prompts: list[list[int]], step: Step) -> None:
        """Fills the cache and the scores, and puts the positions to the prompts' ends.

        What a row's padding leaves in the cache is overwritten before it is seen.
        """
        step.position.copy_(torch.tensor([len(prompt) - 1 for prompt in prompts]))
        by_width: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_width.setdefault(prefill_width(len(prompt), self.model.config), []).append(row)
        for width, of_width in by_width.items():
            one = self._pass(width)
            kept = min(width, step.length)
            for first in range(0, len(of_width), len(one.ids)):
                rows = of_width[first : first + len(one.ids)]
                one.run([prompts[row] for row in rows])
                index = torch.tensor(rows, device=step.token.device)
                step.scores[index] = one.scores[: len(rows)]
                for whole, part in zip(step.cache, one.cache, strict=True):
                    whole[:, index, :kept] = part[:, : len(rows), :kept]

    def _pass(self, width: int) -> PromptPass:
        """The pass of this width, captured where it is new."""
        rows = min(MOST_ROWS, max(1, PREFILL_TOKENS // width))
        if self.room is None or self.room.k.shape[2] < rows * width:
            # For the longest prompt so far: a whole context may be gigabytes. Graphs write into the old room.
            self.passes.clear()
            self.room = None  # its memory, before the new one's
            self.room = self.model.empty_cache(1, max(PREFILL_TOKENS, width))
            self.pool = torch.cuda.graph_pool_handle() if self.room.k.is_cuda else None
        if width not in self.passes:
            layers, _, _, *heads = self.room.k.shape
            shape = (layers, rows, width, *heads)
            cache = KVCache(*(t.view(-1)[: math.prod(shape)].view(shape) for t in self.room))
            self.passes[width] = PromptPass(self.model, width, cache, self.pool)
        return self.passes[width]


def prefill_width(n_tokens: int, config: ModelConfig) -> int:
    """What a prompt is padded to: a power of two, or the context."""
    return min(config.context, max(MIN_PREFILL, 1 << (n_tokens - 1).bit_length()))
