"""Run by test_meshes.py in a process of 8 devices: which CUDA calls a step makes on a mesh, on each device's
own part of the arrays, and in whose memory. Nothing is compiled, so no GPU is needed."""

import dataclasses
import re

import jax

from core.config import preset
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh, parse_mesh
from kernels_cuda import xla
from tests.checks import require
from train_tpu.step import GuardConfig, StepConfig, lower_step

ROWS, CHUNK, CONTEXT, VOCAB = 16, 512, 256, 32000
IN_PLACE = {"rotary": [0, 1]}  # which arguments' memory the results get


def calls(name: str, mesh_text: str, optimizer: str) -> dict[str, list[tuple[list[str], list[int]]]]:
    """The shapes of the arguments of each call, and which of them are overwritten."""
    shape = parse_mesh(mesh_text, 8)
    mesh = make_mesh(shape, jax.devices())
    model = dataclasses.replace(preset(name), context=CONTEXT, n_layers=2)
    compute = Compute("bfloat16", unroll=2, mesh=mesh, kernels=xla.make(132, hopper=True))
    optim = OptimizerConfig(optimizer=optimizer)
    text = lower_step(StepConfig(model, optim, GuardConfig(), compute, 0.0, CHUNK), ROWS, 1, mesh).as_text()
    found: dict[str, list[tuple[list[str], list[int]]]] = {}
    for line in re.findall(r"stablehlo\.custom_call @mtlm_.*", text):
        op = re.match(r"stablehlo\.custom_call @mtlm_(\w+)_[0-9a-f]{12}\(", line)[1]
        arguments = re.findall(r"tensor<(\S+)>", line.rpartition(" : (")[2].partition(") -> ")[0])
        overwritten = [int(n) for n in re.findall(r"operand_index = (\d+)", line)]
        found.setdefault(op, []).append((arguments, overwritten))
    return found


for name, heads, width in (("mtlm1-200m", 12, 768), ("mtlm2-40m", 6, 384)):
    rotates = name == "mtlm1-200m"
    for text, data, tensor in (("data=8", 8, 1), ("fsdp=8", 8, 1), ("data=2,fsdp=2,tensor=2", 4, 2)):
        for optimizer in ("adamw", "muon"):
            found, own = calls(name, text, optimizer), ROWS // data
            rows = own * CONTEXT
            expected = {"add_rms_norm", "rms_norm_backward", "adamw"}
            expected |= {"loss_product"} if tensor == 1 else set()
            if text == "data=8":
                expected |= {"qkv_product", "rotary_pack"}
                qkv = [f"{rows}x{width}xbf16", f"{width}x{3 * width}xbf16"]
                qkv += 2 * [f"1x{CONTEXT}x32xf32"] if rotates else [f"{3 * width}xf32"]
                require(found["qkv_product"][0][0] == qkv, name, found)
                product = "swiglu_product" if rotates else "gelu_product"
                expected |= {product, f"{product}_backward"}
                of_up = ["768x4352xbf16"] if rotates else ["384x1024xbf16", "1024xf32"]
                require(found[product][0][0] == [f"{rows}x{width}xbf16", *of_up], name, found)
            elif rotates:
                expected |= {"rotary"}
                local = f"{own}x{CONTEXT}x{heads // tensor}x64xbf16"
                require(all(call[0][:2] == [local] * 2 for call in found["rotary"]), name, text, found)
            require(found.keys() == expected, name, text, sorted(found), sorted(expected))
            for op, overwritten in IN_PLACE.items():
                require(all(call[1] == overwritten for call in found.get(op, ())), name, text, op, found)
            norms = [call[0][0] for op in ("add_rms_norm", "rms_norm_backward") for call in found[op]]
            require(set(norms) == {f"{rows}x{width}xbf16"}, name, text, norms)
            if tensor == 1:
                ((arguments, _),) = found["loss_product"]
                of_rows = [f"{min(rows, CHUNK)}x{width}xbf16", f"{VOCAB}x{width}xbf16"]
                require(arguments == [*of_rows, f"{min(rows, CHUNK)}xi32"], arguments)
            require(len(found["adamw"]) == 2, name, text, found["adamw"])  # what decays, and what does not
            for arguments, overwritten in found["adamw"]:
                n = (len(arguments) - 4) // 4
                require(arguments[:4] == ["f32", "f32", "f32", "i1"], arguments)
                require(overwritten == [*range(4, 4 + n), *range(4 + 2 * n, 4 + 4 * n)], name, overwritten)
            table = f"{VOCAB // tensor}x{width // (8 if text == 'fsdp=8' else 2 if tensor > 1 else 1)}xf32"
            require(
                any(table in arguments for arguments, _ in found["adamw"]), name, text, table, found["adamw"]
            )
print("ok")
