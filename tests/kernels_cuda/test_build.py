"""The build without a GPU: what nvcc makes of the kernels, and what is said where there is no nvcc."""

import dataclasses
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from core.config import preset
from core.errors import UserError
from core.sharding import make_mesh
from kernels_cuda import bench, build, compiler, doctor, files, library, registry, xla
from kernels_cuda.ops import rotary
from tests.several_devices import ROOT
from train_tpu.backend import KernelsChoice, choose_kernels

NVCC = compiler.find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="needs nvcc, of the CUDA toolkit or the wheel nvidia-cuda-nvcc"
)
# Registers per thread beyond which fewer warps would be resident than each file's header counts on; of a file
# that is not listed 128, with which two blocks of 256 threads share a multiprocessor.
REGISTERS = {
    "rotary": 80,
    "softmax_loss": 40,
    "adamw": 64,
    "decode_project": 160,
    "decode_attention": 104,
    "swiglu": 168,  # at entry; its warpgroups exchange them
    "gelu": 168,
    "loss_product": 168,
    "qkv_product": 168,
}


def most_registers(name: str, kernel: str) -> int:
    """Two blocks of a product share a multiprocessor's 65,536; the head's of 64 by 64 may use all of it, and
    so may gradients of norms wider than 768."""
    budget = REGISTERS.get(name, 128)
    norm = re.search(r"backward_in_registers.*Li(\d+)E", kernel)
    if norm and int(norm[1]) > 768:
        return 256
    shape = re.search(r"7projectI\w*IntoE\dELi(\d)ELi(\d)ELi(\d)E", kernel)
    if shape is None:
        return budget
    slices, tiles, wide = map(int, shape.groups())
    of_two_blocks = 65536 // (2 * 32 * slices)
    return of_two_blocks if (tiles, wide) == (8, 4) else min(budget, of_two_blocks)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in compiler.SOURCES.glob("*.cu")))
