"""One update: the loss of every micro-batch, gradients, clipping, optimizer. Nothing waits for the device.

On a GPU it is recorded as a CUDA graph, compiled or not: launching its thousand kernels one by one takes the
host longer than the GPU needs to run them (docs/LOG.md).

Every micro-batch's loss is divided by the targets of the whole global batch, so that micro-batches and ranks
sum up to the mean of that batch. The ranks' gradients are added once, in float32, as one array. An update
that the guard refuses changes nothing; that is decided on the device. Parameters and gradients are float32;
products run in bfloat16 under autocast.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from core.data.examples import IGNORE
from core.data.sequences import Rows
from core.errors import UserError
from core.run.cadence import NO_FLAGS, Flags
from core.run.guard import GuardConfig, can_judge, norm_sigma, spike_limit
from kernels_cuda.ops.adamw import AdamW, clip_scale
from port_torch.model import Block, Decoder, attends_by_lengths, leaf_of
from port_torch.training.batches import Inputs, place
from port_torch.training.distributed import Distributed
from port_torch.training.lora import LORA
from port_torch.training.muon import Muon
from port_torch.training.recorded import Recorded
from port_torch.training.settings import MirrorOptimizerConfig

METRICS = ("loss", "nll", "grad_norm", "applied", "streak", "skipped", *Flags._fields)
"""What an update reports first, in this order: those of `core.run.engine.Metrics`, and in how many ranks the
flags are set. The norms of the gradients of all parameters follow."""


class Losses(nn.Module):
    """Tokens and targets to the two sums of the loss."""

    def __init__(self, decoder: Decoder, z_loss: float, compiled: bool = False):
        """compiled: by torch.compile, in three parts. All layers are the same code, so that one compilation
        serves them all; that of the whole model takes up to three times as long (docs/LOG.md)."""
        super().__init__()
        self.decoder, self.z_loss, self.compiled = decoder, z_loss, compiled
        self._begin, self._layer, self._loss = Decoder.begin, Block.forward, Decoder.loss
        if compiled:
            self._begin, self._layer, self._loss = (
                torch.compile(part, dynamic=False) for part in (self._begin, self._layer, self._loss)
            )

    def forward(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.compiled and starts is not None:
            torch._dynamo.maybe_mark_dynamic(starts, 0)  # compiled once for all numbers of documents
        decoder, branch = self.decoder, None
        x, rotation, visible = self._begin(decoder, tokens, None, documents, starts)
        for layer in decoder.layers:
            x, branch = self._layer(layer, x, branch, rotation, None, None, visible, starts)
        return self._loss(decoder, decoder.norm(x, branch)[0], targets, self.z_loss)


class Guard:
    """The rule of core/run/guard.py on the device: nothing waits for what it decides."""

    def __init__(self, config: GuardConfig, device: torch.device):
        self._limits = config
        self._sigma = torch.tensor(config.sigma, dtype=torch.float32, device=device)
        self._halt_after = torch.tensor(config.halt_after, device=device)
        self._places = torch.arange(config.window, device=device)
        self.losses, self.norms = (torch.zeros(config.window, device=device) for _ in range(2))
        self.accepted, self.streak, self.skipped = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(3)
        )
        """Updates applied so far (the next goes to this place modulo the window), skipped since the last
        applied one, and skipped in all."""

    def tensors(self) -> dict[str, Tensor]:
        """What is saved with a run."""
        names = ("losses", "norms", "accepted", "streak", "skipped")
        return {name: getattr(self, name) for name in names}

    def set_limits(self, config: GuardConfig) -> None:
        """Other limits from the next update on, where a recorded one finds them, too."""
        if config != self._limits:
            self._limits = config
            self._sigma.fill_(config.sigma)
            self._halt_after.fill_(config.halt_after)

    def empty(self) -> None:
        """Forgets what it has seen, for a run whose losses will have another level or noise."""
        for tensor in (self.losses, self.norms, self.accepted):
            tensor.zero_()

    def refuses(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether an update is not applied; an applied one is remembered."""
        size = len(self._places)
        held = (self._places < self.accepted).float()
        skip = ~(torch.isfinite(norm) & torch.isfinite(loss))
        spike = loss > spike_limit(self.losses, held, self._sigma)
        spike |= norm > spike_limit(self.norms, held, norm_sigma(self._sigma, self.streak))
        skip |= can_judge(self.accepted, size, self.streak) & (self._sigma > 0) & spike
        skip |= self.streak >= self._halt_after
        here = (self._places == self.accepted % size) & ~skip
        self.losses.copy_(torch.where(here, loss, self.losses))
        self.norms.copy_(torch.where(here, norm, self.norms))
        self.accepted += ~skip
        self.skipped += skip
        self.streak.add_(1).mul_(skip)
        return skip


