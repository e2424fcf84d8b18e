"""Compiling for a TPU without one: what is read from a compiled module, and facts of the real step's module.

The models have the presets' parts in the small, so that each compiles in well under a minute.
"""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import pytest

from core import cli
from core.config import PRESETS, ModelConfig, preset
from core.errors import UserError, run_command
from core.sharding import make_mesh, parse_mesh
from train_tpu import aot
from train_tpu.backend import choose_step, split_batch, tpu_loss_chunk
from train_tpu.config import RunConfig
from train_tpu.hlo import Module, parse_array
from train_tpu.step import abstract_state, compile_step
from train_tpu.topology import open_slice

SMALL = {"vocab_size": 8192, "context": 256, "d_model": 128, "n_layers": 3, "n_heads": 2, "d_mlp": 384}
CHIPS, ROWS, CHUNK = 8, 32, 256
LAYERS = ("forward", "backward", "layers, computed again")  # parts whose products are the layers'


# --- reading a module ---


@pytest.mark.parametrize(
    ("text", "n_bytes", "on_chip"),
    [
        ("f32[10,20]", 800, False),
        ("bf16[32,6,1024,64]{3,2,1,0:T(8,128)(2,1)}", 32 * 6 * 1024 * 128 * 2, False),  # 64 lanes of 128
        ("bf16[32,1024,6,64]{3,2,1,0:T(8,128)(2,1)S(1)}", 32 * 1024 * 8 * 128 * 2, True),
        ("f32[2,32,1024,1]{2,1,3,0:T(8,128)}", 2 * 32 * 1024 * 4, False),  # axis 2 is the innermost
        ("f32[]{:T(128)}", 512, False),
        ("pred[5]{0:T(1024)(128)(4,1)}", 1024, False),
        ("f8e4m3fn[256]", 256, False),
    ],
)
def test_bytes_of_an_array(text, n_bytes, on_chip):
    array = parse_array(text)
    assert (array.bytes, array.on_chip) == (n_bytes, on_chip)
    assert array.hbm == (0 if on_chip else n_bytes)


NESTED = """HloModule nested, input_output_alias={ {0}: (0, {}, may-alias) }, entry_computation_layout={}

%fused (a: f32[4,8,16], b: s32[]) -> f32[8,16] {
  %a = f32[4,8,16]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,16]{2,1,0} dynamic-slice(%a, %b, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %flat = f32[8,16]{1,0} bitcast(%slice)
  ROOT %twice = f32[8,16]{1,0} add(%flat, %flat)
}

%inner_body (p: (s32[], f32[4,8,16])) -> (s32[], f32[4,8,16]) {
  %p = (s32[], f32[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8,16]{2,1,0} get-tuple-element(%p), index=1
  %row = f32[8,16]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %product = f32[8,8]{1,0} convolution(%row, %row), dim_labels=bf_oi->bf, metadata={op_name="jit(f)/dot"}
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], f32[4,8,16]{2,1,0}) tuple(%next, %x)
}

%inner_condition (q: (s32[], f32[4,8,16])) -> pred[] {
  %q = (s32[], f32[4,8,16]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%outer_body (r: (s32[], f32[4,8,16], s32[])) -> (s32[], f32[4,8,16], s32[]) {
  %r = (s32[], f32[4,8,16]{2,1,0}, s32[]) parameter(0)
  %k = s32[] get-tuple-element(%r), index=0
  %y = f32[4,8,16]{2,1,0} get-tuple-element(%r), index=1
  %n = s32[] get-tuple-element(%r), index=2
  %start = s32[] constant(1)
  %init = (s32[], f32[4,8,16]{2,1,0}) tuple(%start, %y)
  %loop = (s32[], f32[4,8,16]{2,1,0}) while(%init), condition=%inner_condition, body=%inner_body
  %z = f32[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
  %one = s32[] constant(1)
  %later = s32[] add(%k, %one)
  ROOT %all = (s32[], f32[4,8,16]{2,1,0}, s32[]) tuple(%later, %z, %n)
}

%outer_condition (s: (s32[], f32[4,8,16], s32[])) -> pred[] {
  %s = (s32[], f32[4,8,16]{2,1,0}, s32[]) parameter(0)
  %m = s32[] get-tuple-element(%s), index=0
  %end = s32[] get-tuple-element(%s), index=2
  ROOT %more = pred[] compare(%m, %end), direction=LT
}

ENTRY %main (v: f32[4,8,16]) -> f32[4,8,16] {
  %v = f32[4,8,16]{2,1,0} parameter(0)
  %none = s32[] constant(0)
  %five = s32[] constant(5)
  %begin = (s32[], f32[4,8,16]{2,1,0}, /*index=2*/s32[]) tuple(%none, %v, %five)
  %whole = (s32[], f32[4,8,16]{2,1,0}, s32[]) while(%begin), condition=%outer_condition, body=%outer_body
  %w = f32[4,8,16]{2,1,0} get-tuple-element(%whole), index=1
  %sum = f32[4,8,16]{2,1,0} all-reduce(%w), replica_groups=[2,4]<=[8], to_apply=%fused
  ROOT %done = f32[4,8,16]{2,1,0} copy(%sum)
}
"""


