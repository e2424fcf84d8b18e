"""One process, or one for each GPU under `torchrun`: who I am, on which device, and sums over all.

A global batch is cut into equal blocks of rows, rank after rank. What a command prints, writes and samples is
rank 0's; everything that a decision hangs on is made the same on every rank by a sum.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError
from core.run.folder import require_shared
from port_torch.sampling import choose_device

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device
    before_end: list[Callable[[], object]] = dataclasses.field(
        default_factory=list, compare=False, kw_only=True
    )
    """Called before the connection ends: NCCL waits for recorded CUDA graphs that hold its calls."""
    rehearsing: bool = dataclasses.field(default=False, kw_only=True)
    """`gather` and `sum_gradients` take their memory and exchange nothing: what they give is of no use."""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, writes and samples."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This rank's rows of a global batch; a UserError if it has no equal parts."""
        if batch % self.size:
            raise UserError(
                f"--batch {batch} is not divisible by the {self.size} processes: the nearest that is, is "
                f"{max(1, round(batch / self.size)) * self.size}"
            )
        part = batch // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in its place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, own: list[Tensor]) -> list[Tensor]:
        """The tensors of all ranks, which give some of equal shapes, rank after rank on the first axis; one
        exchange."""
        if self.size == 1:
            return own
        flat = torch.cat([part.flatten() for part in own])
        whole = flat.new_empty(self.size, len(flat))
        if not self.rehearsing:
            dist.all_gather_into_tensor(whole.view(-1), flat)
        parts = whole.split([part.numel() for part in own], dim=1)
        return [
            found.reshape(self.size * len(part), *part.shape[1:])
            for found, part in zip(parts, own, strict=True)
        ]

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Makes the gradient of each the sum over all ranks; one exchange, of all as one array."""
        if self.size == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        if not self.rehearsing:
            dist.all_reduce(flat)
        sums = flat.split([p.numel() for p in parameters])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter)

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Makes each tensor that of the first rank."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def largest(self, value: int) -> int:
        """The largest of a number over all ranks."""
        if self.size == 1:
            return value
        held = torch.tensor(value, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def share(self, value: str) -> str:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def first_does(self, action: Callable[[], T]) -> T | None:
        """What `action` gives the first rank, which alone does it; None elsewhere, when it is done.

        Raises:
            Exception: the first's own.
            SystemExit: on the other ranks, after an error of the first, which says for all what it is.
        """
        made, failure = None, None
        if self.first:
            try:
                made = action()
            except Exception as error:  # whatever it is, the others must not wait for it
                failure = error
        failed = self.share("failed" if failure else "")
        if failure:
            raise failure
        if failed:
            raise SystemExit(2)
        return made

    def in_turn(self, action: Callable[[], T]) -> T:
        """What `action` gives each rank: the first does it alone, the others when it is done.

        For what is made once where the ranks share a disk. Errors of the first are those of `first_does`.
        """
        made = self.first_does(action)
        return made if self.first else action()

    def require_equal(self, value: str, what: str) -> None:
        """Refuses, on every rank, to continue if the ranks do not have the same `value`."""
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        if self.largest(digest) != -self.largest(-digest):
            self.refuse(f"the processes do not have the same {what}: give all the same disk and files")

    def require_shared(self, folder: Path) -> None:
        """`core.run.folder.require_shared` among the ranks."""
        if self.size == 1:
            return
        try:
            require_shared(folder, self.first, self.share, lambda flag: self.largest(int(flag)) > 0)
        except UserError as error:
            self.refuse(str(error))

    def refuse(self, sentence: str) -> NoReturn:
        """Ends all ranks, each of which calls it, with a sentence that the first says."""
        if self.first:
            raise UserError(sentence)
        raise SystemExit(2)


@contextlib.contextmanager
def open_distributed(device: str) -> Iterator[Distributed]:
    """The processes that torchrun started, or this one alone; their connection ends with the context.

    device: "auto", "cpu" or "cuda", as on the command line.

    Raises:
        UserError: there is no GPU, or fewer than processes.
    """
    kind = choose_device(device)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started a process for GPU {local}, and there are {torch.cuda.device_count()}: "
                f"give --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
    here = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if size == 1:
        yield Distributed(0, 1, here)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    ranks = Distributed(rank, size, here)
    try:
        yield ranks
    finally:
        for end in ranks.before_end:
            end()
        dist.destroy_process_group()
