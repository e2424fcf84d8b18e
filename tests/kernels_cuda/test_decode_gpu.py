"""The decode kernels on a GPU: the proof list op by op, then whole steps, graphs and texts."""

import copy
import dataclasses
import itertools

import pytest
import scipy.stats
import torch
from torch import Tensor

from core.config import PRESETS
from core.sampling import Sampling
from kernels_cuda.registry import reference
from port_torch import decode
from port_torch.model import Decoder
from port_torch.sampling import choose_generator
from tests.kernels_cuda.decoding import GREEDY, SMALL, complete, random_decoder
from tests.kernels_cuda.gpu import POISON, Guarded, assert_as_good, assert_equal_bits, run_twice, wide

pytestmark = pytest.mark.gpu

EPS = 1e-6
BF16 = torch.bfloat16
BATCHES = (1, 2, 7, 8, 9, 16, 17, 33, 63, 64)
# d_model, d_mlp: the presets', the small ones', no multiples of 32 or 16, and more columns than one turn has.
SIZES = {"200m": (768, 2176), "40m": (384, 1024), "tiny": (128, 384), "odd": (40, 72), "wide": (1536, 1032)}
MTLM = torch.ops.mtlm


def bf16(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale + around).to(BF16)


def settle() -> None:
    """What the step's kernels read ahead was written long before, in a step; here it must be waited for."""
    torch.cuda.synchronize()


def judge(op: str, arguments: list, written: list[int], what: str) -> list[Tensor]:
    """Runs an op on guarded copies of what it writes, twice, and beside plain PyTorch and float64."""
    guard = Guarded()

    def run(function, given: list, copies) -> list[Tensor]:
        given = [copies(i, t) if i in written else t for i, t in enumerate(given)]
        settle()
        function(*given)
        return [given[i] for i in written]

    got = run_twice(
        lambda: run(getattr(MTLM, op), arguments, lambda i, t: guard.like(t, keep=not t.isnan().all()))
    )
    guard.check()
    plain = run(getattr(reference, op), arguments, lambda i, t: t.clone())
    exact = run(
        getattr(reference, op),
        [wide(a)[0] if isinstance(a, Tensor) else a for a in arguments],
        lambda i, t: t.clone(),
    )
    assert_as_good(got, plain, exact, f"{op} {what}")
    return got


@pytest.mark.parametrize("size", SIZES)
def test_products_at_every_batch(size: str):
    d, f = SIZES[size]
    norm, bias = bf16(d, scale=0.3, around=1), bf16(max(d, 2 * f))
    gate_up, down = bf16(2 * f, d, scale=d**-0.5), bf16(d, f, scale=f**-0.5)
    head = bf16(1003, d, scale=d**-0.5)
    for batch in BATCHES:
        x, h = bf16(batch, d, scale=3), bf16(batch, f)
        x[:, 0] *= 30  # outliers, as residual streams have them
        nothing = {
            width: torch.full((batch, width), POISON, device="cuda", dtype=BF16) for width in (f, 1003)
        }
        what = f"{size}, batch {batch}"
        judge("decode_add_projection_", [h, down, bias[:d].clone(), x], [3], what)
        judge("decode_add_projection_", [h, down, None, x], [3], what)
        judge("decode_mlp_", [x, norm, EPS, gate_up, None, True, nothing[f]], [6], what)
        judge("decode_mlp_", [x, norm, EPS, gate_up, bias[: 2 * f].clone(), True, nothing[f]], [6], what)
        judge("decode_mlp_", [x, norm, EPS, gate_up[:f], bias[:f].clone(), False, nothing[f]], [6], what)
        judge("decode_logits_", [x, norm, EPS, head, nothing[1003].float()], [4], what)


