"""A run folder's config.json is itself, or refused."""

import json
import random
from pathlib import Path

import pytest

from core.errors import UserError
from train_tpu.run_folder import read_config, write_config

RECORD = {
    "run": {"lr": 0.001, "steps": 100, "prompts": ["The"]},
    "model": {"d_model": 32},
    "tokenizer": {"name": "bytes", "sha256": "00", "vocab_size": 258},
    "data": {"path": "text", "fingerprint": "11"},
}


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path):
    write_config(tmp_path, RECORD)
    assert read_config(tmp_path) == RECORD
    path = tmp_path / "config.json"
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            record = read_config(tmp_path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # white space, or the name of the field that holds the seal
            assert {name: record[name] for name in RECORD} == RECORD
    assert refused > 200


def test_an_edit_that_is_meant(tmp_path: Path):
    write_config(tmp_path, RECORD)
    path = tmp_path / "config.json"
    edited = json.loads(path.read_text()) | {"data": {"path": "elsewhere", "fingerprint": "11"}}
    path.write_text(json.dumps(edited))
    with pytest.raises(UserError, match='"sha256" if the edit is meant'):
        read_config(tmp_path)
    del edited["sha256"]
    path.write_text(json.dumps(edited))
    assert read_config(tmp_path)["data"]["path"] == "elsewhere"
