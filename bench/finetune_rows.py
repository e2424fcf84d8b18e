"""The rows of `bench.finetune`: the model that all start from, ours, and TRL's.

The clock is read at the end of every update, on the device, so that whatever the host does between two
updates counts where it holds the device up. Tokens are counted as the conversations have them, on both sides.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench.row_process import Row
from bench.torch_row import compiled_facts, refuse_fallbacks, require_liger
from core.chat import open_chat
from core.checkpoint.manifest import Manifest
from core.config import preset
from core.data.row_packing import PADDING
from core.data.tuning_rows import read_rows
from core.run.reports import process_age
from core.tokenizer import load_tokenizer, tokenizer_record
from core.vocabulary import with_room
from port_torch.export import write_rest, write_weights
from port_torch.finetune import FinetuneConfig
from port_torch.model import attend_by_lengths, parameter_name
from port_torch.training.distributed import open_distributed
from port_torch.training.engine import TorchEngine
from port_torch.training.finetuning import make_job
from port_torch.training.pretraining import fresh_decoder
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.setup import load_kernels
from port_torch.training.trainer import choose_grad_accum_steps, make_train_step

if TYPE_CHECKING:
    from bench.finetune import FinetuneBenchConfig

WARM_UP = 10
"""Updates before the clock starts: the first of each shape are compiled, and ours recorded."""
LR = 1e-4
MODEL, ROWS = "model", "rows.jsonl"


class Way(NamedTuple):
    """How TRL trains."""

    attention: str
    liger: bool = False
    compiled: bool = False
    dtype: str = "float32"


TRL = {
    "trl-sdpa": Way("sdpa"),
    "trl-flex": Way("flex_attention"),
    "trl-flash": Way("by_lengths"),
    "trl-flash-liger": Way("by_lengths", liger=True),
    "trl-flash-compile": Way("by_lengths", compiled=True),
    "trl-flash-narrow": Way("by_lengths", liger=True, dtype="bfloat16"),
}


class Clock:
    """When updates ended, and how many tokens each had."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        self.first_update = 0.0
        """Seconds from the start of the process, imports included."""

    def mark(self) -> None:
        """An update has been given to the device."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            if not self._marks:
                event.synchronize()
        else:
            event = process_age()
        if not self._marks:
            self.first_update = process_age()
        self._marks.append(event)

    def row(self, tokens: Sequence[int], first_loss: float, loss: float) -> Row:
        """The row's figures; tokens: of each update."""
        if self._cuda:
            torch.cuda.synchronize()
        pairs = itertools.pairwise(self._marks[WARM_UP - 1 :])
        times = [a.elapsed_time(b) if self._cuda else (b - a) * 1e3 for a, b in pairs]
        median, mean = statistics.median(times), statistics.mean(tokens[WARM_UP : len(self._marks)])
        return {
            "milliseconds": median,
            "mean_milliseconds": statistics.mean(times),
            "slowest": max(times),
            "tokens": mean,
            "tokens_per_second": mean / median * 1e3,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self._cuda else None,
            "first_update_seconds": self.first_update,
            "first_loss": first_loss,
            "loss": loss,
        }


def make_model(config: "FinetuneBenchConfig", folder: Path) -> Row:
    """Writes a folder of random weights, with ChatML and its tokens, so that nobody has to add them."""
    tokenizer, model = load_tokenizer(config.tokenizer), preset(config.preset)
    chat = open_chat(tokenizer, None, "chatml", folder)
    context = model.context if config.context is None else config.context
    model = dataclasses.replace(model, context=context, vocab_size=tokenizer.vocab_size)
    model = with_room(model, chat.tokenizer.vocab_size)
    weights, out = fresh_decoder(model, 0).state_dict(), folder / MODEL
    out.mkdir()
    tree = write_weights(out, model, lambda leaf: weights[parameter_name(leaf)], "float32")
    manifest = Manifest(
        "params", 0, 0, 0, {"model": dataclasses.asdict(model)}, tokenizer_record(chat.tokenizer),
        chat_template=chat.template, tree=tree,
    )  # fmt: skip
    write_rest(out, model, chat.tokenizer, manifest, "float32", "")
    cuda = config.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "parameters": model.n_params,
        "context": context,
    }


