"""Which document each place of a window belongs to, read from the tokens themselves.

Prepared data are windows cut from one stream of documents, so a window holds the end of one document, whole
ones, and the beginning of another. Nothing else is stored to tell them apart: a document begins where its
`<s>` stands. For a tokenizer without one it begins at the `</s>` that ends the document before, as text does
in evaluation (`Tokenizer.prefix`): that token is predicted as the end of its own document, and read as the
beginning of the next.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import tokenizer_carriers
from core.tokenizer import Tokenizer, load_tokenizer_of


class DocumentMark(NamedTuple):
    """How a document's first token is recognised."""

    token: int
    twice: bool
    """Whether the same token also ends every document: of two in a row the second begins one."""


def document_mark(tokenizer: Tokenizer) -> DocumentMark:
    """That of a tokenizer: every one has a token for the end of a document, if none for its beginning."""
    return DocumentMark(tokenizer.prefix, twice=tokenizer.bos == tokenizer.eos)


def recorded_mark(step_dir: Path) -> DocumentMark | None:
    """That of the run that wrote a checkpoint; None if it trained through the documents of a window."""
    manifest = load_manifest(step_dir)
    if not manifest.config.get("run", {}).get("document_mask"):
        return None
    return document_mark(load_tokenizer_of(manifest.tokenizer, tokenizer_carriers(step_dir), str(step_dir)))


def number_documents(tokens: Any, mark: DocumentMark | None) -> Any:
    """Numbers that rise along a row, one for each document of it; None without a mark.

    Args:
        tokens: [B, S] integers, of NumPy or JAX.
        mark: None: a row is one document.

    Returns:
        [B, S] int32, of the same library.
    """
    if mark is None:
        return None
    begins = tokens == mark.token
    if mark.twice:
        # What the first place says only shifts the numbers of its row.
        begins &= tokens.__array_namespace__().roll(begins, 1, axis=1)
    return begins.cumsum(axis=1, dtype=np.int32)
