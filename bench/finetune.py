"""`python -m bench.finetune ROWS.jsonl`: `port_torch.finetune` on one GPU, next to TRL's SFTTrainer.

The same model with the same random weights, the same conversations, packed by both, the same number of places
per update. Every way (bench/finetune_rows.py) runs in a process of its own, one after the other.
"""

import dataclasses
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bench import row_process
from bench.gpu import require_gpu
from bench.row_process import Row, exit_code, print_row, taken_row
from core import checks, cli
from core.config import preset
from core.console import Table
from core.data.tuning_rows import read_rows
from core.errors import UserError, run_command
from core.figures import require_json, write_json
from core.tokenizer import load_tokenizer

OURS = "ours"
WAYS = {
    OURS: "port_torch.finetune",
    "trl-flash": "TRL, flash",
    "trl-flash-liger": "TRL, flash, Liger",
    "trl-sdpa": "TRL, SDPA",
    "trl-flex": "TRL, FlexAttention",
    "trl-flash-narrow": "TRL, flash, Liger, bfloat16 weights",
    "trl-flash-compile": "TRL, flash, torch.compile",
}
"""Ways to fine-tune. TRL's attention in packed rows: PyTorch's flash attention over the lengths, which is
ours, too, and the kernel of the package flash_attn; by a mask; by a block mask."""


@dataclasses.dataclass(frozen=True)
class FinetuneBenchConfig:
    """Time fine-tuning on conversations next to TRL's SFTTrainer with packing.

    bfloat16 under autocast with float32 weights, but where a row says otherwise; no gradient checkpointing;
    the rest as TRL has it. Tokens are those of the conversations, without padding; a row is the median of the
    updates.
    """

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows of conversations, or of prompts and instructions, which are made conversations."""
    preset: str = "mtlm1-200m"
    """The model's shape; one that Hugging Face has a class for."""
    ways: tuple[Literal[*WAYS], ...] = tuple(WAYS)
    steps: int = 40
    """Timed updates, after 10 of warming up."""
    batch: int = 16
    """Packed rows per update."""
    context: int | None = None
    """Places per row. Default: the preset's."""
    tokenizer: str = "mistral"
    """mistral, or bytes for a tiny preset."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu tries the command out, in float32; its times say nothing."""
    json: Path | None = None
    """Write all figures into this file, after every row."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "ways"))
        checks.counts(**checks.fields(self, "steps", "batch", "context"))


def in_process(way: str, argv: list[str], folder: Path) -> Row:
    """A row's figures; folder: where the model and the rows are, and where it may write."""
    # JAX draws the first weights, TRL reads files alone and leaves nothing in anybody's cache.
    own = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"cache-{way}")}
    return row_process.in_process("bench.finetune", f"{way},{folder}", argv, os.environ | own)


def print_table(rows: list[Row]) -> None:
    """One line per row; the last column is ours over the row's tokens/s."""
    table = Table(
        ("way",),
        ("ms", "tokens/s", "tokens per update", "peak GiB", "loss, first, last", "first update s", "ours is"),
    )
    ours = next((row.get("tokens_per_second") for row in rows if row["way"] == OURS), None)
    for row in rows:
        if "failed" in row:
            table.add_row(WAYS[row["way"]], "failed")
            continue
        table.add_row(
            WAYS[row["way"]],
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens']:,.0f}",
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            f"{row['first_loss']:.3f} {row['loss']:.3f}",
            f"{row['first_update_seconds']:.1f}",
            f"{ours / row['tokens_per_second']:.2f}x" if ours else "",
        )
    table.print()
    for row in rows:
        if "failed" in row:
            print(f"failed: {WAYS[row['way']]}: {row['failed']}")


def run_row(config: FinetuneBenchConfig, row: str) -> Row:
    """What a row's process does: "WAY,FOLDER"; the way "model" makes the model, and tells of the machine."""
    from bench import finetune_rows  # slow: PyTorch

    way, _, folder = row.partition(",")
    if way == "model":
        return finetune_rows.make_model(config, Path(folder))
    measure = finetune_rows.measure_ours if way == OURS else finetune_rows.measure_trl
    return measure(config, way, Path(folder))


def check(config: FinetuneBenchConfig) -> None:
    """Refuses what cannot be timed before anything slow."""
    model, trl = preset(config.preset), [way for way in config.ways if way != OURS]
    load_tokenizer(config.tokenizer)
    require_json(config.json)
    if trl and find_spec("trl") is None:
        raise UserError("TRL is not installed: `pip install trl`, or give --ways ours")
    if config.device == "cuda":
        require_gpu("bench.finetune", "--device cpu --preset mtlm1-tiny --tokenizer bytes")
    from port_torch.hf_config import stock_type

    if trl and stock_type(model) is None:
        raise UserError(f"Hugging Face has no model like {config.preset}: give --ways ours")


def main() -> int | None:
    """Runs every row in a process and prints the table."""
    row, argv = taken_row(sys.argv[1:])
    config = cli.parse(FinetuneBenchConfig, argv, prog="python -m bench.finetune")
    if row:
        print_row(run_row(config, row))
        return None
    check(config)
    conversations = read_rows(config.data, chat=True).rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text(
            "".join(
                json.dumps({"messages": [{"role": t.role, "content": t.content} for t in one.turns]}) + "\n"
                for one in conversations
            ),
            encoding="utf-8",
        )
        report: dict[str, Any] = in_process("model", argv, folder)
        if "failed" in report:
            raise UserError(f"the model cannot be made: {report['failed']}")
        report |= {"rows": [], "conversations": len(conversations), "batch": config.batch}
        print(
            f"{report['device']}, PyTorch {report['torch']}; {config.preset} with {report['parameters']:,} "
            f"parameters; {len(conversations):,} conversations, {config.batch} x {report['context']} places "
            "per update",
            flush=True,
        )
        for number, way in enumerate(config.ways, 1):
            print(f"[{number}/{len(config.ways)}] {WAYS[way]} ...", flush=True)
            figures = in_process(way, argv, folder)
            report["rows"].append({"way": way, **figures})
            if "failed" not in figures:
                print(f"    {figures['milliseconds']:.1f} ms, {figures['tokens_per_second']:,.0f} tokens/s")
            write_json(config.json, report)
    print_table(report["rows"])
    return exit_code(report["rows"])


if __name__ == "__main__":
    run_command(main)
