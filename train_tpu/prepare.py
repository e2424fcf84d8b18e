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
from core.data.prepare import append, prepare
from core.data.versions import open_version
from core.errors import EXIT_INTERRUPTED, UserError, run_command
from core.special_tokens import as_in_folder

TOKENIZER, CONTEXT = "mistral", 1024


@dataclasses.dataclass
class PrepareConfig:
    """Tokenize text and pack it for training. Needs no network and no accelerator (except `hf:`)."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")] = ()
    """Files (.txt, .jsonl, .ndjson, .json, .parquet, also with .gz, .bz2, .xz, .zst), folders, globs,
    `builtin`, `tfds:NAME`, `hf:DATASET[:CONFIG]`. Of a folder or repository, licenses and readme files,
    splits other than train, and .txt files next to JSON or Parquet are left out, and listed; name them, or
    give a glob, to read them."""
    out: Path | None = None
    """The folder to write; it must not exist."""
    append: Path | None = None
    """Instead of --out: prepared data to make a new version of, with the sources behind what it has. Its
    held-out sets stay what they are, and runs that began on an older version continue with that."""
    tokenizer: str | None = None
    """`mistral` (the default), `bytes` or the path of a tokenizer.json, which `FILE,bos=TOKEN,eos=TOKEN`
    follows where others than `<s>` and `</s>`, or `<|endoftext|>`, open and close a document (bos=none:
    nothing opens it).
    What a tokenizer_config.json next to it says need not be named."""
    context: int | None = None
    """Length of a training window, in tokens. Default: 1024."""
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
    """Look for training documents that share a run of 13 words with a set of --valid, with what the data of
    --append holds out, or with --eval-items: count them, or drop them from training. Words are compared in
    lower case and without punctuation."""
    eval_items: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Texts that --overlap looks for as well (repeatable): a file with a field `text`, such as
    `python -m eval.items` writes of evaluation tasks."""
    workers: int | None = None
    """Processes that read, tokenize and write. Default: one per core. The result does not depend on it."""
    verify: Path | None = None
    """Only check this prepared folder: read all of it and compare it with its recorded hashes."""


def verify(path: Path) -> int:
    """Reads every file of a prepared folder; a `UserError` names the first that is not as it was written."""
    started = time.monotonic()
    dataset = open_version(path)
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
        _require_alone(config)
        return verify(config.verify)
    target = config.append if config.out is None else config.out
    if target is None:
        raise UserError("no output folder is given: name a new one with --out DIR")
    if config.append is not None and config.out is not None:
        raise UserError("give --out for new data or --append for data that is there, not both")
    if config.template is not None and config.field != "text":
        raise UserError("give --field or --template, not both")
    if not config.sources:
        raise UserError("no text is given: name files, folders, `builtin`, `tfds:NAME` or `hf:DATASET`")
    names = ("train_tokens", "field", "format", "workers", "template", "dedup", "overlap")
    options = {name: getattr(config, name) for name in names}
    options |= {"sources": list(config.sources), "eval_items": list(config.eval_items)}
    tokenizer = None if config.tokenizer is None else as_in_folder(config.tokenizer)
    try:
        if config.append is not None:
            if config.valid or config.valid_fraction is not None:
                raise UserError(
                    f"the held-out sets of {target} stay what they are: give --append without --valid"
                )
            append(out=target, tokenizer=tokenizer, context=config.context, **options)
            return 0
        tokenizer, context = tokenizer or TOKENIZER, CONTEXT if config.context is None else config.context
        held_out = {"valid": _held_out(config), "valid_fraction": config.valid_fraction}
        prepare(out=target, tokenizer=tokenizer, context=context, **held_out, **options)
    except KeyboardInterrupt:
        made = "was not made" if config.append is None else "has no new version"
        print(
            f"interrupted: {target} {made}; what is done is kept, and the same command resumes",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    print(f"\nnext: {next_command(target, config.tokenizer or TOKENIZER, context)}")
    return 0


def _require_alone(config: PrepareConfig) -> None:
    """Refuses whatever is given with --verify, which would not be read."""
    plain = PrepareConfig()
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(config)
        if field.name not in ("sources", "verify")
        and getattr(config, field.name) != getattr(plain, field.name)
    ]
    if others := [*config.sources, *given]:
        raise UserError(
            f"--verify {config.verify} checks that folder and does nothing else: leave out "
            f"{', '.join(others)}"
        )


def _held_out(config: PrepareConfig) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in config.valid]
    for name, _, path in pairs:
        if not path:
            raise UserError(f"--valid {name} has no path: write NAME=PATH")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError("two --valid sets have the same name: give each its own")
    return {name: path for name, _, path in pairs}


if __name__ == "__main__":
    run_command(main)
