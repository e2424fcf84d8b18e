"""The requests we score are the harness's own, from its first prompt to its last choice.

Its 0.3 line keeps, in its tests, the SHA-256 of all zero-shot requests of a task, the documents shuffled by
random.Random() seeded with 42 (EleutherAI/lm-evaluation-harness, commit 8c997e5, tests/testdata).
"""

import hashlib
import json
import random

import pytest
from lm_eval.api.instance import Instance

from eval.tasks import open_tasks
from tests.eval.shared_data import DATA, needs_data

# By the names of today: truthfulqa_mc was both of its tasks, a document's mc1 choices before its mc2 choices.
SHA256 = {
    ("wikitext",): "b6f83e6cf7535ee41b0057c3e2ec2cf7f2fa5a9119b305c479a83091d1142b2c",
    ("openbookqa",): "78a49a0ca1a47373adb33463b1d092e6bc0d8f4b01bcb380ada48065037849d7",
    ("winogrande",): "90a3eff49de9173964d46f5ed57bcf9a78a72dd1bfe0e5323b25cebb40b49ea9",
    ("piqa",): "6048a3a2bb3ad1e6a3d98139618e06b4d7de766edd685bd38837596199c3f69f",
    ("arc_challenge",): "41c34c96cca8ace661911d0033d630c554b283f5a3953bcdc50720ae6b00a9c1",
    ("arc_easy",): "ffa6e39a35a16299dcb015f17f986aaa598ad8b4840c4cebe0339a7042232741",
    ("truthfulqa_mc1", "truthfulqa_mc2"): "1e07020e9cf41d46ed65312eb39d2b8e6599673d4f0d6b67c0d0eba0efb493bb",
}
QUICK = {"openbookqa"}
# All 67 of BLiMP as one list; the harness's own hash of its first part is the one below.
ADJUNCT_ISLAND = "976a5cac4bdb724632eebd4cb9e522203ce3da8d5525288a597c86e80469f3f2"


def instances(names: tuple[str, ...]) -> dict[str, list[Instance]]:
    """What is asked of the model in each task, in the order of the documents."""
    with open_tasks(list(names), DATA) as tasks:
        loaded = {}
        for name in names:
            loaded |= tasks.load(name, None)["tasks"]
        for task in loaded.values():
            task.build_all_requests(limit=None, rank=0, world_size=1)
        return {name: task.instances for name, task in loaded.items()}


def sha256(parts: list[list[Instance]]) -> str:
    """In the order of the 0.3 line, whose BLiMP had no space before a sentence that stands alone."""
    documents: dict[int, list] = {}
    for part in parts:
        for instance in part:
            arguments = list(instance.args)
            if arguments[0] == "":
                arguments[1] = arguments[1].removeprefix(" ")
            documents.setdefault(instance.doc_id, []).append(arguments)
    order = list(documents)
    shuffler = random.Random()
    shuffler.seed(42)
    shuffler.shuffle(order)
    requests = [request for index in order for request in documents[index]]
    return hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()


@needs_data
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, id=names[0], marks=[pytest.mark.slow] * (names[0] not in QUICK))
        for names in SHA256
    ],
)
def test_requests(names):
    assert sha256(list(instances(names).values())) == SHA256[names]


@needs_data
@pytest.mark.slow
def test_requests_of_blimp():
    """One of the 67 as the harness has it."""
    ((name, found),) = instances(("blimp_adjunct_island",)).items()
    assert name == "blimp_adjunct_island"
    assert sha256([found]) == ADJUNCT_ISLAND


@needs_data
@pytest.mark.slow
def test_blimp_is_all_67():
    """The group's members are those of the file, 1,000 pairs each, as their authors wrote them."""
    import lzma

    pairs: dict[str, list[str]] = {}
    with lzma.open(DATA / "blimp/blimp.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            pair = json.loads(line)
            pairs.setdefault(pair["UID"], []).extend((pair["sentence_good"], pair["sentence_bad"]))
    found = instances(("blimp",))
    assert len(pairs) == 67 and set(found) == {f"blimp_{name}" for name in pairs}
    for name, sentences in pairs.items():
        asked = [instance.args for instance in found[f"blimp_{name}"]]
        assert len(asked) == 2000
        assert asked == [("", f" {sentence}") for sentence in sentences], name
