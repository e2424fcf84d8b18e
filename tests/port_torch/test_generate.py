"""Text from a folder: greedy equal to core's, drawn as the definitions say, in whole files or none."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import core.generate
import port_torch.sampling
from core.batch_file import mark_of, read_prompts
from core.cli import shell_quoted
from core.errors import UserError
from core.generation import Generator
from core.model import Compute
from core.sampling import Sampling
from port_torch.decoding import Decoding
from port_torch.generate import main
from port_torch.model import load
from port_torch.sampling import choose, open_writer, stream
from tests.models import random_params
from tests.p_values import chi_square
from tests.port_torch.folders import SMALL, write_checkpoint, write_export
from tests.train_tpu.processes import start

LENGTHS = (1, 5, 16, 21)
GREEDY = Sampling(temperature=0)
ONE_KIND = pytest.mark.parametrize("case", ["gpt"], indirect=True)  # what does not depend on the model


@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.slow), "gpt"])
def case(request, tmp_path_factory):
    """(config, parameters, model in torch, its folder, the checkpoint) of both kinds of model."""
    config = dataclasses.replace(SMALL[request.param], context=40)
    params = random_params(config)
    parent = tmp_path_factory.mktemp(request.param)
    folder = write_export(parent / "folder", config, params)
    checkpoint = write_checkpoint(parent / "checkpoint", config, params)
    return config, params, load(folder), folder, checkpoint


def make_prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n).tolist() for n in LENGTHS]


def complete(*args, **kwargs) -> list[list[int]]:
    columns = list(stream(*args, **kwargs))
    return [[t for t in row if t is not None] for row in zip(*columns, strict=True)]


def test_greedy_equals_core(case):
    config, params, model, _, _ = case
    prompts = make_prompts(config.vocab_size)
    wanted = Generator(config, Compute()).complete(params, prompts, GREEDY, 1000)
    assert complete(model, prompts, GREEDY, 1000) == wanted
    assert [len(text) for text in wanted] == [config.context - n for n in LENGTHS]


def test_a_row_ends_at_eos_and_is_the_same_in_any_batch(case):
    config, params, model, _, _ = case
    prompts = make_prompts(config.vocab_size)
    eos = complete(model, prompts, GREEDY, 15)[1][6]
    wanted = Generator(config, Compute()).complete(params, prompts, GREEDY, 15, eos)
    assert complete(model, prompts, GREEDY, 15, eos) == wanted
    drawn = complete(model, prompts, Sampling(temperature=1.0), 12)
    for row in range(len(prompts)):
        alone = complete(model, [prompts[row]], Sampling(temperature=1.0), 12, first_row=row)
        assert alone == [drawn[row]]
    assert complete(model, prompts, Sampling(temperature=1.0, seed=1), 12) != drawn


@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[1] * 40], [[1], [1] * 41]])
def test_prompts_that_cannot_be(case, prompts):
    with pytest.raises(UserError):
        complete(case[2], prompts, GREEDY, 5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.8), (1.5, 6, 0.7), (1.0, 1, 1.0), (1.0, 0, 1e-6),
     (1.0, 50, 1.0)],
)  # fmt: skip
def test_draws_have_the_distribution(temperature, top_k, top_p):
    """Against numpy, from the definitions: sorted, cut to k, then to the first that reach p, then scaled."""
    scores = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    p = np.exp(scores.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k or 12 :]] = 0
    p /= p.sum()
    if top_p < 1:
        p[order[1 + np.searchsorted(np.cumsum(p[order]), top_p) :]] = 0
        p /= p.sum()
    n = 20_000
    uniform = torch.from_numpy(np.random.default_rng(2).random(n))
    draws = choose(torch.from_numpy(scores).expand(n, -1), Sampling(temperature, top_k, top_p), uniform)
    counts = np.bincount(draws, minlength=12)
    np.testing.assert_array_equal(counts > 0, p > 0)
    if (p > 0).sum() > 1:
        # One in a million of right samplers would fail this; the seed is fixed.
        assert chi_square(counts[p > 0], n * p[p > 0]) > 1e-6


@ONE_KIND
def test_a_row_draws_the_numbers_of_its_seed_and_place(case, monkeypatch):
    """To the last bit of float64: NumPy's generators of (seed, row), one number a token."""
    config, _, model, folder, _ = case
    given: list[list[float]] = []

    def keep(scores, sampling, uniform):
        given.append(uniform.tolist())
        return choose(scores, sampling, uniform)

    monkeypatch.setattr(port_torch.sampling, "choose", keep)
    complete(model, make_prompts(config.vocab_size)[:2], Sampling(1.0, seed=5), 6, first_row=3)
    expected = [np.random.default_rng((5, row)).random(6).tolist() for row in (3, 4)]
    assert given == [list(pair) for pair in zip(*expected, strict=True)]
    writer = open_writer(folder, Sampling(seed=5), 6, Decoding(device="cpu"))
    for write in (lambda: list(writer.added([[1, 2]])), lambda: writer.print(["ab"])):
        given.clear()
        write()
        assert given[0] == [np.random.default_rng((5, 0)).random()]
    assert writer.computed() == {"dtype": "torch.float32", "device": "cpu", "backend": "torch"}


