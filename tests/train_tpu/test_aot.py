"""Compiling for a TPU without one: what is read from a compiled module, and facts of the real step's module.

The models have the presets' parts in the small, so that each compiles in well under a minute.
"""

import dataclasses
import json
import math
import re
import sys
import types
from collections import Counter

import jax
import pytest

from core import checks, cli
from core.config import ModelConfig, preset
from core.errors import UserError, run_command
from core.run.settings import model_config
from core.sharding import make_mesh, parse_mesh
from tests.train_tpu.products import muon_flops, muon_products
from train_tpu.aot import __main__ as aot
from train_tpu.aot.hlo import Collective, Module
from train_tpu.aot.report import compile_and_report, print_report
from train_tpu.aot.topology import GIB, HBM, open_slice
from train_tpu.backend import choose_step, split_batch, tpu_loss_chunk
from train_tpu.config import RunConfig
from train_tpu.step import abstract_state, compile_step, lower_step

SMALL = {"vocab_size": 8192, "context": 256, "d_model": 128, "n_layers": 3, "n_heads": 2, "d_mlp": 384}
CHIPS, ROWS, CHUNK = 8, 32, 256


# --- reading a module ---


def test_collectives_as_xla_writes_them_for_a_tpu():
    """A permutation and a gather that start and end, a gather in a chain of fusions, a sum in a loop."""
    module = Module("""HloModule exchanging, input_output_alias={ {0}: (0, {}, may-alias) }, \
entry_computation_layout={}

%starting (p: bf16[32,64]) -> (bf16[32,64], bf16[128,64], s32[2], u32[]) {
  %p = bf16[32,64]{1,0} parameter(0)
  %gather = bf16[128,64]{1,0} all-gather(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %start = (bf16[32,64]{1,0:T(8,128)(2,1)}, bf16[128,64]{1,0}, s32[2]{0:S(4)}, u32[]{:S(2)}) \
custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%multiplying (q: bf16[32,64]) -> bf16[128,64] {
  %q = bf16[32,64]{1,0} parameter(0)
  ROOT %again = bf16[128,64]{1,0} all-gather(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%body (s: f32[64]) -> f32[64] {
  %s = f32[64]{0} parameter(0)
  %splash_mha_fwd.12 = f32[64]{0} custom-call(%s), custom_call_target="tpu_custom_call", frontend_attributes={
"metadata":"{}"
}}
  ROOT %sum = (f32[64]{0}, f32[]{:T(128)}) all-reduce(%splash_mha_fwd.12, %s), \
replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (a: bf16[32,192]) -> f32[8] {
  %a = bf16[32,192]{1,0} parameter(0)
  %begun = (bf16[32,192]{1,0}, bf16[32,192]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=58, \
source_target_pairs={{0,6},{2,0},{4,2},{6,4},{1,7},{3,1},{5,3},{7,5}}
  %done = bf16[32,192]{1,0} collective-permute-done(%begun)
  %both = (bf16[32,192]{1,0}, bf16[64,192]{1,0}) all-gather-start(%done), replica_groups={}, dimensions={0}
  %gathered = bf16[64,192]{1,0} all-gather-done(%both)
  %chain = (bf16[32,64]{1,0}, bf16[128,64]{1,0}) fusion(%a), kind=kCustom, calls=%starting
  %middle = bf16[128,64]{1,0} fusion(%chain), kind=kCustom, calls=%multiplying
  %loop = f32[64]{0} while(%a), condition=%condition, body=%body
  ROOT %c = f32[8]{0} all-gather(%loop), replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], \
device_ids=([4,2]T(1,0)) {'axis_1','axis_2'}, dimensions={0}
}
""")
    assert module.collectives(8) == [
        Collective("collective-permute", None, 0, 32 * 192, 2 * 32 * 192, ("bf16",)),
        Collective("all-gather", 8, 0, 64 * 192, 2 * 64 * 192, ("bf16",)),
        Collective("all-gather", 4, 0, 128 * 64, 2 * 128 * 64, ("bf16",)),
        Collective("all-reduce", 4, 1, 65, 4 * 65, ("f32",)),
        Collective("all-gather", 8, 0, 8, 32, ("f32",)),
    ]
    assert module.kernels() == [("splash_mha_fwd", 1)]
    assert (module.n_loops, module.n_donated, module.host_transfers()) == (1, 1, [])


