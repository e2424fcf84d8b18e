"""`python -m train_tpu.prepare SOURCE... --out DIR`: text to training data, once.

Every document becomes `<s>` tokens `</s>`; a split's documents joined are one stream, which is cut into
windows of context + 1 tokens and written as ArrayRecord. core/data/prepare.py does the work.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import cli
from core.config import PRESETS
from core.data.formats import Form
from core.data.prepare import open_prepared, prepare
from core.errors import EXIT_INTERRUPTED, UserError, run_command
from core.special_tokens import as_in_folder


@dataclasses.dataclass
class PrepareConfig:
    """Tokenise text and pack it for training. Needs no network and no accelerator (except `hf:`)."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")] = ()
    """Files (.txt, .jsonl, .ndjson, .json, .parquet, also with .gz, .bz2, .xz, .zst), folders, globs,
    `builtin`, `tfds:NAME`, `hf:DATASET[:CONFIG]`. Of a folder or repository, licences and readme files,
    splits other than train, and .txt files next to JSON or Parquet are left out, and listed; name them, or
    give a glob, to read them."""
    out: Path | None = None
    """The folder to write; it must not exist."""
    tokenizer: str = "mistral"
    """`mistral`, `bytes` or the path of a tokenizer.json, which `FILE,bos=TOKEN,eos=TOKEN` follows where
    others than `<s>` and `</s>`, or `<|endoftext|>`, open and close a document (bos=none: nothing opens it).
    What a tokenizer_config.json next to it says need not be named."""
    context: int = 1024
    """Length of a training window, in tokens."""
    valid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=PATH")] = ()
    """NAME=PATH: a separate held-out set (repeatable). All of the sources is then trained on."""
    valid_fraction: float | None = None
    """Fraction of the documents to hold out, by hash (default 0.01). With fewer than 1000 documents, the end
    of each instead (default 0.05)."""
    train_tokens: int | None = None
    """Stop reading once the train split has this many tokens, at the end of a document. What --valid-fraction
    holds out comes from the documents read; sets of --valid are read whole. Default: all text."""
    field: str = "text"
    """JSON field, Parquet column or TFDS feature that holds the text; `meta.title` is one within another. A
    row where it is missing or null is left out, and counted."""
    template: str | None = None
    """The text made of several fields, instead of --field: '{title}\\n\\n{text}'."""
    format: Form | None = None
    """Format of the files, whatever their names: text for plain text such as .raw or .md."""
    dedup: bool = False
    """Leave out training documents that are exact copies of earlier ones, or of documents of --valid. Takes 8
    bytes of memory for every document, 16 at times."""
    overlap: Literal["count", "drop"] | None = None
    """Look for training documents that share a run of 13 words with a set of --valid or with --eval-items:
    count them, or drop them from training. Words are compared in lower case and without punctuation."""
    eval_items: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Texts that --overlap looks for as well (repeatable): a file with a field `text`, such as
    `python -m eval.items` writes of evaluation tasks."""
    workers: int | None = None
    """Processes that read, tokenise and write. Default: one per core. The result does not depend on it."""
    verify: Path | None = None
    """Only check this prepared folder: read all of it and compare it with its recorded hashes."""


def verify(path: Path) -> int:
    """Reads every file of a prepared folder; a `UserError` names the first that is not as it was written."""
    started = time.monotonic()
    dataset = open_prepared(path)
    dataset.verify()
    total = sum(entry["bytes"] for entry in dataset.files.values())
    print(
        f"{path} is intact: {len(dataset.files)} files, {total / 1e6:,.1f} MB, compared with their sha256 in "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


def next_command(out: Path, tokenizer: str, context: int) -> str:
    """What trains on prepared data: with a preset of its context, or with --context. The data knows its
    tokenizer."""
    preset = "mtlm1-tiny" if tokenizer == "bytes" or context <= PRESETS["mtlm1-tiny"].context else "mtlm2-40m"
    other = () if PRESETS[preset].context == context else ("--context", context)
    return cli.command("train_tpu.run", "--preset", preset, *other, "--data", out)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    config = cli.parse(PrepareConfig, argv, prog="python -m train_tpu.prepare")
    if config.verify is not None:
        return verify(config.verify)
    if config.out is None:
        raise UserError("no output folder is given: name a new one with --out DIR")
    if config.template is not None and config.field != "text":
        raise UserError("give --field or --template, not both")
    if not config.sources:
        raise UserError("no text is given: name files, folders, `builtin`, `tfds:NAME` or `hf:DATASET`")
    pairs = [pair.partition("=") for pair in config.valid]
    for name, _, path in pairs:
        if not path:
            raise UserError(f"--valid {name} has no path: write NAME=PATH")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError("two --valid sets have the same name: give each its own")
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "verify"}
    options["tokenizer"] = as_in_folder(config.tokenizer)
    options |= {
        "sources": list(config.sources),
        "eval_items": list(config.eval_items),
        "valid": {name: path for name, _, path in pairs},
    }
    try:
        prepare(**options)
    except KeyboardInterrupt:
        print(
            f"interrupted: {config.out} was not made; what is done is kept, and the same command resumes",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    print(f"\nnext: {next_command(config.out, config.tokenizer, config.context)}")
    return 0


if __name__ == "__main__":
    run_command(main)
