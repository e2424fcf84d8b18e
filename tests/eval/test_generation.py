"""Tasks that ask for text: what the harness's own model writes on the exported folder, cut where it cuts."""

import pytest
from lm_eval.api.instance import Instance

from core.errors import UserError
from core.sampling import Sampling
from eval.harness import HarnessModel
from tests.eval.conftest import Made
from tests.eval.test_equality import hf_model

PROMPTS = ["Rain falls on", "seven quiet", "Q: why?\nA:", "birds carry small seeds over the long river and"]
PROMPTS += [f"{n} iron magnets pull" for n in range(2)]
TOKENS = 8


def requests(settings: dict, prompts: list[str] = PROMPTS) -> list[Instance]:
    """What a task of the kind generate_until asks."""
    return [
        Instance("generate_until", {}, (prompt, dict(settings)), number)
        for number, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="session")
def hf(made: Made):
    """The harness's own model; it writes one text at a time, so that padding plays no part."""
    return hf_model(made.folder, batch_size=1)


@pytest.fixture(params=["flax", "torched"])
def model(request, made: Made) -> HarnessModel:
    """Both of our adapters in turn."""
    return request.getfixturevalue(request.param).model


def test_greedy_text_is_the_harness_s(model, hf, made, torched):
    """Also where it begins with a space, which the harness does not have."""
    settings = {"until": [], "max_gen_toks": TOKENS}
    texts = model.generate_until(requests(settings))
    assert texts == hf.generate_until(requests(settings))
    assert all(texts) and len(set(texts)) > 1
    if made.tokenizer.name == "mistral":
        prompts = [[made.tokenizer.bos, *made.tokenizer.encode(prompt).tolist()] for prompt in PROMPTS]
        (first,) = torched.model.backend_model.stream(prompts, Sampling(temperature=0), 1, None)
        spaced = [made.tokenizer.decode([token] * 2).strip().count(" ") for token in first]
        assert any(spaced) and not all(spaced)


def test_settings_are_the_harness_s(torched, hf):
    """Stop texts, one or several; the number of tokens under each of its names."""
    model = torched.model
    whole = hf.generate_until(requests({"until": [], "max_gen_toks": TOKENS}))
    for name in ("max_new_tokens", "max_tokens"):
        assert model.generate_until(requests({"until": [], name: TOKENS})) == whole
    at = max(range(len(whole)), key=lambda i: len(whole[i]))
    stop = whole[at][3:5]
    expected = hf.generate_until(requests({"until": [stop], "max_gen_toks": TOKENS}))
    assert expected[at] == whole[at].split(stop)[0] != whole[at]
    for until in (stop, [stop], ["never there", stop]):
        assert model.generate_until(requests({"until": until, "max_gen_toks": TOKENS})) == expected


def test_a_prompt_that_is_too_long_loses_its_beginning(model, hf):
    """As many tokens stay as leave room for the new ones; it is counted."""
    long = " ".join(["seven quiet birds"] * 200)
    model.n_truncated = 0
    settings = {"until": [], "max_gen_toks": TOKENS}
    expected = hf.generate_until(requests(settings, [long, "short"]))
    assert model.generate_until(requests(settings, [long, "short"])) == expected
    assert model.n_truncated == 1


@pytest.mark.parametrize("context", ["", "Rain"])
def test_an_empty_continuation_is_refused(model, context: str):
    pair = Instance("loglikelihood", {}, (context, ""), 0)
    with pytest.raises(UserError, match="empty continuation"):
        model.loglikelihood([pair])


def test_no_room_is_refused(model):
    context = model.max_length
    with pytest.raises(UserError, match=f"asks for {context} new tokens"):
        model.generate_until(requests({"until": [], "max_gen_toks": context}))


def test_it_draws_where_it_should(torched):
    """A temperature without more means drawing, as the harness reads it; do_sample: false never draws."""
    model = torched.model
    greedy = model.generate_until(requests({"max_gen_toks": TOKENS}))
    assert model.generate_until(requests({"max_gen_toks": TOKENS, "temperature": 0.0})) == greedy
    drawn = model.generate_until(requests({"max_gen_toks": TOKENS, "temperature": 2.0}))
    assert drawn != greedy
    settings = {"max_gen_toks": TOKENS, "temperature": 2.0, "do_sample": False}
    assert model.generate_until(requests(settings)) == greedy
