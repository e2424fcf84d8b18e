"""The loss on a GPU: the pass over logits, and the whole of head and loss."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels_cuda.ops import linear_cross_entropy as loss
from kernels_cuda.ops.softmax_loss import IGNORE
from kernels_cuda.registry import reference
from tests.kernels_cuda.gpu import Guarded, assert_as_good, assert_equal_bits, is_hopper, run_twice, wide

pytestmark = pytest.mark.gpu
needs_hopper = pytest.mark.skipif(not is_hopper(), reason="needs compute capability 9.0")

# One thread's share and less, unaligned, of each preset and tokenizer, more than shared memory holds.
VOCABULARIES = (1, 7, 8, 259, 4096, 32000, 32001, 65536, 131072)


def softmax_loss(
    implementation, logits: Tensor, targets: Tensor, z_loss: float, gradients: bool
) -> list[Tensor]:
    """Totals, losses and gradients, from memory that was poisoned."""
    guarded = Guarded()
    wide_type = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.new_empty(logits.shape[0], dtype=wide_type)
    total, nll, x = guarded.like(rows), guarded.like(rows), guarded.like(logits, keep=True)
    implementation.softmax_loss_(x, targets, total, nll, z_loss, gradients)
    guarded.check()
    return [total, nll, x]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_as_exact_as_pytorch_at_every_size(vocab: int, dtype: torch.dtype):
    for rows in (0, 1, 2, 31, 33, 199):
        logits = (torch.randn(rows, vocab, device="cuda") * 4 + 20).to(dtype)
        targets = torch.randint(vocab, (rows,), device="cuda")
        targets[1::5] = IGNORE
        for z_loss in (0.0, 1e-3):
            got = run_twice(lambda x=logits, t=targets, z=z_loss: softmax_loss(torch.ops.mtlm, x, t, z, True))
            plain = softmax_loss(reference, logits, targets, z_loss, True)
            assert_as_good(
                got, plain, softmax_loss(reference, logits.double(), targets, z_loss, True), f"{rows} rows"
            )
            assert not got[2][1::5].any() and not got[0][1::5].any()
            without = softmax_loss(torch.ops.mtlm, logits, targets, z_loss, False)
            assert_equal_bits(without, [got[0], got[1], logits])


def test_rows_apart_and_alone():
    logits = torch.randn(64, 32000, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(32000, (64,), device="cuda")
    expected = softmax_loss(torch.ops.mtlm, logits, targets, 1e-4, True)
    apart = torch.full((64, 32000 + 64), torch.nan, device="cuda", dtype=torch.bfloat16)
    apart[:, :32000] = logits
    total, nll = torch.empty(2, 64, device="cuda")
    torch.ops.mtlm.softmax_loss_(apart[:, :32000], targets, total, nll, 1e-4, True)
    assert_equal_bits([total, nll, apart[:, :32000].contiguous()], expected)
    assert apart[:, 32000:].isnan().all()
    alone = softmax_loss(torch.ops.mtlm, logits[40:41].clone(), targets[40:41], 1e-4, True)
    assert_equal_bits([t[40:41] for t in expected], alone)


def test_extreme_logits():
    logits = torch.tensor(
        [[3e38, 0, 0, 0], [-3e38] * 4, [-torch.inf, 1, 2, 3], [80, -80, 0, 0]], device="cuda"
    )
    logits = torch.cat([logits, torch.full((4, 4), -torch.inf, device="cuda")], 1)
    targets = torch.tensor([0, 1, 3, 1], device="cuda")
    got = softmax_loss(torch.ops.mtlm, logits, targets, 0.0, True)
    exact = softmax_loss(reference, logits.double(), targets, 0.0, True)
    # float32's own error at the size of the numbers in a difference
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[2].double(), exact[2], rtol=1e-5, atol=1e-7)


def test_a_target_that_is_none_is_nan_and_a_nan_stays_in_its_row():
    logits = torch.randn(5, 32000, device="cuda", dtype=torch.bfloat16)
    logits[4, 17] = torch.nan
    targets = torch.tensor([3, 32000, -2, 5, 6], device="cuda")
    total, nll, gradient = softmax_loss(torch.ops.mtlm, logits, targets, 0.0, True)
    assert nll.isnan().tolist() == total.isnan().tolist() == [False, True, True, False, True]
    assert gradient.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not gradient[[0, 3]].isnan().any()


def test_targets_of_other_types_are_refused():
    logits, total, nll = torch.zeros(2, 8, device="cuda"), *torch.zeros(2, 2, device="cuda")
    targets = torch.zeros(2, device="cuda", dtype=torch.int32)
    with pytest.raises(RuntimeError, match="targets must be int64, in JAX also int32, not another type"):
        torch.ops.mtlm.softmax_loss_(logits, targets, total, nll, 0.0, True)


def test_more_than_2_to_the_31_elements():
    rows = 2**31 // 32000 + 100
    logits = torch.empty(rows, 32000, device="cuda", dtype=torch.bfloat16).normal_()
    targets = torch.randint(32000, (rows,), device="cuda")
    last = softmax_loss(torch.ops.mtlm, logits[-3:].clone(), targets[-3:], 0.0, True)
    total, nll = torch.empty(2, rows, device="cuda")
    torch.ops.mtlm.softmax_loss_(logits, targets, total, nll, 0.0, True)
    assert_equal_bits([total[-3:], nll[-3:], logits[-3:]], last)


@pytest.mark.parametrize("vocab", [32000, 512])
def test_a_recorded_pass_is_the_same_after_another_size(vocab: int):
    """What the kernel may have of shared memory is set in every call."""
    logits = torch.randn(64, vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (64,), device="cuda")
    expected = softmax_loss(torch.ops.mtlm, logits, targets, 0.0, True)
    x, (total, nll) = logits.clone(), torch.empty(2, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.mtlm.softmax_loss_(x, targets, total, nll, 0.0, True)
    for other in (64, 65536):
        more = torch.zeros(2, other, device="cuda", dtype=torch.bfloat16)
        softmax_loss(torch.ops.mtlm, more, targets[:2] % 64, 0.0, True)
        x.copy_(logits)
        graph.replay()
        assert_equal_bits([total, nll, x], expected)


def test_threads_with_rows_of_other_lengths():
    """Each sets what the kernel may have of shared memory, and launches before another one sets it."""

    def run(vocab: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            logits = torch.empty(4, vocab, device="cuda", dtype=torch.bfloat16)
            targets = torch.zeros(4, dtype=torch.int64, device="cuda")
            total, nll = torch.empty(2, 4, device="cuda")
            for _ in range(2000):
                torch.ops.mtlm.softmax_loss_(logits.zero_(), targets, total, nll, 0.0, True)
            return nll.cpu()

    sizes = (32000, 64)
    with ThreadPoolExecutor(len(sizes)) as pool:
        for vocab, nll in zip(sizes, pool.map(run, sizes), strict=True):
            torch.testing.assert_close(nll, torch.full((4,), vocab).log())


def loss_product(
    implementation, hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float = 1e-4
) -> list[Tensor]:
    """Totals, losses and the gradient of the logits, from memory that was poisoned."""
    guarded = Guarded()
    rows = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    exps = guarded.like(hidden.new_empty(hidden.shape[0], table.shape[0]))
    total, nll, scale = (guarded.like(rows) for _ in range(3))
    implementation.loss_product_(hidden, table, targets, exps, total, nll, scale, z_loss)
    guarded.check()
    return [total, nll, exps.to(scale.dtype) * scale[:, None]]


def rounded_logits(hidden: Tensor, table: Tensor, targets: Tensor) -> list[Tensor]:
    """The same by logits and their gradients in bfloat16, as eager PyTorch has them."""
    logits, (total, nll) = hidden @ table.T, torch.empty(2, len(hidden), device="cuda")
    reference.softmax_loss_(logits, targets, total, nll, 1e-4, True)
    return [total, nll, logits.float()]


@needs_hopper
@pytest.mark.parametrize("d", [8, 72, 384, 768])
@pytest.mark.parametrize("vocab", [8, 136, 1000, 32000])
def test_the_loss_inside_its_product(vocab: int, d: int):
    """At every size; some targets so far from the largest logit that their rows are computed again."""
    for n in (0, 1, 129, 700):
        hidden, table, targets = head(n, d, vocab, torch.bfloat16, torch.bfloat16)
        hidden[::13] *= 300
        got = run_twice(lambda h=hidden, w=table, t=targets: loss_product(torch.ops.mtlm, h, w, t))
        results = (
            got,
            rounded_logits(hidden, table, targets),
            loss_product(reference, hidden.double(), table.double(), targets),
        )
        assert_as_good(*results, f"{n} rows")
        # Those of usual size alone: beside rounded logits of the others every error would look small.
        near = torch.arange(n, device="cuda") % 13 != 0
        assert_as_good(*([t[near] for t in of_rows] for of_rows in results), f"{n} rows, near")
        assert not got[2][::7].any() and not got[0][::7].any()


@needs_hopper
def test_a_row_of_the_loss_inside_its_product_depends_on_itself_alone():
    hidden, table, targets = head(600, 384, 32000, torch.bfloat16, torch.bfloat16)
    hidden[50::100] *= 300
    whole = loss_product(torch.ops.mtlm, hidden, table, targets)
    for at in (1, 50, 299, 450, 599):
        alone = loss_product(torch.ops.mtlm, hidden[at : at + 1].clone(), table, targets[at : at + 1])
        assert_equal_bits([t[at : at + 1] for t in whole], alone)


@needs_hopper
def test_the_loss_inside_its_product_knows_what_does_not_count():
    hidden, table, targets = head(5, 64, 136, torch.bfloat16, torch.bfloat16)
    targets = torch.tensor([3, 136, -2, -1, 6], device="cuda")
    hidden[4, 5] = torch.nan
    total, nll, gradient = loss_product(torch.ops.mtlm, hidden, table, targets)
    assert nll.isnan().tolist() == total.isnan().tolist() == [False, True, True, False, True]
    assert gradient.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not gradient[3].any() and not nll[3].any()


def head(
    n: int, d: int, vocab: int, dtype: torch.dtype, table_type: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, d, device="cuda").to(dtype)
    table = (torch.randn(vocab, d, device="cuda") / d**0.5).to(table_type)
    targets = torch.randint(vocab, (n,), device="cuda")
    targets[::7] = IGNORE
    return hidden, table, targets


def sums_and_gradients(
    function, hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float
) -> list[Tensor]:
    hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
    total, nll = function(hidden, table, targets, z_loss)
    return [total.detach(), nll.detach(), *torch.autograd.grad(total / 3, (hidden, table))]


@pytest.mark.parametrize("n", [0, 1, 33, 1000])
@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2]
)
def test_head_and_loss(n: int, types: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch):
    for most in (8192, 256):  # whole, and in chunks of 256 rows
        monkeypatch.setattr(loss, "FEWEST_ROWS", most)
        monkeypatch.setattr(loss, "LOGITS_BYTES", most * 2000)
        given = head(n, 384, 1000, *types)
        got = run_twice(lambda given=given: sums_and_gradients(loss.linear_cross_entropy, *given, 1e-4))
        plain = sums_and_gradients(loss.all_logits_at_once, *given, 1e-4)
        exact = sums_and_gradients(loss.all_logits_at_once, *wide(*given), 1e-4)
        assert_as_good(got[2:], plain[2:], exact[2:], f"at most {most} rows")
        # A sum is one number, whose error may by chance be nothing. bfloat16 rounds each logit, of about 1,
        # by up to 4e-3 while a loss is about 7; float32 sums of up to 1000 terms.
        for mine, true in zip(got[:2], exact[:2], strict=True):
            assert abs(mine - true) <= (2e-6 if types[0] == torch.float32 else 2e-3) * true


def test_no_more_than_a_gibibyte_beyond_inputs_and_gradients():
    hidden, table, targets = head(32768, 768, 32000, torch.bfloat16, torch.bfloat16)
    sums_and_gradients(
        loss.linear_cross_entropy, *(t[:8] for t in (hidden, table, targets % 8)), 0.0
    )  # cuBLAS's own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    *_, d_hidden, d_table = sums_and_gradients(loss.linear_cross_entropy, hidden, table, targets, 0.0)
    gradients = d_hidden.nbytes + d_table.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= 2**30


def test_evaluating_makes_no_gradients():
    """Beyond the logits nothing of their size, nor of the table's, is held."""
    hidden, table, targets = head(8192, 768, 32000, torch.bfloat16, torch.float32)
    table = torch.nn.Parameter(table)
    with torch.no_grad():
        expected = loss.linear_cross_entropy(hidden, table.detach(), targets)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sums = loss.linear_cross_entropy(hidden, table, targets)
    logits, narrow_table = 8192 * 32000 * 2, table.numel() * 2
    assert torch.cuda.max_memory_allocated() - before <= logits + narrow_table + 2**20
    assert_equal_bits(list(sums), list(expected))


def test_no_wait_for_the_device():
    hidden, table, targets = head(512, 384, 1000, torch.bfloat16, torch.float32)
    sums_and_gradients(loss.linear_cross_entropy, hidden, table, targets, 1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums_and_gradients(loss.linear_cross_entropy, hidden, table, targets, 1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
