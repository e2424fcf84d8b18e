"""The decoder of core/model.py in PyTorch: the same parts under the same names, the same numbers.

Shapes: B batch, S positions, D d_model, H heads, G heads of keys and values, K head size, V vocabulary,
L layers. It runs in the type of its weights; norms, rotations and logits are float32 whatever that is. On a
GPU norms, rotations and the loss run on the kernels of kernels_cuda once `kernels_cuda.library.load` has been
called.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.config import ModelConfig
from core.leaves import LEAVES, Leaf, get_leaf
from kernels_cuda.ops.gelu import gelu_mlp
from kernels_cuda.ops.linear_cross_entropy import LossSums, linear_cross_entropy
from kernels_cuda.ops.rms_norm import add_rms_norm, rms_norm
from kernels_cuda.ops.rotary import rotated_heads, rotated_projections
from kernels_cuda.ops.swiglu import swiglu_mlp
from kernels_cuda.registry import compute_type
from port_torch.model_folder import open_model
from port_torch.names import Place

_BY_PARAMETER = {(leaf.module.rpartition("/")[2], leaf.torch_suffix): leaf for leaf in LEAVES}


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far, for every layer; `Decoder` writes into it."""

    k: Float[Tensor, "L B S G K"]
    v: Float[Tensor, "L B S G K"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich 2019).

    Of x, or of x plus what a branch adds to it; then that sum is returned too.
    """

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "*batch D"], branch: Float[Tensor, "*batch D"] | None = None
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        if branch is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, branch, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention of several heads; rotary positions, norms of queries and keys and fewer heads of
    keys and values where the config says so."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, biased = config, config.biases or config.qkv_biases
        self.q = nn.Linear(c.d_model, c.q_width, bias=biased)
        self.k, self.v = (nn.Linear(c.d_model, c.kv_width, bias=biased) for _ in range(2))
        self.o = nn.Linear(c.q_width, c.d_model, bias=c.biases)
        self.q_norm, self.k_norm = (RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None for _ in range(2))
        self.heads = (c.n_heads, c.kv_heads, c.kv_heads)
        self.head_size = c.head_size

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        positions: Int[Tensor, "B S"] | None,
        visible: Bool[Tensor, "B 1 S S"] | None = None,
        starts: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        b, s, _ = x.shape
        q, k, v = self.projections(x, rotation, stepwise=cache is not None)
        if cache is not None:
            rows = torch.arange(b, device=x.device)[:, None]
            cache.k[rows, positions], cache.v[rows, positions] = k, v
            k, v = cache
            visible = torch.arange(k.shape[1], device=x.device) <= positions[:, None, :, None]
        if starts is not None:
            y = attend_by_lengths(*(t.flatten(0, 1) for t in (q, k, v)), starts, s)
            return self.o(y.view(b, s, -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        shared = q.shape[1] // k.shape[1]
        if visible is not None and shared > 1:
            # The attention that PyTorch has for a mask on a GPU takes as many heads of keys as of queries.
            k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=visible is None and shared > 1
        )
        return self.o(y.transpose(1, 2).reshape(b, s, -1))

    def projections(
        self, x: Float[Tensor, "B S D"], rotation: tuple[Tensor, Tensor] | None, stepwise: bool
    ) -> tuple[Float[Tensor, "B S _ K"], ...]:
        """Queries [B, S, H, K], keys and values [B, S, G, K], rotated to their positions.

        As one product; but token by token (`stepwise`) putting its weights together costs more than it saves.
        """
        parts = (self.q, self.k, self.v)
        adapted = any(type(part) is not nn.Linear for part in parts)  # LoRA adds to what the maps give
        fused = rotation is not None and self.q_norm is None
        if adapted or (stepwise and not fused):
            q, k, v = (part(x).view(*x.shape[:2], -1, self.head_size) for part in parts)
        else:
            weights, biases = tuple(part.weight for part in parts), tuple(part.bias for part in parts)
            if fused:
                return rotated_projections(x, weights, biases, *rotation, self.heads)
            bias = None if biases[0] is None else torch.cat(biases)
            packed = F.linear(x, torch.cat(weights), bias)
            q, k, v = packed.view(*x.shape[:2], -1, self.head_size).split(self.heads, dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        return (q, k, v) if rotation is None else rotated_heads(q, k, v, *rotation)


def attend_by_lengths(
    q: Float[Tensor, "T H K"],
    k: Float[Tensor, "T G K"],
    v: Float[Tensor, "T G K"],
    starts: Int[Tensor, " M"],
    longest: int,
) -> Float[Tensor, "T H K"]:
    """Causal attention within each document: of places starts[i] up to starts[i + 1]; none has more than
    `longest`.

    PyTorch's flash attention, which reads no more than a document's own keys. `varlen_attn`, its public name,
    takes other arguments in every version since 2.10; the operation below has not changed.
    """
    flash = torch.ops.aten._flash_attention_forward
    return flash(q, k, v, starts, starts, longest, longest, 0.0, True, False)[0]


def attends_by_lengths(config: ModelConfig, device: torch.device, bf16: bool) -> bool:
    """Whether `attend_by_lengths` runs for a model there."""
    if device.type != "cuda" or not bf16 or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return config.head_size <= 256 and config.head_size % 8 == 0


def relu2(x: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    """Squared ReLU (So et al. 2021, Primer)."""
    return F.relu(x).square()


ACTIVATIONS = {"swiglu": F.silu, "gelu": functools.partial(F.gelu, approximate="tanh"), "relu2": relu2}


class MLP(nn.Module):
    """down(activation(up x)); SwiGLU (Shazeer 2020) has a gate, too: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, f, bias = config.d_model, config.d_mlp, config.biases
        self.gate = nn.Linear(d, f, bias=bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(d, f, bias=bias)
        self.down = nn.Linear(f, d, bias=bias)
        self.kind, self.activation = config.mlp, ACTIVATIONS[config.mlp]

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        parts = [part for part in (self.gate, self.up, self.down) if part is not None]
        if all(type(part) is nn.Linear for part in parts):  # no LoRA
            biased = self.up.bias is not None
            if self.kind == "swiglu" and not biased:
                return swiglu_mlp(x, *(part.weight for part in parts))
            if self.kind == "gelu" and biased:
                return gelu_mlp(x, *(t for part in parts for t in (part.weight, part.bias)))
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x).

    What its last branch adds is left to the next norm, which adds it in passing.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        branch: Float[Tensor, "B S D"] | None,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        positions: Int[Tensor, "B S"] | None,
        visible: Bool[Tensor, "B 1 S S"] | None = None,
        starts: Int[Tensor, " M"] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S D"]]:
        normed, x = self.attn_norm(x, branch)
        branch = self.dropout(self.attn(normed, rotation, cache, positions, visible, starts))
        normed, x = self.mlp_norm(x, branch)
        return x, self.dropout(self.mlp(normed))


