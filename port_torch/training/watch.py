"""What is seen of every layer at a watched update (core/run/watching.py says what that is).

The forward pass runs next to the update, not in it: eagerly, without dropout or gradients, outside of the
CUDA graph. It draws no random numbers, and the update is the same to the bit.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.run.watching import Sizes, make_record, query_positions
from port_torch.model import Block, Decoder, Stream, leaf_of


class Watch:
    """Looks at every `every`-th update: `before` it, and `after` it."""

    def __init__(self, decoder: Decoder, parameters: Mapping[str, Tensor], every: int):
        """parameters: those that are trained. They are held twice from now on, so that memory for it is left
        when an update is tried out."""
        self.every, self._decoder, self._parameters = every, decoder, parameters
        self._held = [torch.empty_like(p) for p in parameters.values()]

    @torch.no_grad()
    def before(self, tokens: Tensor, documents: Tensor | None = None, starts: Tensor | None = None) -> None:
        """Looks at the parameters, and at a forward pass with them, given what `Decoder.forward` is."""
        torch._foreach_copy_(self._held, list(self._parameters.values()))
        self._weights = torch.stack(torch._foreach_norm(self._held))
        self._length, self._n = tokens.shape[1], tokens.numel() * self._decoder.config.d_model
        self._queries = torch.as_tensor(query_positions(self._length), device=tokens.device)
        self._visible = torch.arange(self._length, device=tokens.device) <= self._queries[None, :, None]
        if documents is not None:
            self._visible = self._visible & (documents[:, self._queries, None] == documents[:, None])
        self._uniform = self._visible.sum(-1).float().log().mean()[None]
        self._sizes: list[Tensor] = []
        self._added: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._decoder.eval()
        hidden = self._decoder.norm(
            *self._decoder.residual(tokens, documents=documents, starts=starts, hook=self._look)
        )[0]
        self._sizes.append(measure(hidden))

    def _look(
        self, layer: Block, before: Stream, after: Stream, rotation: tuple[Tensor, Tensor] | None
    ) -> None:
        start, end = total(before), total(after)
        if not self._sizes:
            self._sizes.append(measure(start))
        self._sizes.append(measure(end))
        self._added.append(measure(end - start))
        q, k, _ = layer.attn.projections(layer.attn_norm(start)[0], rotation, stepwise=False)
        self._entropies.append(entropies(q[:, self._queries], k, self._visible))

    @torch.no_grad()
    def after(self, reported: Tensor) -> Tensor:
        """What an update `reported`, with all that was seen of it behind: for `record`."""
        updates = torch._foreach_sub(list(self._parameters.values()), self._held)
        norms = torch.stack(torch._foreach_norm(updates))
        seen = [*self._sizes, *self._added, *self._entropies, self._uniform]
        return torch.cat([reported, self._weights, norms, *seen])

    def record(self, values: list[float], gradients: Iterable[float]) -> dict[str, Any]:
        """A line of watch.jsonl from what `after` put behind the report, on the host.

        gradients: norms, in the order of the parameters.
        """
        names = [leaf_path(name) for name in self._parameters]
        n_layers, rest = self._decoder.config.n_layers, iter(values)

        def of_leaves(norms: Iterable[float]) -> dict[str, float]:
            return dict(zip(names, norms, strict=True))

        def sizes(n: int) -> list[Sizes]:
            return [Sizes.of([next(rest) for _ in range(3)], self._n) for _ in range(n)]

        weights, updates = ([next(rest) for _ in names] for _ in range(2))
        return make_record(
            n_layers, weights=of_leaves(weights), gradients=of_leaves(gradients), updates=of_leaves(updates),
            stream=sizes(n_layers + 2), added=sizes(n_layers),
            entropies=[[next(rest), next(rest)] for _ in range(n_layers)], uniform=next(rest),
        )  # fmt: skip


def leaf_path(parameter: str) -> str:
    """The leaf that a parameter of `Decoder` is, with the number of its layer: "layers/3/attn/q/kernel"."""
    *modules, _ = parameter.split(".")
    return "/".join([*modules, leaf_of(parameter).kind])


def total(stream: Stream) -> Tensor:
    """The residual stream with what is to be added to it."""
    x, branch = stream
    return x if branch is None else x + branch


def measure(x: Tensor) -> Tensor:
    """[3]: largest value, mean of the squares relative to it, how many are not finite: for `Sizes.add`."""
    finite = torch.isfinite(x)
    size = torch.where(finite, x, 0).float().abs()
    largest = size.max()
    relative = size / torch.where(largest > 0, largest, 1)
    mean = relative.square().sum() / finite.sum().clamp(min=1)
    return torch.stack([largest, mean, (~finite).sum().float()])


def entropies(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """[2]: of the attention of some queries, in nats: the mean over the heads, and the lowest head's.

    q: [B, T, H, K]; k: [B, S, G, K]; visible: [B or 1, T, S], which keys each sees.
    """
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    with torch.autocast(q.device.type, enabled=False):  # sums in float32, as JAX makes them
        scores = torch.einsum("bthk,bshk->bhts", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = F.softmax(scores.masked_fill(~visible[:, None], -torch.inf), dim=-1)
    of_heads = torch.special.entr(weights).sum(-1).mean((0, 2))
    return torch.stack([of_heads.mean(), of_heads.min()])