def measure_ours(config: "FinetuneBenchConfig", way: str, folder: Path) -> Row:
    """The updates of `port_torch.finetune` with its defaults, without its evaluations.

    Without our kernels the row fails on a GPU.
    """
    n = WARM_UP + config.steps
    command = FinetuneConfig(
        init_from=folder / MODEL, data=folder / ROWS, out=folder / way, steps=n, batch=config.batch,
        device=config.device, validation=0.0, kernels="cuda" if config.device == "cuda" else "auto",
    )  # fmt: skip
    clock, counted, losses, pending = Clock(config.device), [], [], []
    with open_distributed(config.device) as ranks:
        job = make_job(command, read_rows(command.data), ranks)
        command = job.config
        train_step = make_train_step(job, ranks)
        load_kernels(command, ranks)
        parts = choose_grad_accum_steps(job, train_step, config.batch)
        engine = TorchEngine(
            train_step, parts, config.batch // parts, [], None, job.checkpoints, command.keep
        )
        batches = job.batches(0)
        for step, batch in enumerate(itertools.islice(batches, n)):
            pending.append(engine.dispatch(batch, step, LR, command.guard))
            clock.mark()
            counted.append(count_tokens(batch.rows.documents))
            if len(pending) > 1:  # read one update late, as the loop does
                losses.append(engine.read(pending.pop(0)).nll)
        losses.append(engine.read(pending.pop()).nll)
        return clock.row(counted, losses[0], losses[-1])


def count_tokens(documents: Any) -> int:
    """Tokens of packed conversations: the last one of each is only predicted, and has no place of its own."""
    n_documents = sum(len(set(row.tolist()) - {PADDING}) for row in documents)
    return int((documents != PADDING).sum()) + n_documents


def measure_trl(config: "FinetuneBenchConfig", way: str, folder: Path) -> Row:
    """The updates of TRL's SFTTrainer."""
    import datasets
    import transformers
    import trl

    how, cuda, optim = TRL[way], config.device == "cuda", MirrorOptimizerConfig()
    attention = how.attention
    compiles = how.compiled or attention == "flex_attention"  # the latter is compiled by transformers
    if compiles:
        refuse_fallbacks(cuda=False)  # what its masks are given to is TRL's choice
    if attention == "by_lengths":
        transformers.AttentionInterface.register(attention, flash if cuda else flash_by_sdpa)
        transformers.AttentionMaskInterface.register(attention, no_mask)
    context = transformers.AutoConfig.from_pretrained(folder / MODEL).max_position_embeddings
    settings = trl.SFTConfig(
        output_dir=str(folder / way),
        max_length=context,
        packing=True,
        assistant_only_loss=True,
        per_device_train_batch_size=config.batch,
        dataloader_drop_last=True,
        gradient_checkpointing=False,
        max_steps=WARM_UP + config.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_epsilon=optim.eps,
        max_grad_norm=optim.clip,
        bf16=cuda,
        use_cpu=not cuda,
        use_liger_kernel=how.liger and cuda,
        torch_compile=how.compiled,
        # One length for all batches, or each would be compiled anew.
        pad_to_multiple_of=config.batch * context if compiles else None,
        model_init_kwargs={"attn_implementation": attention, "dtype": how.dtype},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock, counted, losses = Clock(config.device), [], []

    class Trainer(trl.SFTTrainer):
        def training_step(self, *given: Any, **more: Any) -> torch.Tensor:
            losses.append(super().training_step(*given, **more))  # stays on the device
            return losses[-1]

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    trainer = Trainer(
        model=str(folder / MODEL),
        args=settings,
        train_dataset=datasets.load_dataset("json", data_files=str(folder / ROWS), split="train"),
        callbacks=[Marks()],
    )
    if settings.use_liger_kernel:
        require_liger(trainer.model, loss=False)  # TRL turns Liger's loss off and computes its own
    collate = trainer.data_collator

    def collate_counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        counted.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = collate_counted
    trainer.train()
    row = clock.row(counted, float(losses[0]), float(losses[-1]))
    return row | compiled_facts() if compiles else row


def flash(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows [1, heads, T, K], as transformers calls it, over the lengths."""
    q, k, v = (part[0].transpose(0, 1).to(torch.bfloat16) for part in (q, k, v))
    starts, longest = given["cu_seq_lens_q"], int(given["max_length_q"])
    return attend_by_lengths(q, k, v, starts, longest)[None], None


def flash_by_sdpa(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    """The same on a CPU, one conversation after the other."""
    pieces = given["cu_seq_lens_q"].diff().tolist()
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*each, is_causal=True)
        for each in zip(*(part.split(pieces, 2) for part in (q, k, v)), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def no_mask(*_: Any, **__: Any) -> None:
    """Flash attention is told lengths, and needs no mask."""