# d_model, heads, heads of keys and values, head size: the presets', smaller ones, one that all share.
HEADS = {
    "200m": (768, 12, 12, 64),
    "40m": (384, 6, 6, 64),
    "two of 128": (256, 2, 2, 128),
    "three of 32": (96, 3, 3, 32),
    "one of 16": (16, 1, 1, 16),
    "smollm2-135m": (576, 9, 3, 64),
    "smollm2-360m": (960, 15, 5, 64),
    "qwen3-0.6b": (1024, 16, 8, 128),
    "shared by all": (40, 7, 1, 32),
}


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_qkv_and_the_cache(name: str, rotary: bool):
    d, heads, kv_heads, k = HEADS[name]
    length, rows = 70, (heads + 2 * kv_heads) * k
    norm, weight, bias = bf16(d, around=1), bf16(rows, d, scale=d**-0.5), bf16(rows)
    angle = torch.rand(length, k // 2, device="cuda") * 6
    angles = (angle.cos(), angle.sin()) if rotary else (None, None)
    for batch in BATCHES:
        x, position = bf16(batch, d), torch.randint(length, (batch,), device="cuda")
        q = torch.full((batch, heads * k), POISON, device="cuda", dtype=BF16)
        caches = [bf16(batch, length, kv_heads, k) for _ in range(2)]
        judge(
            "decode_qkv_", [x, norm, EPS, weight, None, *angles, position, q, *caches], [8, 9, 10], "no bias"
        )
        arguments = [x, norm, EPS, weight, bias, *angles, position, q, *caches]
        got = judge("decode_qkv_", arguments, [8, 9, 10], f"{name}, batch {batch}")
        assert_only_written_at(position, caches, got[1:])


def assert_only_written_at(position: Tensor, caches: list[Tensor], after: list[Tensor]) -> None:
    batch, length = caches[0].shape[:2]
    other = torch.ones(batch, length, dtype=torch.bool, device="cuda")
    other[torch.arange(batch), position] = False
    for cache, written in zip(caches, after, strict=True):
        assert torch.equal(cache[other], written[other])


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("name", [name for name, (*_, k) in HEADS.items() if k >= 32])
def test_norm_of_queries_and_keys(name: str, rotary: bool):
    _, heads, kv_heads, k = HEADS[name]
    length, norms = 70, [bf16(k, scale=0.3, around=1) for _ in range(2)]
    angle = torch.rand(length, k // 2, device="cuda") * 6
    angles = (angle.cos(), angle.sin()) if rotary else (None, None)
    for batch in BATCHES:
        position = torch.randint(length, (batch,), device="cuda")
        q, keys = bf16(batch, heads * k, scale=3), bf16(batch, length, kv_heads, k, scale=3)
        q[:, :k] *= 1e-3  # a head whose squares are about eps
        arguments = [*norms, EPS, *angles, position, q, keys]
        got = judge("decode_qk_norm_", arguments, [6, 7], f"{name}, batch {batch}")
        assert_only_written_at(position, [keys], got[1:])


@pytest.mark.parametrize("name", [name for name, (*_, k) in HEADS.items() if k >= 32])
def test_attention_over_every_length(name: str):
    _, heads, kv_heads, k = HEADS[name]
    length = 1024
    positions = (
        0,
        1,
        2,
        3,
        15,
        16,
        31,
        62,
        63,
        64,
        65,
        127,
        128,
        255,
        256,
        257,
        300,
        511,
        512,
        700,
        1022,
        1023,
    )
    for batch in (1, 3, 22, 64):
        caches = [bf16(batch, length, kv_heads, k) for _ in range(2)]
        for first in range(0, len(positions), batch):
            position = torch.tensor([positions[(first + i) % len(positions)] for i in range(batch)]).cuda()
            hidden = torch.arange(length, device="cuda") > position[:, None]
            for cache in caches:
                cache[hidden] = POISON
            q, out = bf16(batch, heads * k), torch.full((batch, heads * k), POISON, device="cuda", dtype=BF16)
            given = [q, *caches, position, out]
            got = judge("decode_attention_", given, [4], f"positions {position.tolist()}")
            # As if every head of queries had keys and values of its own.
            repeated = [cache.repeat_interleave(heads // kv_heads, dim=2) for cache in caches]
            settle()
            MTLM.decode_attention_(q, *repeated, position, out)
            assert_equal_bits(got, [out])
            for cache in caches:
                cache[hidden] = 0.5


def test_attention_of_large_scores():
    q, k, v = bf16(2, 128, scale=40), bf16(2, 300, 2, 64, scale=40), bf16(2, 300, 2, 64)
    out = torch.full((2, 128), POISON, device="cuda", dtype=BF16)
    judge("decode_attention_", [q, k, v, torch.tensor([299, 5]).cuda(), out], [4], "large")


@pytest.mark.parametrize("name", ["200m", "40m", "wide", "smollm2-135m", "smollm2-360m", "qwen3-0.6b"])
def test_a_row_does_not_depend_on_the_batch(name: str):
    d, heads, kv_heads, size = HEADS.get(name, (1536, 24, 24, 64))
    f = SIZES[name][1] if name in SIZES else PRESETS[name].d_mlp
    length, batch, width = 300, 64, heads * size
    norm, up = bf16(d, around=1), bf16(2 * f, d, scale=0.05)
    qkv, norms = bf16(width + 2 * kv_heads * size, d, scale=0.05), [bf16(size, around=1) for _ in range(2)]
    o, head = bf16(d, width, scale=0.05), bf16(2000, d, scale=0.05)
    x, position = bf16(batch, d), torch.randint(length, (batch,), device="cuda")
    caches = [bf16(batch, length, kv_heads, size) for _ in range(2)]
    angles = torch.rand(length, size // 2, device="cuda") * 6
    cos, sin = angles.cos(), angles.sin()

    def step(rows: slice) -> list[Tensor]:
        given, at = x[rows].clone(), position[rows].clone()
        q, y, h = (given.new_empty(len(given), n) for n in (width, width, f))
        k, v = (cache[rows].clone() for cache in caches)
        scores = torch.empty(len(given), 2000, device="cuda")
        settle()
        MTLM.decode_qkv_(given, norm, EPS, qkv, None, cos, sin, at, q, k, v)
        MTLM.decode_qk_norm_(*norms, EPS, cos, sin, at, q, k)
        MTLM.decode_attention_(q, k, v, at, y)
        MTLM.decode_add_projection_(y, o, None, given)
        MTLM.decode_mlp_(given, norm, EPS, up, None, True, h)
        MTLM.decode_logits_(given, norm, EPS, head, scores)
        return [q, k, v, y, given, h, scores]

    of_all = step(slice(None))
    for size in (1, 5, 8, 12, 30, 50):
        rows = slice(64 - size, 64)
        assert_equal_bits([t[rows].contiguous() for t in of_all], step(rows))


def draw(scores: Tensor, sampling: Sampling, first_row: int = 0, at: int = 0) -> Tensor:
    batch = len(scores)
    token, position = torch.zeros(2, batch, dtype=torch.int64, device="cuda").unbind()
    position += at
    real = torch.tensor([sampling.temperature, sampling.top_p], device="cuda")
    whole = torch.tensor([sampling.top_k, sampling.seed, first_row], device="cuda")
    MTLM.decode_sample_(scores, real, whole, 999, position, token)
    assert (position == min(at + 1, 999)).all()
    return token


DRAWS = [
    Sampling(temperature=0),
    Sampling(temperature=1.0, seed=2**32 - 1),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=0.8, top_k=100, top_p=0.5),
    Sampling(temperature=0.5, top_k=1),
    Sampling(temperature=0.3, top_p=0.9),  # among the candidates, without top-k
    Sampling(temperature=0.8, top_k=256, top_p=0.95),  # the most that candidates serve
    Sampling(temperature=0.8, top_k=257, top_p=0.95),
    Sampling(temperature=0.8, top_k=2000),
]


@pytest.mark.parametrize("sampling", DRAWS, ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 97, 4096, 32000, 32001, 50257, 65536, 151936])
@pytest.mark.parametrize("grid", [0, 0.25, 2])
def test_draws_are_the_references(vocab: int, sampling: Sampling, grid: float):
    """Also of scores on a grid: with few or very many equal ones at the cut."""
    scores = torch.randn(64, vocab, device="cuda") * 3
    if grid:
        scores = (scores / grid).round() * grid
    got = run_twice(lambda: [draw(scores, sampling, 7, 30)])[0]
    with torch.device("cuda"):
        real = torch.tensor([sampling.temperature, sampling.top_p])
        whole = torch.tensor([sampling.top_k, sampling.seed, 7])
        token, position = torch.zeros(64, dtype=torch.int64), torch.full((64,), 30)
        reference.decode_sample_(scores.double(), real, whole, 999, position, token)
    # p / E of the first two may be nearer than float32 tells: less than one row in a hundred thousand.
    assert (got != token).sum() <= (0 if sampling.temperature == 0 else 1)
    assert torch.equal(draw(scores[5:6].clone(), sampling, 12, 30), got[5:6])


def test_draws_from_rows_with_few_or_neighbouring_tokens():
    """Candidates of one thread, more than fit, and rows where only some tokens can come at all."""
    scores = torch.full((64, 32000), -torch.inf, device="cuda")
    scores[:16, 500:504] = torch.randn(16, 4, device="cuda")
    scores[16:32, :3000] = torch.randn(16, 3000, device="cuda")
    scores[32:48, ::512] = 1.5
    scores[48:] = torch.linspace(0, 5, 32000, device="cuda")
    for sampling in DRAWS[1:]:
        with torch.device("cuda"):
            real = torch.tensor([sampling.temperature, sampling.top_p])
            whole = torch.tensor([sampling.top_k, sampling.seed, 0])
            token, position = torch.zeros(64, dtype=torch.int64), torch.full((64,), 30)
            reference.decode_sample_(scores.double(), real, whole, 999, position, token)
        assert (draw(scores, sampling, 0, 30) != token).sum() <= 1


@pytest.mark.parametrize("vocab", [3, 97, 32000, 32001, 65536, 262144])
@pytest.mark.parametrize(
    "sampling", [GREEDY, *DRAWS[1:5], Sampling(temperature=1e-7, top_k=5, top_p=0.5)], ids=str
)
def test_whatever_the_scores_a_token_of_the_vocabulary_comes(vocab: int, sampling: Sampling):
    scores = torch.randn(6, vocab, device="cuda")
    scores[0] = torch.nan
    scores[1, vocab // 2] = torch.nan
    scores[2] = scores[4] = -torch.inf
    scores[3, -1] = torch.inf
    scores[4, -1] = 0.0
    tokens = draw(scores, sampling).tolist()
    assert all(0 <= token < vocab for token in tokens)
    assert tokens[3] == tokens[4] == vocab - 1


def test_greedy_takes_the_first_of_equals():
    scores = torch.zeros(64, 32000, device="cuda")
    scores[:, [77, 5000, 31999]] = 4.0
    assert (draw(scores, GREEDY) == 77).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8)])
def test_draws_follow_the_distribution(top_k: int, top_p: float):
    scores = torch.randn(9, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, seed=5)
    rows = scores.cuda().expand(64, -1).contiguous()
    counts = sum(
        draw(rows, sampling, first, 3).bincount(minlength=9) for first in range(0, 64 * 400, 64)
    ).cpu()
    p = (scores.double() / 0.7).softmax(0)
    order = p.argsort(descending=True)[: top_k or None]
    before = p[order].cumsum(0) - p[order]
    kept = order[before < top_p * p[order].sum()]
    assert len(kept) > 1 and counts.sum() == counts[kept].sum() == 64 * 400
    expected = p[kept] / p[kept].sum() * counts.sum()
    assert scipy.stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4


MODELS = {
    "small llama": SMALL["llama"],
    "biased llama": dataclasses.replace(SMALL["llama"], biases=True),
    "small gpt": SMALL["gpt"],
    "small grouped": SMALL["grouped"],
    "small qwen2": dataclasses.replace(
        SMALL["llama"], d_model=56, n_heads=7, n_kv_heads=1, head_dim=32, qkv_biases=True
    ),
    "small llama3": dataclasses.replace(
        SMALL["llama"], n_heads=4, n_kv_heads=2, head_dim=128, vocab_size=128_256,
        rope_scaling="llama3,factor=32,low_freq_factor=1,high_freq_factor=4,original_context=16",
    ),
    "200m": dataclasses.replace(PRESETS["mtlm1-200m"], context=512),
    "40m": dataclasses.replace(PRESETS["mtlm2-40m"], context=512),
    "smollm2-135m": dataclasses.replace(PRESETS["smollm2-135m"], context=512),
    "qwen3-0.6b": dataclasses.replace(
        PRESETS["qwen3-0.6b"], context=512, n_layers=6, rope_scaling="yarn,factor=4,original_context=256"
    ),
}  # fmt: skip


def gpu_decoder(kind: str) -> Decoder:
    """Of random weights, whose scores differ enough to be told apart in bfloat16."""
    config = MODELS[kind]
    return random_decoder(config, BF16, "cuda", std=0.2 if config.d_model < 100 else 0.05)


def prompts_of(model: Decoder, batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    vocab = model.config.vocab_size
    return [torch.randint(vocab, (1 + 5 * i % 31,), generator=generator).tolist() for i in range(batch)]


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_the_step_is_as_exact_as_pytorchs(kind: str):
    """Scores of one step behind a prompt: the kernels, the mirror in bfloat16, the mirror in float64."""
    model = gpu_decoder(kind)
    exact_model = copy.deepcopy(model).double()
    batch, n = 3, 40
    tokens = torch.randint(model.config.vocab_size, (batch, n + 1), device="cuda")

    def mirrored(m: Decoder) -> tuple[Tensor, decode.KVCache]:
        cache = m.empty_cache(batch, 128)
        positions = torch.arange(n, device="cuda").expand(batch, -1)
        m(tokens[:, :n], positions, cache)
        before = decode.KVCache(*(t.clone() for t in cache))
        hidden = m(tokens[:, n:], torch.full((batch, 1), n, device="cuda"), cache)
        return torch.nn.functional.linear(hidden[:, 0], m.table), before

    exact, _ = mirrored(exact_model)
    plain, cache = mirrored(model)
    step = decode.Step(model, decode.layers_of(model), batch, 128)
    for graph in (step.graph, None):
        step.graph = graph
        for ours, theirs in zip(step.cache, cache, strict=True):
            ours.fill_(POISON)
            ours[:, :, :n] = theirs[:, :, :n]
        step.position.fill_(n)
        step.token.copy_(tokens[:, n])
        settle()
        step.run()
        scores = step.scores.clone()
        assert_as_good([scores], [plain.float()], [exact.float()], kind)
        if graph is not None:
            replayed, with_graph = scores, [t.clone() for t in step.cache]
    assert_equal_bits([scores, *step.cache], [replayed, *with_graph])


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_pytorchs_up_to_rounding(kind: str):
    """At each token the float64 model likes the chosen one as well as its best, up to bfloat16's error."""
    model = gpu_decoder(kind)
    exact_model = copy.deepcopy(model).double()
    prompts = prompts_of(model, 5)
    texts = complete(decode.Generator(model).stream(prompts, GREEDY, 60))
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == min(60, model.config.context - len(prompt))
        with torch.inference_mode():
            tokens = torch.tensor([prompt + text[:-1]], device="cuda")
            exact = torch.nn.functional.linear(exact_model(tokens)[0], exact_model.table)[len(prompt) - 1 :]
            plain = torch.nn.functional.linear(model(tokens)[0], model.table)[len(prompt) - 1 :]
        spread = (plain.double() - exact).pow(2).mean().sqrt()
        chosen = exact.gather(1, torch.tensor(text, device="cuda")[:, None])[:, 0]
        # Two scores, each off by up to 5 standard deviations.
        assert (exact.amax(-1) - chosen).max() <= 10 * spread
        assert (exact.argmax(-1).tolist() == text) or spread > 0


@pytest.mark.parametrize("kind", ["40m", "qwen3-0.6b"])
@torch.inference_mode()
def test_the_prompts_graph_is_the_mirror_to_the_bit(kind: str):
    """Widths captured in one pool, each replayed behind the others: the same kernels, the same bits.

    The scores are float32 sums, as those of later tokens are, and not rounded to bfloat16 in between.
    """
    model = gpu_decoder(kind)
    generator = decode.Generator(model)
    step = decode.Step(model, generator.layers, 6, 256)
    texts = [[prompt * (1 + 9 * i) for i in range(6)] for prompt in ([3], [5], [7, 11, 2])]
    assert len({decode.prefill_width(len(text), model.config) for text in texts[0]}) >= 3
    for prompts in [*texts, *texts]:
        for t in (*step.cache, step.scores):
            t.fill_(POISON)
        generator.read_prompts(prompts, step)
        for row, prompt in enumerate(prompts):
            width, n = decode.prefill_width(len(prompt), model.config), len(prompt)
            rows = decode.PREFILL_TOKENS // width
            ids = torch.zeros(rows, width, dtype=torch.int64, device="cuda")
            same_width = [p for p in prompts if decode.prefill_width(len(p), model.config) == width]
            ids[same_width.index(prompt), :n] = torch.tensor(prompt, device="cuda")
            cache = model.empty_cache(rows, width)
            parts = model.residual(ids, torch.arange(width, device="cuda").expand(rows, -1), cache)
            at = same_width.index(prompt)
            x, branch = (part[:, n - 1].contiguous() for part in parts)
            scores = x.new_empty(rows, model.config.vocab_size, dtype=torch.float32)
            settle()
            MTLM.decode_logits_(x + branch, model.norm.weight, model.config.norm_eps, model.table, scores)
            assert not torch.equal(scores, scores.bfloat16().float())
            expected = [scores[at], *(t[:, at, :n].contiguous() for t in cache)]
            assert_equal_bits(expected, [step.scores[row], *(t[:, row, :n].contiguous() for t in step.cache)])
        assert step.position.tolist() == [len(prompt) - 1 for prompt in prompts]


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_does_not_depend_on_the_batch(kind: str):
    model = gpu_decoder(kind)
    generator = decode.Generator(model)
    prompts = prompts_of(model, 70)  # more than one step takes
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=1)):
        together = complete(generator.stream(prompts, sampling, 16))
        assert complete(generator.stream(prompts, sampling, 16)) == together
        for first, count in ((0, 1), (3, 1), (3, 4), (20, 11), (64, 6)):
            part = generator.stream(prompts[first : first + count], sampling, 16, None, first)
            assert complete(part) == together[first : first + count]