def test_groups_of_an_unknown_form_are_no_figure():
    reduced = "ROOT %a = f32[8]{0} all-reduce(%b), replica_groups=new(8)"
    text = f"HloModule m\n\nENTRY %main () -> f32[8] {{\n  {reduced}\n}}\n"
    with pytest.raises(ValueError, match="not known"):
        Module(text).collectives(8)


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
        (("--grad-accum-steps", "0"), "must be positive"),
        (("--n-heads", "5"), "n_heads"),
    ],
)
def test_mistakes_are_told_before_jax_is_imported(monkeypatch, capsys, arguments, said):
    monkeypatch.setitem(sys.modules, "train_tpu.aot.report", None)  # importing it is an ImportError
    assert call(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


# Another value of every option that changes the step on one device of any platform.
OTHERWISE = {
    "batch": 8, "grad_accum_steps": 2, "remat": "full", "optimizer": "adamw", "weight_decay": 0, "clip": 0,
    "context": 64, "n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 1, "d_mlp": 64, "mlp": "gelu",
    "positions": "learned", "tied": False, "dropout": 0.3, "dtype": "bfloat16", "vocab_size": 33_000,
    "head_dim": 8, "biases": True, "qkv_biases": True, "qk_norm": True, "rope_scaling": "linear,factor=2",
    "unroll": 1, "loss_chunk": 64,
}  # fmt: skip


def test_every_option_changes_the_program():
    """And not just numbers in it, as another rate or epsilon would, to which the report is blind."""
    whole = {"preset", "topology", "json", "mesh", "attention"}  # the command's own, and a TPU's
    assert {option.field for option in cli.options_of(aot.AotConfig)} - whole == OTHERWISE.keys()

    def program(**given: object) -> str:
        default = aot.AotConfig(preset="mtlm1-tiny", batch=4, model=aot.AotModel(n_layers=2))
        arguments = [text for name, value in given.items() for text in (checks.option(name), str(value))]
        config = cli.parse(aot.AotConfig, arguments, prog="aot", default=default)
        run = config.run_config()
        model = model_config(run, preset(config.preset).vocab_size)
        mesh = make_mesh(parse_mesh(None, 1), jax.devices()[:1])
        step, _ = choose_step(run, model, mesh)
        text = lower_step(step, run.batch, split_batch(run, model, mesh), mesh).as_text()
        return re.sub(r"dense<[^>]*>", "dense<...>", text)

    usual = program()
    assert [name for name, value in OTHERWISE.items() if program(**{name: value}) == usual] == []


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
    assert split_batch(RunConfig(batch=batch, grad_accum_steps=given), preset("mtlm2-40m"), mesh) == parts


def test_small_chunks_only_where_the_head_fits_on_the_chip():
    assert tpu_loss_chunk(preset("mtlm2-40m")) == 256
    assert tpu_loss_chunk(preset("mtlm1-200m")) == 8192


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_a_way_out(monkeypatch, capsys):
    step = ("--n-layers", "2", "--optimizer", "adamw")  # compiles soonest
    large = ("--batch", "4096", "--grad-accum-steps", "1", "--remat", "none")
    assert call(monkeypatch, *step, *large, "--json") == aot.EXIT_DOES_NOT_FIT
    report = json.loads(capsys.readouterr().out)
    assert not report["fits"] and report["advice"].startswith("--")
    assert f"available HBM ({HBM['v5e'] / GIB:.2f}G)" in report["compiler_says"]
    assert call(monkeypatch, "--batch", "100") == 2
    assert "not divisible by 8 devices" in capsys.readouterr().err


# --- facts of the step's module ---


def small(name: str, **changes) -> tuple[RunConfig, ModelConfig]:
    model = dataclasses.replace(preset(name), **SMALL)
    return RunConfig(**({"preset": name, "batch": ROWS, "loss_chunk": CHUNK} | changes)), model


def layer_product_types(module: Module) -> set[str]:
    """Types that the matrix products of the layers multiply, forward and backward."""
    found = set()
    for instructions in module.computations.values():
        outputs = {i.name: i.outputs[0].dtype for i in instructions if i.outputs}
        for i in instructions:
            where = re.search(r'op_name="([^"]*)"', i.attributes)
            if (
                i.opcode in ("convolution", "dot")
                and "jvp" in where[1]
                and not re.search(r"\bloss\b", where[1])
            ):
                found |= {outputs[name] for name in i.operands[:2]}
    return found


def muon_matrices(model: ModelConfig) -> dict[tuple[int, int], int]:
    """How many there are of each shape."""
    mlp = 3 if model.mlp == "swiglu" else 2
    d, n = model.d_model, model.n_layers
    return {(d, d): 4 * n, (d, model.d_mlp): mlp * n}


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "grad_accum_steps"), [("mtlm2-40m", 2), ("mtlm1-88m", 1)])
def test_facts_of_the_compiled_step(name, grad_accum_steps):
    run, model = small(name, grad_accum_steps=grad_accum_steps)
    mesh = make_mesh(parse_mesh(run.mesh, CHIPS), open_slice("v5e:2x4"))
    step, _ = choose_step(run, model, mesh)
    module = Module(compile_step(step, run.batch, run.grad_accum_steps, mesh).as_text())

    kernels = {re.match(r"splash_mha_(\w+?)_", kernel)[1] for kernel, _ in module.kernels()}
    assert kernels == {"fwd", "dkv", "dq"}
    assert layer_product_types(module) == {"bf16"}
    logits = [
        array.size // model.vocab_size
        for instruction, _ in module.executed()
        for array in instruction.outputs
        if array.dtype == "f32" and model.vocab_size in array.dims and model.d_model not in array.dims
    ]
    assert max(logits) <= CHUNK  # those of a chunk at a time
    # Every gradient is summed over the chips once, in float32, outside all loops, along with the loss and the
    # cross-entropy.
    collectives = [c for c in module.collectives(CHIPS) if c.elements > 1]
    sums = [c for c in collectives if c.kind == "all-reduce"]
    assert {(c.group, c.loops, c.dtypes) for c in sums} == {(CHIPS, 0, ("f32",))}
    assert sum(c.elements for c in sums) == model.n_params + 2
    # Muon's products are shared among the chips, in bfloat16, and their results gathered once for each shape.
    matrices = muon_matrices(model)
    products = muon_products(module)
    assert {dtype for dtype, _ in products} == {"bf16"}
    assert sum(flops for _, flops in products) == muon_flops(matrices, CHIPS)
    gathers = [c for c in collectives if c.kind != "all-reduce"]
    assert {(c.kind, c.group, c.loops, c.dtypes) for c in gathers} == {("all-gather", CHIPS, 0, ("bf16",))}
    assert sorted(c.elements for c in gathers) == sorted(
        math.ceil(n / CHIPS) * CHIPS * small * large for (small, large), n in matrices.items()
    )
    assert module.n_donated == len(jax.tree.leaves(abstract_state(step, mesh)))
    assert module.host_transfers() == []


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_step_whose_weights_are_gathered(capsys):
    run, model = small("mtlm2-40m", grad_accum_steps=1, mesh="fsdp=4,tensor=2")
    report = json.loads(json.dumps(compile_and_report(run, model, "v5e:2x4")))
    in_layers = [
        c for c in report["collectives"] if (c["kind"], c["group"], c["loops"]) == ("all-gather", 4, 1)
    ]
    weights = 4 * model.d_model**2 + 2 * model.d_model * model.d_mlp
    # A layer gathers them for the forward and for the backward pass, a half of each on a chip, in bfloat16.
    assert sum(c["elements"] for c in in_layers) == 2 * weights / 2
    assert {tuple(c["dtypes"]) for c in in_layers} == {("bf16",)}
    # For Muon parts of the matrices of each of the two shapes are exchanged along both axes, there and back.
    # Outside the loops nothing of the size of a layer's matrix is gathered but tables and head.
    outside = [c for c in report["collectives"] if c["loops"] == 0]
    exchanges = Counter((c["group"], *c["dtypes"]) for c in outside if c["kind"] == "all-to-all")
    assert exchanges == {(4, "bf16"): 2 * 2, (2, "bf16"): 2 * 2}
    gathered = {
        c["elements"] for c in outside if c["kind"] == "all-gather" and c["elements"] > model.d_model**2
    }
    assert gathered == {model.vocab_size * model.d_model // 2, model.context * model.d_model}
    print_report(report)
    assert "host transfers: none" in capsys.readouterr().out