def test_equal_tokens_have_equal_parts_of_the_random_numbers():
    """Each part begins where the one before it ends, and has its beginning: 1/4 draws the second of four."""
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    drawn = choose(torch.zeros(8, 4), Sampling(1.0), uniform).tolist()
    assert sorted(drawn[:4]) == [0, 1, 2, 3] and drawn[4:] == drawn[:4]


def test_the_largest_random_number_draws_a_token_that_is_kept():
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    almost_one = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose(scores, Sampling(1.0), almost_one).item() == 0
    assert choose(scores, Sampling(1.0, top_k=2), almost_one).item() == 1


# --- the command ---


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command's main() in this process; gives what it printed on stdout."""

    def call(main, *arguments) -> str:
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        assert main() == 0
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_the_command_prints_what_cores_prints(case, call):
    _, _, _, folder, checkpoint = case
    greedy = ("--temperature", "0", "--max-new-tokens", "20")
    for prompts in (("--prompt", "Grüße", "--prompt", "bc"), ()):
        ours = call(main, folder, *prompts, *greedy)
        assert ours == call(core.generate.main, checkpoint, *prompts, *greedy)
        assert len(ours) > 5


def test_a_file_of_prompts(case, call, tmp_path):
    prompts = [{"prompt": f"Number {i}", "id": i} for i in range(5)]
    given = tmp_path / "prompts.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in prompts))
    common = (case[3], "--batch-file", given, "--max-new-tokens", "8", "--temperature", "1")
    call(main, *common, "--out", tmp_path / "a.jsonl", "--batch", "2")
    texts = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{k: line[k] for k in ("prompt", "id")} for line in texts] == prompts
    assert all(isinstance(line["text"], str) and line["text"] for line in texts)
    call(main, *common, "--out", tmp_path / "b.jsonl", "--batch", "5")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "prompts.jsonl"]
    with pytest.raises(UserError, match="exists already"):
        call(main, *common, "--out", tmp_path / "a.jsonl")


@pytest.mark.slow
@ONE_KIND
def test_a_file_of_prompts_as_core_makes_it(case, call, tmp_path):
    """Greedy texts are the same; batches of core are filled up, and its rows drawn as single prompts are."""
    _, _, _, folder, checkpoint = case
    given = tmp_path / "prompts.jsonl"
    given.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "Grüße", "bc")))
    greedy = ("--batch-file", given, "--max-new-tokens", "8", "--temperature", "0", "--batch", "2")
    call(main, folder, *greedy, "--out", tmp_path / "torch.jsonl")
    call(core.generate.main, checkpoint, *greedy, "--out", tmp_path / "jax.jsonl")
    assert (tmp_path / "torch.jsonl").read_text() == (tmp_path / "jax.jsonl").read_text()
    drawn = ("--max-new-tokens", "8", "--temperature", "1")
    call(
        core.generate.main, checkpoint, "--batch-file", given, *drawn, "--batch", "2", "--out", tmp_path / "d"
    )
    texts = [json.loads(line) for line in (tmp_path / "d").read_text().splitlines()]
    alone = call(core.generate.main, checkpoint, *drawn, *(f"--prompt={row['prompt']}" for row in texts))
    assert alone == "".join(f"{row['prompt']}{row['text']}\n-----\n" for row in texts)


def test_instructions(folder, call):
    """Put into the form of the rows that a model was tuned on; the shell's form of a prompt is the prompt."""
    short = ("--max-new-tokens", "3", "--temperature", "0")
    instruction = ("--prompt", "Add.", "--prompt-format", "instruction", "--input", "1, 2")
    asked = call(main, folder, *instruction, *short)
    form = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    assert asked.startswith(form) and asked == call(main, folder, "--prompt", form, *short)
    with pytest.raises(UserError, match="--prompt-format instruction"):
        call(main, folder, "--prompt", "Add.", "--input", "1")
    for text in (form, "it's a \\ 'b'\t", "plain"):
        command = f"printf %s {shell_quoted(text)}"
        assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == text


