"""What a run needs before it begins: the `Job` that a command makes, the device's settings, the kernels.

And the table that a run begins with.
"""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from core.config import ModelConfig, compute_dtype
from core.console import Table
from core.data.sequences import Batch, HeldOut, Rows
from core.errors import UserError
from core.lora import LoraConfig
from core.run.data import trained_before
from core.run.folder import require_folder
from core.run.training_run import TrainingRun
from core.tokenizer import Tokenizer
from kernels_cuda import library
from port_torch.model import Decoder, attends_by_lengths
from port_torch.training.distributed import Distributed
from port_torch.training.engine import device_name
from port_torch.training.settings import TrainerConfig


@dataclasses.dataclass
class Job(TrainingRun):
    """What is trained, on what, and where."""

    config: TrainerConfig
    out: Path
    defaults: TrainerConfig
    """The command's own, for settings that a run to be resumed is older than."""
    decoder: Decoder
    """On its device; what needs no gradient is not trained."""
    tokenizer: Tokenizer
    record: dict[str, Any]
    lineage: list[dict[str, Any]]
    """What the parameters come from."""
    steps: int
    batches: Callable[[int], Iterator[Batch]]
    """This rank's batches from the global batch on whose first sequence has that index."""
    example: Callable[[int], Rows]
    """That many rows as training has them, to try the memory with."""
    heldout: list[HeldOut]
    prompts: list[list[int]]
    table: list[tuple[str, str]]
    """What is printed of model and data."""
    lora: LoraConfig | None = None
    """Of a run that trains adapters, which `decoder` has; its settings have `init_from`."""


def begin(config: TrainerConfig, out: Path, ranks: Distributed) -> TrainerConfig:
    """The settings as a run records them: `auto` as what it stands for on this device.

    Raises:
        UserError: no run can be written to `out`; told before anything slow.
    """
    require_folder(out)
    platform = "cpu" if ranks.device.type == "cpu" else "gpu"
    return dataclasses.replace(config, dtype=compute_dtype(config.dtype, platform))


def load_kernels(config: TrainerConfig, ranks: Distributed) -> None:
    """Takes the CUDA kernels where they are, and says on stderr which run.

    The first rank goes before the others: it may have to compile them, and it says what it found. Where it
    finds none, no other rank compiles them again or runs what it does not.

    Raises:
        UserError: they must run, and a rank has none.
    """
    failure, found = None, True
    if ranks.first:
        try:
            found = library.load(config.kernels).file is not None
        except UserError as error:
            failure, found = error, False
    if ranks.largest(int(not found)):  # of the first rank alone: the others have not looked
        if failure is not None:
            raise failure
        if config.kernels == "cuda":
            raise UserError("--kernels cuda cannot be used: the first process found no kernels, and says why")
        return
    if not ranks.first:
        with contextlib.redirect_stderr(io.StringIO()):
            source = library.load(config.kernels)
        if source.file is None:
            print(f"kernels of process {ranks.rank}: {source.reason}", file=sys.stderr)


def require_deterministic_operations() -> None:
    """Lets PyTorch use no operation on a GPU whose result varies; before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradient adds in no fixed order


def is_compiled(config: TrainerConfig, ranks: Distributed) -> bool:
    """Whether torch.compile is used: as --compile says, else as the command has it on a GPU."""
    by_default = config.compiled_by_default and ranks.device.type == "cuda"
    return by_default if config.compile is None else config.compile


def describe(job: Job, ranks: Distributed, recorded: bool) -> Table:
    """The table a run begins with; recorded: whether an update is one CUDA graph."""
    model, config = job.decoder.config, job.config
    bf16 = config.dtype == "bfloat16"
    how = ", compiled" if is_compiled(config, ranks) else ""
    how += ", an update recorded as one CUDA graph" if recorded else ""
    trained = sum(p.numel() for p in job.decoder.parameters() if p.requires_grad)
    length = trained_before(config, job.out).describe(job.steps, config.batch, model.context)
    muon = config.optim.optimizer == "muon"
    optimizer = "AdamW for the adapters" if job.lora else "AdamW for all parameters"
    optimizer = "Muon for the layers' matrices, AdamW for the rest" if muon else optimizer
    rows = [
        ("model", model.summary),
        ("parameters", f"{model.n_params:,}, of which {trained:,} are trained"),
        *job.table,
        ("training", f"{length} places"),
        ("optimizer", f"{optimizer}, peak lr {config.optim.lr:g}, {config.optim.schedule}, "
                      f"warmup {config.optim.warmup}"),
        ("devices", f"{ranks.size} x {device_name(ranks)}, {'bfloat16' if bf16 else 'float32'}{how}"),
        ("attention", attention_name(model, ranks.device, bf16, job.example(1).documents is not None)),
    ]  # fmt: skip
    table = Table(("", ""), ruled=False)
    for row in rows:
        table.add_row(*row)
    return table


def attention_name(model: ModelConfig, device: torch.device, bf16: bool, packed: bool) -> str:
    """Which of PyTorch's attentions will run."""
    if packed and attends_by_lengths(model, device, bf16):
        return "PyTorch's flash (causal, each document by its length)"
    like = {"device": device, "dtype": torch.bfloat16 if bf16 else torch.float32, "requires_grad": True}
    kv_heads = model.n_heads if packed else model.kv_heads  # with a mask they are repeated
    q, k = (torch.zeros(1, n, model.context, model.head_size, **like) for n in (model.n_heads, kv_heads))
    mask = torch.ones(model.context, model.context, dtype=torch.bool, device=device) if packed else None
    backend = SDPBackend(
        torch._fused_sdp_choice(q, k, k, mask, 0.0, not packed, enable_gqa=q.shape != k.shape)
    )
    kind = "a mask of documents" if packed else "causal"
    return f"PyTorch's {backend.name.removesuffix('_ATTENTION').lower()} ({kind})"
