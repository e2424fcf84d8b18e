"""The ops of a decoding step and the generation on them, on a CPU: against formulas written another way."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from core.config import PRESETS
from core.errors import UserError
from core.sampling import Sampling
from kernels_cuda.ops.decode_sample import uniform
from kernels_cuda.registry import reference
from port_torch import decode
from port_torch.decode_rules import why_not
from port_torch.model import Decoder, decoder_of
from port_torch.sampling import choose_generator, stream
from tests import p_values
from tests.kernels_cuda.decoding import GREEDY, SMALL, complete, random_decoder
from tests.kernels_cuda.test_ops import EPS, F64, MTLM, random

torch.set_num_threads(1)  # small products: threads only wait for each other


def normed(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.shape, norm, EPS)


def test_embedding_and_projections():
    token, position = torch.tensor([3, 0]), torch.tensor([1, 4])
    table, learned, x = random(7, 16), random(5, 16), random(2, 16)
    MTLM.decode_embed_(token, position, table, learned, x)
    torch.testing.assert_close(x, F.embedding(token, table) + F.embedding(position, learned))
    y, weight, bias, norm = random(2, 24), random(16, 24), random(16), random(16)
    expected = x + y @ weight.T + bias
    MTLM.decode_add_projection_(y, weight, bias, x)
    torch.testing.assert_close(x, expected)
    gate, up, hidden = random(8, 16), random(8, 16) + 1, random(2, 8)
    MTLM.decode_mlp_(x, norm, EPS, torch.cat([gate, up]), None, True, hidden)
    z = normed(x, norm) @ gate.T
    torch.testing.assert_close(hidden, z * torch.sigmoid(z) * (normed(x, norm) @ up.T))
    MTLM.decode_mlp_(x, norm, EPS, torch.cat([gate, up]), bias, True, hidden)
    z = z + bias[:8]
    torch.testing.assert_close(hidden, z * torch.sigmoid(z) * (normed(x, norm) @ up.T + bias[8:]))
    MTLM.decode_mlp_(x, norm, EPS, up, bias[:8], False, hidden)
    torch.testing.assert_close(hidden, F.gelu(normed(x, norm) @ up.T + bias[:8], approximate="tanh"))
    scores = random(2, 7)
    MTLM.decode_logits_(x, norm, EPS, table, scores)
    torch.testing.assert_close(scores, normed(x, norm) @ table.T)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("d", "h", "g"), [(24, 3, 3), (16, 6, 2)])
def test_a_sequence_in_steps_is_causal_attention(d: int, h: int, g: int, turned: bool, qk_norm: bool):
    """Seven positions one by one, in a cache full of NaN, against one pass over all of them."""
    b, s, k = 2, 7, 8
    rows = (h + 2 * g) * k
    x, norm, weight, bias = random(s, b, d), random(d), random(rows, d), random(rows)
    norms = random(2, k)
    angle = torch.arange(s, dtype=F64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=F64)
    cos, sin = (angle.cos(), angle.sin()) if turned else (None, None)
    caches = [torch.full((b, s, g, k), torch.nan, dtype=F64) for _ in range(2)]
    q, out, outs = random(b, h * k), random(b, h * k), []
    for at in range(s):
        position = torch.full((b,), at)
        now = (None, None) if qk_norm else (cos, sin)
        MTLM.decode_qkv_(x[at], norm, EPS, weight, bias, *now, position, q, *caches)
        if qk_norm:
            MTLM.decode_qk_norm_(*norms, EPS, cos, sin, position, q, caches[0])
        MTLM.decode_attention_(q, *caches, position, out)
        outs.append(out.clone())
    qkv = (normed(x, norm) @ weight.T + bias).view(s, b, -1, k).permute(1, 2, 0, 3)
    queries, keys, values = qkv[:, :h], qkv[:, h : h + g], qkv[:, h + g :]
    if qk_norm:
        queries, keys = normed(queries, norms[0]), normed(keys, norms[1])
    if turned:
        turn = torch.polar(torch.ones_like(angle), angle)

        def rotate(t: torch.Tensor) -> torch.Tensor:
            y = torch.complex(t[..., :4], t[..., 4:]) * turn
            return torch.cat([y.real, y.imag], -1)

        queries, keys = rotate(queries), rotate(keys)
    torch.testing.assert_close(caches[0].transpose(1, 2), keys)
    keys, values = (t.repeat_interleave(h // g, dim=1) for t in (keys, values))
    weights = (queries @ keys.mT / k**0.5 + torch.full((s, s), -torch.inf, dtype=F64).triu(1)).softmax(-1)
    expected = (weights @ values).permute(2, 0, 1, 3).reshape(s, b, h * k)
    torch.testing.assert_close(torch.stack(outs), expected)


def test_random_numbers_are_philox():
    """The first words of the zero key and counter, as the paper's authors publish them."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = (uniform(zero[0], zero, zero, 4)[0] - 2**-33) * 2**32
    assert words.long().tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    row, position = torch.tensor([5, 6]), torch.tensor([9, 9])
    numbers = uniform(torch.tensor(2**32 - 1), row, position, 4001)
    assert p_values.uniform(numbers.flatten().numpy()) > 1e-4
    alone = uniform(torch.tensor(2**32 - 1), row[1:], position[1:], 4001)
    assert torch.equal(numbers[1:], alone) and not torch.equal(numbers[0], numbers[1])