@ONE_KIND
@pytest.mark.parametrize("generate", [main, pytest.param(core.generate.main, marks=pytest.mark.slow)])
def test_what_is_piped_in_is_the_prompt(generate, case, call, tmp_path, monkeypatch):
    folder = case[3] if generate is main else case[4]
    greedy = ("--max-new-tokens", "5", "--temperature", "0")
    (tmp_path / "prompt").write_text("Grüße\n")
    with (tmp_path / "prompt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert call(generate, folder, *greedy) == call(main, case[3], "--prompt", "Grüße", *greedy)
    monkeypatch.setattr("sys.stdin", None)  # closed
    assert call(generate, folder, *greedy) == call(main, case[3], "--prompt", "", *greedy)
    (tmp_path / "prompt").write_bytes(b"\xff")
    with (tmp_path / "prompt").open() as file, pytest.raises(UserError, match="is not UTF-8"):
        monkeypatch.setattr("sys.stdin", file)
        call(generate, folder, *greedy)


@pytest.mark.slow
@ONE_KIND
def test_tiny_temperatures_and_shares_mean_the_same(case, call):
    """The likeliest token, in JAX and in PyTorch; in float32 1e-310 is 0, and PyTorch divided by it."""
    _, _, _, folder, checkpoint = case
    wanted = call(main, folder, "--prompt", "a", "--temperature", "0", "--max-new-tokens", "8")
    assert Sampling(temperature=1e-9) == GREEDY
    for settings in (("--temperature", "1e-310"), ("--top-p", "1e-310")):
        common = ("--prompt", "a", *settings, "--max-new-tokens", "8")
        assert call(main, folder, *common) == call(core.generate.main, checkpoint, *common) == wanted


def test_refusals(case, call, tmp_path):
    folder = case[3]

    def refuse(sentence: str, *arguments) -> None:
        with pytest.raises(UserError, match=sentence):
            call(main, *arguments)

    refuse("is not there", tmp_path / "nothing")
    refuse("go together", folder, "--out", tmp_path / "x")
    refuse("not both", folder, "--batch-file", "a", "--out", tmp_path / "x", "--prompt", "b")
    refuse("--max-new-tokens is 0; it must be positive", folder, "--max-new-tokens", "0")
    if not torch.cuda.is_available():
        refuse("no NVIDIA GPU", folder, "--device", "cuda")
    refuse("the tokenizers differ", folder, "--prompt", "a", "--tokenizer", "mistral")
    refuse("context is 40", folder, "--prompt", "a" * 100)
    bad = tmp_path / "bad.jsonl"
    batch = (folder, "--batch-file", bad, "--out", tmp_path / "new.jsonl")
    refuse("cannot be read", *batch)
    for content, sentence in (
        ("", "is empty"), ("{", "line 1 is not JSON"), ('{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ('{"prompt": "a"}\n' + json.dumps({"prompt": "b" * 100}), "prompt 2 is 101 tokens long"),
    ):  # fmt: skip
        bad.write_text(content)
        refuse(sentence, *batch)
    assert list(tmp_path.iterdir()) == [bad]


def test_a_prompt_may_hold_other_line_ends(tmp_path):
    """Those that JSON leaves within a string, as `--out` writes them, too."""
    lines = [{"prompt": "a\u2028b\u0085c", "id": 1}, {"prompt": "d"}]
    (tmp_path / "prompts.jsonl").write_text(
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    assert read_prompts(tmp_path / "prompts.jsonl") == lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One exported folder, for the tests that need a process of their own."""
    config = SMALL["llama"]
    return write_export(tmp_path_factory.mktemp("export") / "folder", config, random_params(config))


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(folder, cache, tmp_path):
    given, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    given.write_text('{"prompt": "a"}\n' * 5000)
    process = start(
        cache, folder, "--batch-file", given, "--out", out, "--batch", "1", module="port_torch.generate"
    )
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: " in err
    n = len([json.loads(line)["text"] for line in out.read_text().splitlines()])
    assert 3 <= n < 5000 and f"{n} of 5000 prompts are in" in err
    assert sorted(tmp_path.iterdir()) == [given, out, mark_of(out)]


@pytest.mark.slow
def test_a_terminal_is_asked_again_and_again(folder, cache):
    """On a terminal of its own: two texts, the second stopped by nothing, then Ctrl-D."""
    ours, theirs = pty.openpty()
    process = start(
        cache,
        folder,
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        module="port_torch.generate",
        stdin=theirs,
    )
    os.close(theirs)
    for text in (b"first\n", b"second\n", b"\x04"):
        os.write(ours, text)
        time.sleep(0.1)
    out, err = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0, err
    assert "first" in out and "second" in out and "Ctrl-D" in err


@pytest.mark.slow
def test_jax_takes_no_device():
    """Beside PyTorch on a GPU, JAX would take three quarters of its memory."""
    program = (
        "import sys, port_torch.finetune, port_torch.generate, train_tpu.finetune\n"
        "from tests.checks import require\n"
        "require(not {'torch', 'jax'} & set(sys.modules))\n"  # malformed rows are told before
        "import port_torch.sampling, core.config, port_torch.names\n"
        "port_torch.names.exported_tensors(core.config.preset('mtlm1-tiny'))\n"
        "from jax._src import xla_bridge\n"
        "require(not xla_bridge._backends, xla_bridge._backends)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