def test_no_spills_no_local_memory_few_registers_whole_accesses(name: str, tmp_path: Path):
    warnings = ["-Xptxas", "-v,--warn-on-local-memory-usage,--warn-on-spills", "-Xptxas", "-Werror"]
    for architecture in ("8.0", "9.0"):
        code = compiler.generate_code((architecture,))
        cubin = tmp_path / f"{name}-{architecture}.cubin"
        command = [
            NVCC,
            *compiler.COMPILER_FLAGS,
            *code,
            *warnings,
            "-cubin",
            compiler.SOURCES / f"{name}.cu",
            "-o",
            cubin,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", done.stderr, re.S)
        assert used
        for kernel, registers in used:
            assert int(registers) <= most_registers(name, kernel), (architecture, kernel, registers)
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip(
            "spills and registers are fine; the disassembly needs nvdisasm (wheel nvidia-cuda-nvdisasm)"
        )
    for kernel, lines in kernels_of(disassembler, cubin).items():
        if name.startswith("decode_"):
            check_decode(kernel, lines)
        elif "7product" in kernel:
            check_products(kernel, lines)
        elif "add_partials" in kernel:
            pass  # rows of float32 side by side: 4 bytes a lane
        elif re.search(r"in_registers|in_shared|Li[48]E", kernel):  # the paths that read and write vectors
            loads = sum(bool(re.search(r"LDG\.\S*128|LDGSTS\.\S*128", line)) for line in lines)
            # Beside 16 bytes of float32, four bfloat16 are 8.
            stores = sum(bool(re.search(r"STG\.\S*(128|64)", line)) for line in lines)
            narrow = sum(bool(re.search(r"STG\.\S*(U16|U8)|LDG\.\S*(U16|U8)", line)) for line in lines)
            assert loads and stores, f"{kernel}: {loads} loads and {stores} stores of 16 bytes"
            if re.search(r"in_registers|rotate", kernel):
                assert not narrow, f"{kernel}: {narrow} accesses of an element"
        assert not any("LDL" in line or "STL" in line for line in lines), kernel


def check_decode(kernel: str, lines: list[str]) -> None:
    """Products on tensor cores; weights and cache are asked for before the wait for the kernel before."""
    (wait,) = (number for number, line in enumerate(lines) if "ACQBULK" in line)
    early = sum("LDG" in line and ".128" in line for line in lines[:wait])  # LDGSTS: into shared memory
    if "project" in kernel:
        assert any("HMMA.16816.F32.BF16" in line for line in lines), kernel
        _, wide, stages, _ = re.search(r"IntoE\dELi\dELi(\d)ELi(\d)ELi(\d)ELi(\d)E", kernel).groups()
        assert early >= 2 * int(wide) * int(stages), f"{kernel}: {early} loads of 16 bytes before the wait"
    elif "attend" in kernel:
        assert early == 8, f"{kernel}: {early} loads of 16 bytes before the wait"


def check_products(kernel: str, lines: list[str]) -> None:
    """Two halves of 64 rows by four steps of the inner dimension follow each other without a wait."""
    products = [line for line in lines if "HGMMA" in line or "WARPGROUP.DEPBAR" in line]
    assert ["HGMMA.64x128x16" in line for line in products] == [True] * 8 + [False] * 2, kernel


def test_jax_knows_the_widths_of_the_norms():
    of_file = re.search(r"#define WIDTHS (.*)", (compiler.SOURCES / "rms_norm.cu").read_text())[1]
    assert tuple(map(int, of_file.split(","))) == xla.WIDTHS


def test_both_engines_know_the_heads_of_the_product_of_q_k_and_v():
    of_file = re.search(r"dispatch<(.*?)>", (compiler.SOURCES / "qkv_product.cu").read_text())[1]
    assert tuple(map(int, of_file.split(","))) == xla.HEAD_SIZES == rotary.HEAD_SIZES


@pytest.mark.parametrize(
    ("name", "hopper", "changes", "says"),
    [
        ("mtlm1-200m", True, {}, "rotation of q and k in their product (in bfloat16, without LoRA), AdamW"),
        ("mtlm2-40m", True, {}, "packing of q, k and v in their product (in bfloat16, without LoRA), AdamW"),
        ("mtlm1-200m", False, {}, "rotation of q and k, AdamW"),
        ("mtlm1-200m", True, {"qk_norm": True}, "rotation of q and k, AdamW"),
        ("mtlm1-200m", True, {"head_dim": 32}, "rotation of q and k, AdamW"),
    ],
)
def test_a_run_says_what_rotates(name: str, hopper: bool, changes: dict, says: str):
    model = dataclasses.replace(preset(name), **changes)
    chosen = KernelsChoice(xla.make(132, hopper), "as built")
    assert chosen.describe(model, make_mesh(devices=jax.devices()[:1])).startswith(f"cuda: {says}")


def find_disassembler() -> str | None:
    return next(
        (str(path) for folder in sys.path if (path := Path(folder) / "nvidia/cu13/bin/nvdisasm").is_file()),
        shutil.which("nvdisasm"),
    )


def kernels_of(disassembler: str, cubin: Path) -> dict[str, list[str]]:
    """The instructions of each kernel, by its mangled name."""
    command = [disassembler, "-c", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *sections = re.split(r"^//-+ \.text\.(\S+) +-+$", said, flags=re.M)
    return {name: body.splitlines() for name, body in zip(sections[::2], sections[1::2], strict=True)}


@needs_nvcc
@pytest.mark.slow
def test_the_file_has_every_op_and_says_what_it_is(tmp_path: Path):
    built = tmp_path / "kernels.so"
    compiler.build(built, ("9.0",))
    facts = compiler.made_of(built)
    assert facts["architectures"] == ["9.0"] and facts["sources"] == compiler.sources_hash()
    data = built.read_bytes()
    for op in vars(registry.reference).keys() - {"linear_cross_entropy"}:  # which is made of another
        assert op.encode() in data
    assert not list(tmp_path.glob("*.partial"))


# In a process of its own: what is registered with XLA stays.
REGISTER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from kernels_cuda import compiler, xla
from tests.checks import require
file = Path(sys.argv[1])
compiler.build(file, ("9.0",), compiler.XLA)
facts = compiler.made_of(file)
require(facts["interface"] == compiler.ffi_version() and compiler.XLA.why_not(facts) is None, facts)
xla.register(str(file))
"""


@needs_nvcc
@pytest.mark.slow
def test_the_file_for_jax_loads_and_registers_without_a_gpu(tmp_path: Path):
    command = [sys.executable, "-c", REGISTER, tmp_path / "kernels.so"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("home", ["given", "without nvcc", "", None])
def test_nvcc_is_that_of_cuda_home_then_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home):
    """An empty CUDA_HOME is none: once /usr/local/cuda came before the PATH then."""
    for folder in ("given/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("CUDA_HOME", home and str(tmp_path / home))
    assert compiler.find_nvcc() == tmp_path / ("given/bin/nvcc" if home == "given" else "path/nvcc")


def test_a_file_for_jax_is_refused_by_an_older_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "PACKAGE", tmp_path)
    monkeypatch.setattr(compiler, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    major, minor = map(int, compiler.ffi_version().split("."))
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")

    def found(interface: str) -> files.Source:
        facts = {
            "architectures": ["9.0"],
            "sources": compiler.sources_hash(compiler.XLA),
            "interface": interface,
        }
        compiler.put_sealed(b"code", facts, compiler.XLA.built)
        return xla.find(hopper)

    assert "no file is built and there is no nvcc" in xla.find(hopper).reason
    assert found(f"{major}.{minor}").file == found(f"{major}.0").file == compiler.XLA.built
    for newer in (f"{major}.{minor + 1}", f"{major + 1}.0"):
        assert f"needs version {newer} of the framework's interface" in found(newer).reason
    # What is there but no library: its own words, and no silent XLA.
    found("0.0")
    kernels, why = xla.load(hopper)
    assert kernels is None and "does not load" in why
    with pytest.raises(UserError, match=r"--kernels cuda cannot be used: .*does not load"):
        choose_kernels("cuda", hopper)
    assert choose_kernels("auto", hopper).describe(preset("mtlm2-40m"), None).startswith("xla: ")


def test_without_nvcc_one_sentence_and_exit_code_2(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from kernels_cuda import build, compiler; "
         "compiler.find_nvcc = lambda: None; "
         "sys.argv = ['build']; build.run_command(build.main)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: no nvcc found: install the CUDA toolkit")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hopper", "'hopper' is not an architecture"),
        ("9.0+SASS", "is not an architecture"),
        ("7.5", "older than 8.0"),
    ],
)
def test_wrong_architectures(given: str, said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        compiler.generate_code((given,))


def test_which_gpus_a_file_serves(tmp_path: Path):
    assert compiler.generate_code(("9.0+PTX",)) == [
        "-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_90,code=compute_90",
    ]  # fmt: skip
    assert compiler.serves(["8.0", "9.0+PTX"], (8, 6))  # machine code of the same major version
    assert compiler.serves(["8.0", "9.0+PTX"], (12, 0))  # the PTX
    assert not compiler.serves(["9.0"], (8, 0))
    assert not compiler.serves(["9.0"], (10, 0))
    for architectures, hopper in ((["8.0", "9.0+PTX"], True), (["8.0+PTX"], False)):  # both run on Hopper
        compiler.put_sealed(b"code", {"architectures": architectures}, tmp_path / "built.so")
        assert compiler.serves(architectures, (9, 0)) and compiler.has_hopper(tmp_path / "built.so") == hopper


def test_without_a_gpu_pytorch_runs_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert library.load().file is None
    assert library.load().file is None
    assert capsys.readouterr().err.count("plain PyTorch, because") == 1  # said once
    for loaded in (library._loaded, None):
        monkeypatch.setattr(library, "_loaded", loaded)
        with pytest.raises(UserError, match="cannot use the CUDA kernels"):
            library.load("cuda")
        assert not capsys.readouterr().err  # the refusal says it
    assert not registry.kernels_loaded()
    used = [why for name, why in doctor.facts() if name == "used"]
    assert used[0].startswith("plain PyTorch, because") and used[1].startswith("XLA's operations, because")


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hopper GPU and no compiler, as far as the search for a built file can see; where it looks for one."""
    built = tmp_path / "mtlm_kernels.so"
    monkeypatch.setattr(compiler, "PACKAGE", tmp_path)
    monkeypatch.setattr(compiler, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    return built


def facts_of(*architectures: str, sources: str | None = None) -> dict:
    return {"architectures": list(architectures), "sources": sources or compiler.sources_hash()}


def test_a_built_file_is_used_only_for_its_sources_and_gpus(hopper: Path, monkeypatch: pytest.MonkeyPatch):
    def found(facts: dict) -> library.Source:
        compiler.put_sealed(b"code", facts, hopper)
        return library.find()

    assert "no file is built and there is no nvcc" in library.find().reason
    assert "built from other sources" in found(facts_of("9.0", sources="other")).reason
    assert "is for 8.0, not for (9, 0)" in found(facts_of("8.0")).reason
    assert found(facts_of("8.0", "9.0")).file == hopper
    monkeypatch.setattr(compiler, "COMPILER_FLAGS", (*compiler.COMPILER_FLAGS, "--use_fast_math"))
    assert "built from other sources" in library.find().reason  # the same ones, compiled otherwise


def test_no_byte_of_a_built_file_may_change(hopper: Path):
    """1,000 flips in the file and its .json; either of them alone; both of other builds."""
    draw = random.Random(0)
    compiler.put_sealed(draw.randbytes(3000), facts_of("8.0", "9.0+PTX") | {"nvcc": "13.0"}, hopper)
    assert library.find().file == hopper
    sealed = {path: path.read_bytes() for path in (hopper, hopper.with_suffix(".json"))}
    for path, data in sealed.items():
        for _ in range(500):
            flipped = bytearray(data)
            flipped[draw.randrange(len(data))] ^= draw.randrange(1, 256)
            path.write_bytes(flipped)
            assert compiler.made_of(hopper) is None
        found = library.find()
        assert found.file is None and "mtlm_kernels.so or mtlm_kernels.json is damaged" in found.reason
        path.unlink()
        assert library.find().file is None
        path.write_bytes(data)
    assert library.find().file == hopper
    # A build that is interrupted between its two files leaves the new code with the old facts.
    hopper.write_bytes(b"new code")
    assert library.find().file is None


FAILING_NVCC = """#!/bin/sh
echo 'gcc: error: unsupported version' >&2
exit 1
"""


def test_where_nothing_can_be_compiled_pytorch_runs(
    hopper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAILING_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setattr(compiler, "find_nvcc", lambda: nvcc)
    assert library.load("auto").file is None and library.load("auto").file is None
    said = capsys.readouterr().err
    assert said.count("fails with exit code 1 (gcc: error: unsupported version)") == 1
    assert said.count("kernels: plain PyTorch, because no file is built and none could be compiled") == 1
    with pytest.raises(UserError, match=r"cannot use the CUDA kernels: .*unsupported version"):
        library.load("cuda")
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(compiler, "CACHE", nvcc / "below a file")
    assert "none could be kept" in library.load("auto").reason and str(nvcc) in library.load("auto").reason


@pytest.mark.parametrize("module", [doctor, build, bench])
def test_an_unknown_flag_is_refused(module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("sys.argv", [module.__name__, "--no-such-flag"])
    advice = f"python -m {module.__name__} --help-all lists all options"
    with pytest.raises(UserError, match=f"^there is no option --no-such-flag: {advice}$"):
        module.main()
    assert capsys.readouterr() == ("", "")