def drawn(scores: torch.Tensor, sampling: Sampling, n: int, first_row: int = 0) -> torch.Tensor:
    """n draws from the same scores: those of n rows."""
    token, position = torch.zeros(2, n, dtype=torch.int64).unbind()
    real = torch.tensor([sampling.temperature, sampling.top_p])
    whole = torch.tensor([sampling.top_k, sampling.seed, first_row])
    MTLM.decode_sample_(scores.expand(n, -1).contiguous(), real, whole, 99, position, token)
    assert (position == 1).all()
    return token


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8), (1, 1.0), (0, 1e-6)])
def test_draws_follow_the_distribution(top_k: int, top_p: float):
    scores = random(9).float() * 2
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, seed=3)
    p = (scores.double() / 0.7).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept, before = [], 0.0
    total = p[order[: top_k or None]].sum().item()
    for token in order[: top_k or None]:
        if before < top_p * total:
            kept.append(token)
        before += p[token].item()
    counts = drawn(scores, sampling, 5000).bincount(minlength=9)
    assert counts[[token for token in range(9) if token not in kept]].sum() == 0
    if len(kept) > 1:
        expected = p[kept] / p[kept].sum() * 5000
        assert p_values.chi_square(counts[kept].numpy(), expected.numpy()) > 1e-4


def test_greedy_ties_and_the_last_position():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, -1.0]])
    token, position = torch.zeros(2, dtype=torch.int64), torch.tensor([7, 8])
    MTLM.decode_sample_(scores, torch.tensor([0.0, 1.0]), torch.tensor([0, 0, 0]), 8, position, token)
    assert token.tolist() == [1, 0] and position.tolist() == [8, 8]
    draws = drawn(scores[0], Sampling(top_k=1, temperature=1.0), 500)  # both of equal probability are kept
    assert set(draws.tolist()) == {1, 2}


CONTRACTS = ("test_schema", "test_faketensor")  # nothing of a step is differentiated or compiled


def test_ops_keep_pytorchs_contracts():
    x, y, wide = random(2, 16).float(), random(2, 16).float(), random(2, 24).float()
    norm, square = random(16).float(), random(16, 16).float()
    caches = [random(2, 5, 2, 8).float(), random(2, 5, 2, 8).float() + 1]
    cos, sin = (random(5, 4).float() + i for i in range(2))
    at, token = torch.tensor([1, 4]), torch.tensor([0, 3])
    cases = {
        "decode_embed_": (token, at, random(4, 16).float(), None, x),
        "decode_qkv_": (x, norm, EPS, random(48, 16).float(), None, cos, sin, at, y, *caches),
        "decode_qk_norm_": (random(8).float(), norm[:8], EPS, cos, sin, at, wide[:, :16], caches[0]),
        "decode_attention_": (x, *caches, at, y),
        "decode_add_projection_": (wide, random(16, 24).float(), norm, x),
        "decode_mlp_": (x, norm, EPS, square, None, False, y),
        "decode_logits_": (x, norm, EPS, square, y),
        "decode_sample_": (x, torch.tensor([0.5, 0.9]), torch.tensor([3, 0, 0]), 9, at, token),
    }
    assert set(cases) == {name for name in vars(reference) if name.startswith("decode_")}
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(MTLM, name).default, arguments, test_utils=CONTRACTS)


@pytest.mark.parametrize("kind", SMALL)
def test_greedy_text_is_the_mirrors(kind: str):
    model = random_decoder(SMALL[kind], torch.float64)
    prompts = [[1], list(range(2, 30)), [5, 6, 7], [8] * 17]
    eos = complete(stream(model, prompts, GREEDY, 20))[1][12]
    for end in (None, eos):
        expected = complete(stream(model, prompts, GREEDY, 1000, end))
        generator = decode.Generator(model)
        assert complete(generator.stream(prompts, GREEDY, 1000, end)) == expected
        assert complete(generator.stream(prompts[1:3], GREEDY, 1000, end)) == expected[1:3]  # used again


