"""Texts that tokenizers disagree about, and what one release of transformers makes of them.

As a program, in an environment with another transformers: `python texts.py FOLDER OUT.json`.
"""

import json
import random
import sys

AWKWARD = [
    " ", "  ", " " * 9, "\u2581", "\n", "\n\n", "\r\n", "\t", "\0", "\x0b", "\x85", "\u3000", "\ufeff",
    "\u200d", "😀", "👩\u200d👧", "é", "e\u0301", "漢字", "Привет", "עברית", "ไทย", "the", " the", "ing",
    "ed ", "<s>", "</s>", "<unk>", "<0x41>", "='", "();\r", "====", "Hello, World! ", "1234567",
]  # fmt: skip


def fuzzed_texts(n: int = 1000) -> list[str]:
    """Spaces, line feeds, emoji, scripts, control characters and any other character, the same every time."""
    rng = random.Random(0)

    def part() -> str:
        if rng.random() < 0.7:
            return rng.choice(AWKWARD)
        return chr(
            rng.choice([rng.randrange(128), rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000)])
        )

    return ["".join(part() for _ in range(rng.randrange(30))) for _ in range(n)]


def encode_and_decode(folder: str, texts: list[str]) -> list[tuple[list[int], str]]:
    """Ids of each text and the text of these ids, by the tokenizer that transformers finds in the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    every = [tokenizer(text)["input_ids"] for text in texts]
    return [(ids, tokenizer.decode(ids, skip_special_tokens=True)) for ids in every]


if __name__ == "__main__":
    with open(sys.argv[2], "w") as out:  # noqa: PTH123
        json.dump(encode_and_decode(sys.argv[1], fuzzed_texts()), out)
