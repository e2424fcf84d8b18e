"""A tokenizer without bos, and more embeddings than it has ids, as Qwen has: the harness's `hf` model."""

import dataclasses

import pytest
from lm_eval.api.instance import Instance

from eval.harness import HarnessModel
from eval.models import describe, open_model
from eval.perplexity import measure
from tests.core.test_special_tokens import CHAT
from tests.core.test_tokenizer import bpe_file
from tests.eval.conftest import KINDS, Made, make
from tests.eval.test_equality import LOGPROB, hf_model

PAIRS = [("Rain falls", " on the mat"), ("", "the cat"), (" ", "sat"), ("the dog ", "did not")]
TEXTS = ["the cat sat on the mat", "", "x" * 700]  # the last is longer than the context


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("qwen")
    name = f"{bpe_file(folder, CHAT)},bos=none,eos=<|im_end|>"
    return make(folder, "llama", dataclasses.replace(KINDS["llama"][0], vocab_size=400), name)


def requests(kind: str, arguments: list) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.mark.slow
def test_scores_are_the_harness_s(qwen):
    """Nothing stands before a text; eos stands where there is no context, and is not scored itself."""
    assert qwen.tokenizer.vocab_size < qwen.config.vocab_size
    hf = hf_model(qwen.folder, batch_size=1)
    for path, device in ((qwen.run, "auto"), (qwen.folder, "cpu")):
        opened = open_model(path, "float32", device)
        model = HarnessModel(opened.backend, opened.tokenizer)
        assert "nothing before every text" in describe(opened, "float32")
        assert (model.prefix_token_id, model.eot_token_id) == (hf.prefix_token_id, hf.eot_token_id) == (2, 2)
        assert [model.tok_encode(text) for text in TEXTS] == [hf.tok_encode(text) for text in TEXTS]
        pairs = [
            pair for pair in PAIRS if pair[0] != " "
        ]  # of which theirs makes no context at all, and fails
        found, expected = (one.loglikelihood(requests("loglikelihood", pairs)) for one in (model, hf))
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=LOGPROB)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert len(model.loglikelihood(requests("loglikelihood", PAIRS))) == len(PAIRS)
        rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS if text])
        found = model.loglikelihood_rolling(rolling)
        # Of hundreds of tokens, whose errors add up.
        assert found == pytest.approx(hf.loglikelihood_rolling(rolling), abs=10 * LOGPROB)
        assert model.bos_nats == 0
        texts = [(text, {"until": [], "max_gen_toks": 4, "do_sample": False}) for text in TEXTS[:1]]
        asked = requests("generate_until", texts)
        assert model.generate_until(asked) == hf.generate_until(asked)
        (alone,) = model.generate_until(requests("generate_until", [("", texts[0][1])]))
        assert isinstance(alone, str)
        # Every token of the text is scored, the first behind eos.
        per_token = measure(opened.backend, opened.tokenizer, TEXTS[0], stride=8)["token_disjoint"]
        assert per_token["tokens"] == len(opened.tokenizer.encode(TEXTS[0]))
        assert -per_token["nats"] == pytest.approx(found[0], abs=LOGPROB)
