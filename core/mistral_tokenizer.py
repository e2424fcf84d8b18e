"""Mistral-7B-v0.1's tokenizer: sentencepiece's ids, several times faster on whole documents."""

import hashlib
import importlib.resources
import re
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np

from core.errors import UserError
from core.tokenizer import Tokenizer, utf8

# Mistral-7B-v0.1's sentencepiece model, as the package mistral-common carries it.
MISTRAL_FILE = "data/tokenizer.model.v1"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece


class MistralTokenizer(Tokenizer):
    """Mistral-7B-v0.1's byte-pair encoding with byte fallback; the ids are exactly sentencepiece's.

    Sentencepiece merges pairs over a whole document. In this vocabulary no piece has a space after
    another character, and none holds a line feed, so no merge crosses such a border: a document falls
    into units (spaces and the characters that follow them) that can be encoded one by one, and a unit
    seen before need not be encoded again. That is several times faster than encoding whole documents.
    """

    name = "mistral"
    sha256 = MISTRAL_SHA256

    _UNITS = re.compile(f"[ {SPACE}]*[^ {SPACE}\n]+|[ {SPACE}]+|\n")

    def __init__(self) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        resource = importlib.resources.files("mistral_common").joinpath(MISTRAL_FILE)
        content = resource.read_bytes() if resource.is_file() else b""
        if hashlib.sha256(content).hexdigest() != MISTRAL_SHA256:
            raise UserError(
                f"{resource} is not Mistral-7B-v0.1's tokenizer (sha256 {MISTRAL_SHA256[:12]}...): "
                "reinstall the package mistral-common"
            )
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        self.vocab_size = len(model.pieces)
        self.bos, self.eos = model.trainer_spec.bos_id, model.trainer_spec.eos_id
        self._whole = sentencepiece.SentencePieceProcessor(model_proto=content)
        # The space that sentencepiece puts before a document is put there by `encode`, once, and not
        # before every unit.
        model.normalizer_spec.add_dummy_prefix = False
        unit = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self._unit_ids = _UnitCache(unit.encode)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        if not text:
            return np.empty(0, np.uint16)
        units = self._UNITS.findall(SPACE + text)
        return np.frombuffer(b"".join(map(self._unit_ids.__getitem__, units)), np.uint16)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        known = (int(i) for i in ids if i < self.vocab_size)
        return self._whole.decode([i for i in known if i not in (self.bos, self.eos)])


class _UnitCache(dict):
    """Unit of text -> its ids as uint16 bytes; what is missing is encoded on the way."""

    # About 60 MB when full. Emptying it then costs little: the common units are back at once.
    MAX_UNITS = 1 << 18
    MAX_LENGTH = 64  # a longer unit hardly comes twice

    def __init__(self, encode) -> None:
        self._encode = encode

    def __missing__(self, unit: str) -> bytes:
        ids = np.array(self._encode(unit), np.uint16).tobytes()
        if len(unit) <= self.MAX_LENGTH:
            if len(self) >= self.MAX_UNITS:
                self.clear()
            self[unit] = ids
        return ids