def test_rows_end_and_caches_grow():
    model = gpu_decoder("small llama")
    generator = decode.Generator(model)
    prompts = prompts_of(model, 4)
    whole = complete(generator.stream(prompts, GREEDY, 1000))
    assert [len(text) for text in whole] == [model.config.context - len(prompt) for prompt in prompts]
    assert complete(generator.stream(prompts, GREEDY, 3)) == [text[:3] for text in whole]
    eos = whole[1][4]
    cut = [text[: text.index(eos)] if eos in text else text for text in whole]
    assert complete(generator.stream(prompts, GREEDY, 1000, eos)) == cut


def test_longer_prompts_later_are_as_at_once(monkeypatch: pytest.MonkeyPatch):
    """Their pass needs more room, and graphs of shorter ones are captured again."""
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 16)
    model = gpu_decoder("small grouped")
    short, long = [[3, 1], [4, 1, 5]], [list(range(1, 41)), [5]]
    expected = [complete(decode.Generator(model).stream(prompts, GREEDY, 8)) for prompts in (short, long)]
    generator = decode.Generator(model)
    for _ in range(2):
        assert [complete(generator.stream(prompts, GREEDY, 8)) for prompts in (short, long)] == expected


def test_many_replays_give_the_same_bits():
    """A kernel that read before its predecessor had written would differ sooner or later."""
    model = gpu_decoder("200m")
    step = decode.Step(model, decode.layers_of(model), 1, 256)
    first = None
    for _ in range(5):
        step.position.zero_()
        step.token.fill_(1)
        for cache in step.cache:
            cache.fill_(POISON)
        tokens = [step.token.clone() for _ in range(100) if step.run() is None]
        result = [torch.stack(tokens), *(cache[:, :, :100].clone() for cache in step.cache)]
        assert not any(t.isnan().any() for t in result[1:])
        if first is not None:
            assert_equal_bits(first, result)
        first = result