Stream = tuple[Float[Tensor, "B S D"], Float[Tensor, "B S D"] | None]
"""The residual stream, and what a branch is still to add to it."""
LayerHook = Callable[[Block, Stream, Stream, tuple[Tensor, Tensor] | None], None]
"""Takes a layer, the stream before and after it, and the angles of rotary positions."""


class Decoder(nn.Module):
    """Embedding, `n_layers` blocks, final norm; `logits` applies the head, `loss` compares with targets."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(c.context, c.d_model) if c.positions == "learned" else None
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = None if c.tied else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        # Made here, so that torch.compile does not trace how scaled positions are read and computed.
        self.register_buffer("rope_multipliers", rope_multipliers(c), persistent=False)
        self.rope_amplitude = 1.0 if c.rope is None else c.rope.amplitude

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        positions: Int[Tensor, "B S"] | None = None,
        cache: KVCache | None = None,
        documents: Int[Tensor, "B S"] | None = None,
        starts: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Hidden states after the final norm, of whole sequences or of what comes after a cache.

        With a cache the new tokens stand at the given positions, see what it holds and are written into it.
        Its entries beyond a row's position are invisible to that row, so prompts of several lengths can be
        padded on the right and decoded on from their own ends.

        With `documents`, numbers that rise along a row, each stretch of one number is a sequence of its own:
        it sees nothing of the others, and its positions begin at 0. `starts` says the same in another way,
        as `attend_by_lengths` takes it; without, every place is compared with every other.
        """
        return self.norm(*self.residual(tokens, positions, cache, documents, starts))[0]

    def residual(
        self,
        tokens: Int[Tensor, "B S"],
        positions: Int[Tensor, "B S"] | None = None,
        cache: KVCache | None = None,
        documents: Int[Tensor, "B S"] | None = None,
        starts: Int[Tensor, " M"] | None = None,
        hook: LayerHook | None = None,
    ) -> Stream:
        """What the final norm is of. hook: is shown every layer."""
        if (positions is None) != (cache is None):
            raise ValueError("positions are those of a cache's rows: give both or neither")
        x, rotation, visible = self.begin(tokens, positions, documents, starts)
        branch = None
        for number, layer in enumerate(self.layers):
            of_layer = None if cache is None else KVCache(cache.k[number], cache.v[number])
            before = x, branch
            x, branch = layer(x, branch, rotation, of_layer, positions, visible, starts)
            if hook is not None:
                hook(layer, before, (x, branch), rotation)
        return x, branch

    def begin(
        self,
        tokens: Int[Tensor, "B S"],
        positions: Int[Tensor, "B S"] | None = None,
        documents: Int[Tensor, "B S"] | None = None,
        starts: Int[Tensor, " M"] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], tuple[Tensor, Tensor] | None, Bool[Tensor, "B 1 S S"] | None]:
        """What the layers begin with: the embedded tokens, the angles of rotary positions, and which places
        see which, unless all see what is before them or `starts` says it."""
        index = torch.arange(tokens.shape[1], device=tokens.device)[None] if positions is None else positions
        visible = None
        if documents is not None:
            if starts is None:
                visible = (documents[:, None, :, None] == documents[:, None, None, :]) & (index.mT >= index)
            index = index - documents_start(documents)
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(index)
        # Rows are cast after the look-up, so that their gradients are summed in the table's type.
        x = self.dropout(x.to(compute_type(x)))
        rotation = self.rotary_angles(index) if self.config.positions == "rope" else None
        return x, rotation, visible

    def logits(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Float32 scores of every token."""
        return F.linear(hidden, self.table).float()

    def loss(
        self, hidden: Float[Tensor, "*batch D"], targets: Int[Tensor, "*batch"], z_loss: float = 0.0
    ) -> LossSums:
        """Cross-entropy summed over the targets, as core/loss.py has it; a target of -1 does not count."""
        return linear_cross_entropy(hidden, self.table, targets, z_loss)

    @property
    def table(self) -> Float[Tensor, "V D"]:
        """The head: the embedding itself where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` sequences of up to `length` tokens, of the weights' type and device."""
        c, like = self.config, self.embed.weight
        shape = (c.n_layers, batch, length, c.kv_heads, c.head_size)
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))

    def rotary_angles(self, positions: Int[Tensor, "B S"]) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, K/2] of position * theta^(-2i/K) (Su et al. 2021), scaled or not; float32."""
        half = self.config.head_size // 2
        step = torch.arange(half, dtype=torch.float32, device=positions.device) / half
        frequency = self.config.rope_theta**-step
        if self.rope_multipliers is not None:
            frequency = frequency * self.rope_multipliers.view(torch.float32)
        angle = positions.float()[..., None] * frequency
        cos, sin = angle.cos(), angle.sin()
        if self.rope_multipliers is None:
            return cos, sin
        return cos * self.rope_amplitude, sin * self.rope_amplitude


def rope_multipliers(config: ModelConfig) -> Int[Tensor, " half"] | None:
    """What scaled positions multiply the rotary frequencies by: the bits of float32 numbers, as int32.

    A module's type changes its floating-point buffers, and in bfloat16 they would be other numbers.
    """
    if config.rope is None:
        return None
    return torch.as_tensor(config.rope.multipliers(config.head_size, config.rope_theta).view(np.int32))


def documents_start(documents: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Where in its row the document of each place begins."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return torch.where(begins, index, 0).cummax(dim=1).values


def parameter_name(place: Place) -> str:
    """The parameter of `Decoder` that is a leaf of core.model: "layers.0.attn.q.weight"."""
    return get_leaf(place.path.split("/")).torch_name(place.layer)


def leaf_of(parameter: str) -> Leaf:
    """What a parameter of `Decoder` is, by its name."""
    *_, module, suffix = parameter.split(".")
    return _BY_PARAMETER[module, suffix]


class _NoInit(TorchFunctionMode):
    """Within it new modules are not initialised.

    What PyTorch does that with on the device `meta` it imports together with torch.compile: 2 s.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def without_weights(config: ModelConfig) -> Decoder:
    """A decoder on the device `meta`: its parameters have names, shapes and types, and no memory."""
    with torch.device("meta"), _NoInit():
        return Decoder(config)


def decoder_of(config: ModelConfig, weights: dict[str, Tensor]) -> Decoder:
    """A decoder whose parameters are these tensors themselves, which are on one device."""
    model = without_weights(config)
    model.load_state_dict(weights, assign=True)
    if (multipliers := rope_multipliers(config)) is not None:
        model.rope_multipliers = multipliers.to(model.embed.weight.device)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """The model of an exported folder, or of any Llama's that fits, ready to run.

    Raises:
        UserError: the folder is damaged, or of a model that this decoder is not (see `open_model`).
    """
    opened = open_model(folder)
    weights = {
        parameter_name(leaf): opened.folder.read(name).to(device, dtype)
        for name, leaf in opened.leaves.items()
    }
    return decoder_of(opened.config, weights).eval()