def test_a_row_draws_alike_in_any_batch(monkeypatch: pytest.MonkeyPatch):
    model = random_decoder(SMALL["gpt"], torch.float64)
    prompts = [[token] for token in range(7)]
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.95)
    together = complete(decode.Generator(model).stream(prompts, sampling, 12))
    monkeypatch.setattr(decode, "MOST_ROWS", 3)
    assert complete(decode.Generator(model).stream(prompts, sampling, 12)) == together
    for row, prompt in enumerate(prompts):
        alone = decode.Generator(model).stream([prompt], sampling, 12, None, row)
        assert complete(alone) == [together[row]]
    again = dataclasses.replace(sampling, seed=1)
    assert complete(decode.Generator(model).stream(prompts, again, 12)) != together


def test_packing_changes_no_weight_and_takes_no_memory():
    model = random_decoder(SMALL["llama"], torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = decode.Generator(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    storage = generator.layers[0].qkv.untyped_storage().data_ptr()
    assert model.layers[0].attn.v.weight.untyped_storage().data_ptr() == storage


def test_only_the_last_requests_steps_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "MOST_ROWS", 3)
    generator = decode.Generator(random_decoder(SMALL["gpt"], torch.float64))
    for batch, kept in ((1, {(0, 1)}), (7, {(0, 3), (3, 3), (6, 1)}), (4, {(0, 3), (3, 1)})):
        before = dict(generator.steps)
        complete(generator.stream([[1]] * batch, GREEDY, 2))
        assert set(generator.steps) == kept
        assert all(generator.steps[key] is before[key] for key in kept & before.keys())


def test_room_for_prompts_is_as_long_as_they_have_been(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 16)
    model = random_decoder(SMALL["grouped"], torch.float64)
    generator = decode.Generator(model)
    for length, room, widths in ((3, 16, {16}), (20, 32, {32}), (3, 32, {16, 32}), (40, 48, {48})):
        prompts = [list(range(1, 1 + length)), [5]]
        expected = complete(stream(model, prompts, GREEDY, 4))
        assert complete(generator.stream(prompts, GREEDY, 4)) == expected
        assert generator.room.k.shape[2] == room and widths <= generator.passes.keys()


def test_where_the_kernels_cannot_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    model = random_decoder(SMALL["llama"], torch.float32)
    assert choose_generator(model, "torch") is None and choose_generator(model, "auto") is None
    assert capsys.readouterr().err == ""  # a CPU has no choice
    with pytest.raises(UserError, match="cannot use --backend cuda: the model is on the device cpu"):
        choose_generator(model, "cuda")
    with pytest.raises(UserError, match="the prompt has no tokens"):
        next(decode.Generator(model).stream([[]], GREEDY, 1))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert why_not(model) == "the weights are float32, not bfloat16 (embed.weight)"
    assert "decoding: plain PyTorch, because" in (choose_generator(model, "auto"), capsys.readouterr())[1].err
    model = model.bfloat16()
    model.config = dataclasses.replace(model.config, n_heads=1)
    assert why_not(model) is None
    for change, said in (({"n_heads": 8}, "head size is 8"), ({"n_heads": 2, "d_mlp": 84}, "d_mlp is 84")):
        model.config = dataclasses.replace(model.config, **change)
        assert said in why_not(model)


def test_the_presets_fit_the_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with torch.device("meta"):
        for name, config in PRESETS.items():
            assert why_not(Decoder(config).bfloat16()) is None, name


def test_angles_of_a_table_are_those_of_positions():
    for config in SMALL["llama"], SMALL["grouped"]:
        model = Decoder(config)
        table = model.rotary_angles(torch.arange(40)[None])
        one = model.rotary_angles(torch.tensor([[17]]))
        assert all(torch.equal(a[0, 17], b[0, 0]) for a, b in itertools.zip_longest(table, one))


def test_scaled_positions_are_no_weights_and_keep_their_float32():
    """As what a model is loaded, moved, cast and compared by: its parameters alone."""
    plain = dataclasses.replace(SMALL["grouped"], rope_scaling=None)
    model, positions = Decoder(SMALL["grouped"]), torch.arange(40)[None]
    assert model.state_dict().keys() == Decoder(plain).state_dict().keys()
    angles = model.rotary_angles(positions)
    assert not torch.equal(angles[0], Decoder(plain).rotary_angles(positions)[0])
    for other in (copy.deepcopy(model).bfloat16(), decoder_of(model.config, model.state_dict()).double()):
        assert all(torch.equal(a, b) for a, b in zip(angles, other.rotary_angles(positions), strict=True))