def test_on_another_stream():
    model = gpu_decoder("small gpt")
    prompts = prompts_of(model, 3)
    expected = complete(decode.Generator(model).stream(prompts, GREEDY, 20))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert complete(decode.Generator(model).stream(prompts, GREEDY, 20)) == expected


@pytest.mark.two_gpus
@pytest.mark.parametrize("kind", ["small llama", "small gpt"])
def test_on_a_gpu_that_is_not_the_current_one(kind: str):
    model = gpu_decoder(kind)
    prompts = prompts_of(model, 6)
    here, there = decode.Generator(model), decode.Generator(copy.deepcopy(model).to("cuda:1"))
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=1)):
        expected = complete(here.stream(prompts, sampling, 20))
        assert complete(there.stream(prompts, sampling, 20)) == expected
        assert torch.cuda.current_device() == 0


def test_chosen_where_it_fits():
    model = gpu_decoder("small llama")
    assert isinstance(choose_generator(model, "auto"), decode.Generator)
    assert isinstance(choose_generator(model, "cuda"), decode.Generator)
    assert choose_generator(model.float(), "auto") is None


@pytest.mark.parametrize("kind", ["small llama", "small llama3"])
def test_angles_are_those_of_the_mirror(kind: str):
    model = gpu_decoder(kind)
    table = model.rotary_angles(torch.arange(128, device="cuda")[None])
    alone = model.rotary_angles(torch.tensor([[99]], device="cuda"))
    assert all(torch.equal(a[0, 99], b[0, 0]) for a, b in itertools.zip_longest(table, alone))