def test_loops_count_as_often_as_they_run():
    module = Module(NESTED)
    runs = {e.instruction.name: e for e in module.executed()}
    assert runs["later"].times == 5
    assert runs["product"].times == 5 * 3  # 1, 3, 5
    product, row = runs["product"], runs["row"]
    assert module.matrix_flops(product.instruction, product.computation) == 2 * 8 * 8 * 16
    # Of what it slices, a fusion reads the slice; its index (4 bytes) and result are whole.
    assert module.hbm_bytes(row.instruction, row.computation) == 8 * 16 * 4 + 4 + 8 * 16 * 4
    assert module.n_aliased == 1 and module.host_transfers() == []
    (collective,) = module.collectives(8)
    assert (collective.kind, collective.group_size, collective.times) == ("all-reduce", 4, 1)
    assert collective.elements == 512 and collective.bytes == 2048


@pytest.mark.parametrize("behind", ["%sum", "%copied"])
def test_a_loop_may_count_in_a_fusion(behind: str):
    fused = """%advance (c: s32[]) -> s32[] {
  %c = s32[] parameter(0)
  %step = s32[] constant(2)
  ROOT %added = s32[] add(%c, %step)
}

%inner_body (p"""
    counted = f"""  %sum = s32[] fusion(%i), kind=kLoop, calls=%advance
  %copied = s32[] copy(%sum)
  ROOT %out = (s32[], f32[4,8,16]{{2,1,0}}) tuple({behind}, %x)
"""
    own = "  ROOT %out = (s32[], f32[4,8,16]{2,1,0}) tuple(%next, %x)\n"
    assert own in NESTED
    module = Module(NESTED.replace("%inner_body (p", fused, 1).replace(own, counted))
    assert {e.times for e in module.executed() if e.instruction.name == "product"} == {5 * 3}


def test_a_loop_that_cannot_be_counted_is_refused():
    with pytest.raises(AssertionError):
        list(Module(NESTED.replace("direction=LT", "direction=NE")).executed())


def test_what_is_exchanged_counts_once():
    """As XLA:TPU writes it for fsdp=4,tensor=2: what begins puts out operand, result and flags."""
    text = """HloModule exchanging

ENTRY %main (a: bf16[32,192]) -> f32[8] {
  %a = bf16[32,192]{1,0} parameter(0)
  %begun = (bf16[32,192]{1,0}, bf16[32,192]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=58, \
source_target_pairs={{0,6},{2,0},{4,2},{6,4},{1,7},{3,1},{5,3},{7,5}}
  %done = bf16[32,192]{1,0} collective-permute-done(%begun)
  %both = (bf16[32,192]{1,0}, bf16[64,192]{1,0}) all-gather-start(%done), channel_id=2, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %gathered = bf16[64,192]{1,0} all-gather-done(%both)
  %b = f32[4] constant({1,2,3,4})
  ROOT %c = f32[8]{0} all-gather(%b), replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], \
device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={0}
}
"""
    module = Module(text)
    moved, gathered, small = module.collectives(8)
    assert (moved.kind, moved.group_size, moved.elements) == ("collective-permute", 4, 32 * 192)
    assert moved.bytes == aot._sent(moved) == 32 * 192 * 2 and moved.dtypes == ("bf16",)
    assert (gathered.group_size, gathered.elements) == (2, 64 * 192)
    assert aot._sent(gathered) == 32 * 192 * 2
    assert (small.group_size, small.elements) == (2, 8)
    begun = module.entry.by_name["begun"]
    assert module.hbm_bytes(begun, module.entry) == 2 * 32 * 192 * 2  # read and written