class TrainStep:
    """The model with its optimizer, on one device of one or several ranks."""

    def __init__(
        self,
        decoder: Decoder,
        optim: MirrorOptimizerConfig,
        ranks: Distributed,
        *,
        seed: int,
        z_loss: float = 0.0,
        bf16: bool = False,
        compiled: bool = False,
        guard: GuardConfig | None = None,
    ):
        """decoder: on the device; what of it needs no gradient stays as it is. compiled: by torch.compile.
        guard: default limits."""
        self.decoder, self.ranks, self._clip, self.bf16, self._seed = decoder, ranks, optim.clip, bf16, seed
        self.parameters = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.optimizer = make_optimizer(self.parameters, optim, ranks, dtype, compiled)
        self.guard = Guard(guard or GuardConfig(), ranks.device)
        self.losses = Losses(decoder, z_loss, compiled)
        ranks.copy_from_first(list(self.parameters.values()))
        self._flags = torch.zeros(len(Flags._fields), device=ranks.device)
        self.recorded = ranks.device.type == "cuda"
        """Whether updates run as one CUDA graph; `fit` may find no memory for it."""
        self._recording = Recorded(self._update)
        ranks.before_end.append(self._recording.forget)
        self._by_lengths = attends_by_lengths(decoder.config, ranks.device, bf16)

    def autocast(self) -> torch.autocast:
        """bfloat16 products, where that is the type of activations."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16)

    def update(
        self, rows: Rows, grad_accum_steps: int, step: int, lr: float, flags: Flags = NO_FLAGS
    ) -> Tensor:
        """Makes update `step` (0-based) on this rank's rows, in so many micro-batches; gives `METRICS` and
        the norms of the gradients, in the order of `parameters`, on the device.

        flags: from the sums every rank learns of them at the same step.
        """
        self.decoder.train()
        seed_dropout(self._seed, step, self.ranks.rank)
        for kept, flag in zip(self._flags, flags, strict=True):
            kept.fill_(float(flag))  # a kernel's argument; a copy could wait
        self.optimizer.set_lr(lr)
        inputs = self.place(rows, grad_accum_steps)
        return self._recording(*inputs) if self.recorded else self._update(*inputs)

    def place(self, rows: Rows, parts: int = 1) -> Inputs:
        """Rows on the device, in so many micro-batches."""
        return place(rows, self.ranks.device, parts, self._by_lengths)

    def _update(self, *tensors: Tensor | None) -> Tensor:
        """What of `update` runs on the device; tensors: those of `Inputs`."""
        ranks, guard, inputs = self.ranks, self.guard, Inputs(*tensors)
        n_targets = ranks.sum((inputs.targets != IGNORE).sum().float()).clamp(min=1)
        sums = torch.cat([torch.zeros(2, device=ranks.device), self._flags])
        for micro in inputs.micro_batches():
            with self.autocast():
                total, nll = self.losses(*micro)
            (total / n_targets).backward()
            sums[:2] += torch.stack([total.detach(), nll.detach()]) / n_targets
        ranks.sum(sums)
        ranks.sum_gradients(list(self.parameters.values()))
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters.values()]))
        norm = torch.linalg.vector_norm(norms)
        skip = guard.refuses(sums[0], norm)
        scale = clip_scale(norm, self._clip) if self._clip else None
        self.optimizer.step(grad_scale=scale, skip=skip)
        self.optimizer.zero_grad()
        told = (norm, ~skip, guard.streak, guard.skipped)
        return torch.cat([sums[:2], *(value[None] for value in told), sums[2:], norms])

    def fit(self, rows: int, grad_accum_steps: int, example: Callable[[int], Rows]) -> int:
        """The fewest micro-batches, at least so many, in which `rows` rows fit into every rank's memory.

        Tried out before the first update, with all that one needs: shapes, and so the memory, are the same in
        every update. Finding out in one of them would leave the other ranks waiting.

        Args:
            grad_accum_steps: a divisor of `rows`.
            example: makes that many rows as training has them.

        Raises:
            UserError: a single row does not fit.
        """
        if rows % grad_accum_steps:
            raise ValueError(f"{rows} rows cannot be cut into {grad_accum_steps} equal micro-batches")
        while True:
            try:
                self._rehearse(example(rows), grad_accum_steps)
                needed = grad_accum_steps
            except torch.OutOfMemoryError:
                larger = [n for n in range(2 * grad_accum_steps, rows + 1) if rows % n == 0]
                needed = larger[0] if larger else rows + 1
            self._forget()
            needed = self.ranks.largest(needed)
            if needed == grad_accum_steps:
                self.recorded = self.recorded and not self.ranks.largest(int(not self._room_to_record()))
                return grad_accum_steps
            if needed > rows:
                raise UserError(
                    f"a sequence of {example(1).tokens.shape[1]} tokens does not fit into this GPU's memory "
                    "next to the model: take a smaller model or a smaller --context"
                )
            grad_accum_steps = needed

    def _room_to_record(self) -> bool:
        """Whether what the last rehearsal needed for itself fits into the memory twice: a recording keeps it,
        and evaluation and samples need no more than that."""
        device = self.ranks.device
        free, _ = torch.cuda.mem_get_info(device)
        return free >= 2 * (torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))

    def _rehearse(self, rows: Rows, grad_accum_steps: int) -> None:
        """An update's memory without its effect: two micro-batches, since from the second on the activations
        lie next to the gradients of those before, and an update that is skipped. The ranks exchange nothing:
        one whose memory ends would not come."""
        self.decoder.train()
        device = self.ranks.device
        if device.type == "cuda":  # others may have needed more, and larger micro-batches
            torch.cuda.reset_peak_memory_stats(device)
        for micro in itertools.islice(self.place(rows, grad_accum_steps).micro_batches(), 2):
            with self.autocast():
                total, _ = self.losses(*micro)
            (total * 0.0).backward()
        ranks = dataclasses.replace(self.ranks, rehearsing=True)
        ranks.sum_gradients(list(self.parameters.values()))
        norm = get_total_norm([p.grad for p in self.parameters.values()])
        scale, skip = clip_scale(norm, 1.0), torch.ones((), dtype=torch.bool, device=device)
        if isinstance(self.optimizer, Muon):
            self.optimizer.step(grad_scale=scale, skip=skip, ranks=ranks)
        else:
            self.optimizer.step(grad_scale=scale, skip=skip)

    def _forget(self) -> None:
        """Behind the handler of an exception, whose traceback holds tensors."""
        self.optimizer.zero_grad()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def make_optimizer(
    parameters: dict[str, Tensor],
    config: MirrorOptimizerConfig,
    ranks: Distributed,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> AdamW | Muon:
    """AdamW or Muon as `train_tpu.optimizer` has them; dtype, compiled: of `Muon`."""
    matrices = {}
    if config.optimizer == "muon":
        matrices = {name: p for name, p in parameters.items() if leaf_of(name).is_layer_kernel}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    groups = parameter_groups(others, config.weight_decay)
    adamw = AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    return Muon(list(matrices.values()), adamw, config, ranks, dtype, compiled) if matrices else adamw


def parameter_groups(parameters: dict[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """An optimizer's groups, those that decay (core/leaves.py) and the others; LoRA's matrices decay."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in parameters.items():
        (decayed if LORA in name or leaf_of(name).is_matrix else others).append(parameter)
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Masks are a function of (seed, step, rank): a resumed run draws those of the uninterrupted one."""
    digest = hashlib.sha256(f"dropout, seed {seed}, step {step}, rank {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
