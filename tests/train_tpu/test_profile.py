"""--profile: the trace is a file that Perfetto reads, and the costliest operations are named."""

import gzip
import json
import re

import pytest

from core.errors import UserError
from core.run.profiling import Operation, add_up, describe, parse_updates, require_among
from tests.train_tpu.processes import TINY, run_here, without
from train_tpu.profile import operation_name


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "-1:3", "a:b"])
def test_what_is_no_range_of_updates_is_refused(text: str):
    with pytest.raises(UserError, match="100:105"):
        parse_updates(text)


def test_updates_that_a_start_does_not_make_are_refused():
    require_among("3:12", 3, 12)
    for text in ("2:5", "5:13"):
        with pytest.raises(UserError, match="this start makes updates 3 to 11"):
            require_among(text, 3, 12)


def test_the_ten_costliest_have_their_share_of_all():
    calls = [(f"op{i}", i / 1000) for i in range(13)] + [("op12", 0.01)]
    operations = add_up(calls)
    assert Operation("op12", 2, 0.012 + 0.01) in operations
    lines = describe(operations, 2).splitlines()
    assert len(lines) == 11 and "10 costliest of 13" in lines[0]
    assert lines[1].split() == [f"{0.022 / 0.088:.1%}", "11.000", "ms", "1", "calls", "op12"]
    assert "no operations" in describe([], 2)


def test_a_kernel_of_a_cuda_graph_has_its_own_name():
    """As an H200's trace has them: the operation of all is the graph."""
    rotation = "void mtlm::(anonymous namespace)::rotate<__nv_bfloat16, 64>(mtlm::Shape, int)"
    assert operation_name("command_buffer_1", rotation) == "mtlm::rotate"
    assert operation_name("command_buffer_447", "loop_add_multiply_fusion_3") == "loop_add_multiply_fusion_3"
    assert operation_name("fusion.3", "loop_fusion_3") == "fusion.3"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["JAX", "PyTorch"])
def test_a_run_is_traced(engine: str, cache, text):
    folder = cache / f"traced-{engine}"
    command = TINY if engine == "JAX" else without(TINY, "--optimizer")
    module = "train_tpu.run" if engine == "JAX" else "port_torch.train"
    more = ("--data", text, "--out", folder, "--stop-at", "6", "--profile", "2:5")
    said, _ = run_here(*command, *more, module=module)
    assert f"traced 3 updates into {folder / 'profile'}" in said
    shares = [float(share) for share in re.findall(r"^ +([0-9.]+)%  .* ms .* calls", said, re.MULTILINE)]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 5 < sum(shares) <= 100.5
    # An operation of XLA is named with what it is made of, where that is known.
    of_the_model = r"calls  \S+ \(.*\w+.*\)$" if engine == "JAX" else "calls  aten::"
    assert len(re.findall(of_the_model, said, re.MULTILINE)) >= 5
    name = "perfetto_trace.json.gz" if engine == "JAX" else "trace.json.gz"
    (trace,) = (folder / "profile").rglob(name)
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