def test_what_is_exchanged_beside_a_product_counts_where_it_begins():
    """XLA:TPU's fused asynchronous collectives: one begins, a product carries it on, one ends."""
    text = """HloModule overlapping

%starting (p: bf16[32,64]) -> (bf16[32,64], bf16[128,64], s32[2], u32[]) {
  %p = bf16[32,64]{1,0} parameter(0)
  %gather = bf16[128,64]{1,0} all-gather(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %start = (bf16[32,64]{1,0}, bf16[128,64]{1,0}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%gather), \
custom_call_target="AsyncCollectiveStart"
}

%multiplying (q: bf16[32,64], r: bf16[128,64], x: bf16[8,16], y: bf16[16,24]) -> \
(bf16[8,24], bf16[32,64], bf16[128,64]) {
  %q = bf16[32,64]{1,0} parameter(0)
  %r = bf16[128,64]{1,0} parameter(1)
  %x = bf16[8,16]{1,0} parameter(2)
  %y = bf16[16,24]{1,0} parameter(3)
  %product = bf16[8,24]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  %again = bf16[128,64]{1,0} all-gather(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %all = (bf16[8,24]{1,0}, bf16[32,64]{1,0}, bf16[128,64]{1,0}) tuple(%product, %q, %again)
}

%ending (s: bf16[32,64], t: bf16[128,64]) -> bf16[128,64] {
  %s = bf16[32,64]{1,0} parameter(0)
  %t = bf16[128,64]{1,0} parameter(1)
  %last = bf16[128,64]{1,0} all-gather(%s), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %end = bf16[128,64]{1,0} custom-call(%s, %t, %last), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[32,64], b: bf16[8,16], c: bf16[16,24]) -> bf16[128,64] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %c = bf16[16,24]{1,0} parameter(2)
  %begun = (bf16[32,64]{1,0}, bf16[128,64]{1,0}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%a), calls=%starting
  %part = bf16[32,64]{1,0} get-tuple-element(%begun), index=0
  %whole = bf16[128,64]{1,0} get-tuple-element(%begun), index=1
  %beside = (bf16[8,24]{1,0}, bf16[32,64]{1,0}, bf16[128,64]{1,0}) fusion(%part, %whole, %b, %c), \
calls=%multiplying
  ROOT %done = bf16[128,64]{1,0} fusion(%part, %whole), calls=%ending
}
"""
    module = Module(text)
    (gathered,) = module.collectives(8)
    assert (gathered.kind, gathered.group_size, gathered.bytes) == ("all-gather", 4, 128 * 64 * 2)
    n_bytes = {e.instruction.name: module.hbm_bytes(e.instruction, e.computation) for e in module.executed()}
    assert n_bytes["begun"] == (32 + 128) * 64 * 2 and n_bytes["done"] == 0
    assert n_bytes["beside"] == (8 * 16 + 16 * 24 + 8 * 24) * 2


def test_products_with_batch_axes():
    """As XLA:TPU writes them: a batch axis is a window of which each position meets one element."""
    text = """HloModule batched

ENTRY %main (a: f32[7,8,16], b: f32[7,16,32]) -> f32[7,8,32] {
  %a = f32[7,8,16]{2,1,0} parameter(0)
  %b = f32[7,16,32]{2,1,0} parameter(1)
  ROOT %c = f32[7,8,32] convolution(%a, %b), window={size=7 stride=6 lhs_dilate=7}, dim_labels=0bf_0io->0bf
}
"""
    module = Module(text)
    assert module.matrix_flops(module.entry.root, module.entry) == 2 * 7 * 8 * 16 * 32


# --- the command ---