def test_bad_inputs_are_refused_with_the_numbers():
    x, norm, weight = bf16(4, 64), bf16(64), bf16(80, 64)
    with pytest.raises(RuntimeError, match="65 rows; a step takes 1 to 64"):
        MTLM.decode_add_projection_(bf16(65, 64), weight, None, bf16(65, 80))
    with pytest.raises(RuntimeError, match=r"x must be \[4, 80\], not \[4, 64\]"):
        MTLM.decode_add_projection_(x, weight, None, x)
    with pytest.raises(RuntimeError, match="bfloat16"):
        MTLM.decode_add_projection_(x.float(), weight, None, bf16(4, 80))
    with pytest.raises(RuntimeError, match="multiple of 8"):
        MTLM.decode_logits_(bf16(4, 60), bf16(60), EPS, bf16(80, 60), torch.empty(4, 80, device="cuda"))
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        MTLM.decode_add_projection_(bf16(4 * 64 + 1)[1:].view(4, 64), weight, None, bf16(4, 80))
    with pytest.raises(RuntimeError, match="another device"):
        MTLM.decode_mlp_(x, norm.cpu(), EPS, weight, None, False, bf16(4, 80))
    cache, at = bf16(4, 9, 4, 16), torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="32, 64 or 128, not 16"):
        MTLM.decode_attention_(x, cache, cache, at, x)
    with pytest.raises(RuntimeError, match="32, 64 or 128, not 16"):
        MTLM.decode_qk_norm_(norm[:16], norm[:16], EPS, None, None, at, x, cache)
    three = bf16(4, 9, 3, 32)
    with pytest.raises(RuntimeError, match="3 heads of 32, of which the width of q, 64, is no multiple"):
        MTLM.decode_attention_(x, three, three, at, x)
    with pytest.raises(RuntimeError, match=r"weight must be \[192, 64\], not \[80, 64\]"):
        one = bf16(4, 9, 1, 64)
        MTLM.decode_qkv_(x, norm, EPS, weight, None, None, None, at, x, one, one)
    with pytest.raises(RuntimeError, match="int64"):
        MTLM.decode_attention_(x, *2 * [bf16(4, 9, 1, 64)], at.int(), x)