def call(monkeypatch, *arguments: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(aot.main)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--topology", "v5e"), "GENERATION:XxY"),
        (("--topology", "v9z:2x4"), "v5e, v6e"),
        (("--preset", "mtlm2-41m"), "did you mean 'mtlm2-40m'"),
        (("--accumulate", "0"), "must be positive"),
        (("--out", "x.md"), "--table"),
        (("--table", "--preset=mtlm2-40m"), "leave --preset out"),
        (("--table", "--topology", "v5e:2x4"), "leave --topology out"),
        (("--table", "--out", "nowhere/x.md"), "nowhere/x.md: No such file or directory"),
    ],
)
def test_mistakes_are_told(monkeypatch, capsys, arguments, said):
    assert call(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_table_is_made_under_the_settings_given(monkeypatch, capsys, tmp_path):
    commands = []
    report = {
        "preset": "p", "topology": "t", "batch": 64, "fits": False, "memory": {"total": 0, "limit": 0},
        "advice": "", "compile_seconds": 1.0,
    }  # fmt: skip

    def run(command, **_):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, aot.EXIT_DOES_NOT_FIT, json.dumps(report), "")

    monkeypatch.setattr(aot.subprocess, "run", run)
    given = ("--batch", "64", "--mesh", "fsdp=8", "--n-layers", "8", "--biases", "True", "--lr", "1")
    assert call(monkeypatch, "--table", *given, "--out", str(tmp_path / "t.md")) == 0
    assert len((tmp_path / "t.md").read_text().splitlines()) == 2 + len(commands) == 2 + 3 * len(PRESETS)
    for command in commands:
        own = ("--json", "--preset", command[3], "--topology", command[5])
        found, meant = (cli.parse(aot.AotConfig, argv, prog="aot") for argv in (command[1:], own + given))
        assert command[0] == "train_tpu.aot" and found == meant


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt libtpu"):
        open_slice("v5e:2x4")


@pytest.mark.parametrize(
    ("platform", "batch", "given", "parts"),
    [
        ("tpu", 256, None, 4),
        ("tpu", 64, None, 1),
        ("tpu", 8 * 13, None, 13),
        ("tpu", 256, 1, 1),
        ("cpu", 256, None, 1),
    ],
)
def test_parts_of_a_batch(platform, batch, given, parts):
    devices = types.SimpleNamespace(flat=[types.SimpleNamespace(platform=platform)])
    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 2, "tensor": 1}, devices=devices)
    assert split_batch(RunConfig(batch=batch, accumulate=given), preset("mtlm2-40m"), mesh) == parts


def test_small_chunks_only_where_the_head_fits_on_the_chip():
    assert tpu_loss_chunk(preset("mtlm2-40m")) == 256
    assert tpu_loss_chunk(preset("mtlm1-200m")) == 8192


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_a_way_out(monkeypatch, capsys):
    step = ("--n-layers", "2", "--optimizer", "adamw")  # compiles soonest
    large = ("--batch", "4096", "--accumulate", "1", "--remat", "none")
    assert call(monkeypatch, *step, *large, "--json") == aot.EXIT_DOES_NOT_FIT
    report = json.loads(capsys.readouterr().out)
    assert not report["fits"] and report["memory"]["total"] > report["memory"]["limit"]
    assert report["advice"].startswith("--")
    assert call(monkeypatch, "--batch", "100") == 2
    assert "not divisible by 8 devices" in capsys.readouterr().err


# --- facts of the step's module ---


def small(name: str, **changes) -> tuple[RunConfig, ModelConfig]:
    model = dataclasses.replace(preset(name), **SMALL)
    return RunConfig(**({"preset": name, "batch": ROWS, "loss_chunk": CHUNK} | changes)), model


def compiled_module(run: RunConfig, model: ModelConfig):
    """The step's config, the compiled step and its module, for eight chips of a v5e."""
    mesh = make_mesh(parse_mesh(run.mesh, CHIPS), open_slice("v5e:2x4").devices)
    step, _ = choose_step(run, model, mesh)
    compiled = compile_step(step, run.batch, run.accumulate, mesh)
    return step, compiled, Module(compiled.as_text())


def facts(step, module: Module) -> dict[str, bool]:
    """What is to be true of every step on a TPU."""
    model = step.model
    layer_types = {
        array.dtype
        for instruction, operands in module.products()
        if aot.part_of(instruction.op_name) in LAYERS
        for array in operands
    }
    logits = [
        a.size // model.vocab_size
        for a in module.arrays()
        if a.dtype == "f32" and model.vocab_size in a.dims and model.d_model not in a.dims
    ]
    sums = [c for c in module.collectives(CHIPS) if c.elements > 1]
    state = abstract_state(step, step.compute.mesh)
    return {
        "splash attention": {"fwd", "dkv", "dq"}
        == {re.search(r"splash_mha_(\w+?)_", k.instruction.op_name).group(1) for k in module.kernels()},
        "bfloat16 products in the layers": layer_types == {"bf16"},
        "logits of a chunk at a time": max(logits) <= step.loss_chunk,
        # Every gradient once, and the loss and the cross-entropy along with them.
        "gradients are summed over the chips once": {c.kind for c in sums} == {"all-reduce"}
        and sum(c.elements * c.times for c in sums) == model.n_params + 2
        and all(c.dtypes == ("f32",) for c in sums),
        "the state is updated in place": module.n_aliased == len(jax.tree.leaves(state)),
        "nothing goes to the host": module.host_transfers() == [],
    }


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "accumulate"), [("mtlm2-40m", 2), ("mtlm1-88m", 1)])
def test_facts_of_the_compiled_step(name, accumulate):
    run, model = small(name, accumulate=accumulate)
    step, _, module = compiled_module(run, model)
    assert [fact for fact, holds in facts(step, module).items() if not holds] == []

    report = read(step, module)
    check_products(report, model)
    # One tile of 256 x 256 holds the sequence: 9 products of all scores, where the config counts the 6 of
    # forward and backward over the half of them.
    kernels = report["flops_per_token"]["kernels"]
    assert kernels == pytest.approx(9 * 2 * model.n_layers * model.d_model * model.context, rel=1e-6)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_step_whose_weights_are_gathered():
    run, model = small("mtlm2-40m", accumulate=1, mesh="fsdp=4,tensor=2")
    step, _, module = compiled_module(run, model)
    report = read(step, module)
    check_products(report, model)
    gathered = [c for c in report["collectives"] if c["kind"] == "all-gather" and c["axes"] == "fsdp"]
    in_layers = sum(c["elements"] * c["times"] for c in gathered if c["times"] == model.n_layers)
    weights = 4 * model.d_model**2 + 2 * model.d_model * model.d_mlp
    # For the forward and for the backward pass, a half of each on a chip.
    assert in_layers >= 2 * model.n_layers * weights / 2


def read(step, module: Module) -> dict:
    return aot.read_module(module, step, ROWS, step.compute.mesh, open_slice("v5e:2x4").chip)


def check_products(report: dict, model: ModelConfig) -> None:
    """Every product of layers and head: 6 FLOPs a weight and token, as the config has it; none done again."""
    parts = report["flops_per_token"]["parts"]
    expected = model.flops_per_token() - 6 * model.n_layers * model.d_model * model.context
    assert sum(parts.get(p, 0) for p in (*LAYERS, "head and loss")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_loop_costs_what_its_layers_cost():
    """A module without loops is what XLA's own analysis can count; the one with loops must cost the same."""
    whole = ROWS // CHIPS * SMALL["context"]
    run, model = small("mtlm2-40m", accumulate=1, unroll=3, loss_chunk=whole)
    _, compiled, unrolled = compiled_module(run, model)
    assert max(e.times for e in unrolled.executed()) == 1
    _, _, looped = compiled_module(*small("mtlm2-40m", accumulate=1))
    assert max(e.times for e in looped.executed()) >= 3

    def flops(module):
        return sum(e.times * module.matrix_flops(e.instruction, e.computation) for e in module.executed())

    assert flops(unrolled) == flops(looped)
    theirs = compiled.cost_analysis()
    # XLA adds one a number to what elementwise operations cost; the products are nearly all.
    assert 0.95 * theirs["flops"] < flops(unrolled) <= theirs["flops"]
    # XLA's bytes are those of all memories; it counts the allocation of a buffer and the renaming of adjacent
    # ones as writes, which we leave out.
    everywhere = Module(compiled.as_text().replace("S(1)", ""))
    ours = sum(everywhere.hbm_bytes(e.instruction, e.computation) for e in everywhere.executed())
    assert 0.7 * theirs["bytes accessed"] < ours < 1.05 * theirs["bytes accessed"]
