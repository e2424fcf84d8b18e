"""How commands end."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from core.cache import CACHE
from core.errors import os_error, tell
from tests.several_devices import ROOT

LOST_CTRL_C = """
import os, signal, time
from core.errors import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

def main():
    dying = Dying()
    del dying
    time.sleep(20)

run_command(main)
"""


def test_ctrl_c_within_a_destructor_is_not_lost():
    """Python prints it and goes on; the command ends all the same."""
    done = subprocess.run([sys.executable, "-c", LOST_CTRL_C], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "interrupted\n", done.stderr


ONE_OF_SEVERAL = """
import sys, threading, time
from core import processes
from core.errors import run_command
from core.watch import Watch

class Store:
    # In place of JAX's: an only process has nobody to hear from.
    def key_value_set(self, *_, **__): ...
    def key_value_dir_get(self, _): return []

processes._watch = Watch(Store(), rank=1, size=2, silence=1000)
threading.Thread(target=time.sleep, args=(100,)).start()  # for others, who wait for this one

def main():
    with processes.leaving_at_once():
        print("said")
        raise eval(sys.argv[1])

run_command(main)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("processes.UserError('no')", 2, "error: no\n"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("OSError(28, 'No space left', 'f')", 2,
                 "error: the disk is full writing f: free some space and run the command again\n"),
                ("KeyboardInterrupt()", 130, "interrupted\n"),
                ("BrokenPipeError()", 1, ""),
            )
        ),
    ],
)  # fmt: skip
def test_one_process_of_several_ends_as_one_alone_but_at_once(error: str, code: int, said: str):
    command = [sys.executable, "-c", ONE_OF_SEVERAL, error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "said\n", said)


def test_what_the_terminals_encoding_lacks_is_escaped():
    code = "from core.errors import run_command; run_command(lambda: print('\\xe9 \\u4e2d'))"
    environ = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\xe9 \\u4e2d\n", b"")


def test_ours_keep_their_traceback():
    command = [sys.executable, "-c", ONE_OF_SEVERAL, "AssertionError('ours')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "AssertionError: ours" in done.stderr


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
               errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EEXIST, errno.EBUSY]
)  # fmt: skip
def test_what_the_system_refuses_is_one_sentence_with_the_path(number: int):
    sentence = os_error(OSError(number, os.strerror(number), "some/file"))
    assert sentence.startswith(f"some/file: {os.strerror(number)}: ") and "\n" not in sentence


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path: Path, monkeypatch):
    def said(path: Path) -> str:
        return os_error(OSError(errno.EROFS, os.strerror(errno.EROFS), str(path)))

    assert "MTLM_CACHE" in said(CACHE / "text") and "MTLM_CACHE" in said(CACHE)
    monkeypatch.setattr("core.errors.CACHE", tmp_path / "home/.cache/mtlm")
    assert "MTLM_CACHE" in said(tmp_path / "home/.cache")  # to be made for it
    assert "MTLM_CACHE" not in said(tmp_path)  # is there
    assert "MTLM_CACHE" not in said(tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "out of memory"), (errno.EDQUOT, "the disk is full")],
)
def test_a_limit_of_the_machine_needs_no_path(number: int, advice: str):
    assert advice in os_error(OSError(number, os.strerror(number)))


def test_what_the_system_refuses_a_library_in_rust(tmp_path: Path, capsys):
    """tokenizers and safetensors raise no OSError. A limit for files stands for a disk that is full."""
    none, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))
    try:
        with pytest.raises(Exception, match="too large") as of_tokenizers:
            tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "a"))
        with pytest.raises(Exception, match="too large") as of_safetensors:
            safetensors.numpy.save_file({"a": np.zeros(9)}, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (none, most))
    for error in (of_tokenizers.value, of_safetensors.value):
        assert not isinstance(error, OSError) and tell(error) == 2
        said = capsys.readouterr().err
        assert said == "error: the disk is full: free some space and run the command again\n"
    assert tell(ValueError("of ours (os error 28) in the middle")) is None


def test_an_os_error_that_says_nothing_to_a_user_keeps_its_traceback():
    assert os_error(OSError("a library's own")) is None
    assert os_error(OSError(errno.EPIPE, "Broken pipe")) is None


STARTED_WITHOUT = """
import os, sys

for descriptor in map(int, sys.argv[2:]):
    os.close(descriptor)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
OPENS_A_FILE = """
import core, os, sys

file = open("made", "w")
print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
os.write(1, b"a library's\\n")
os.write(2, b"a library's\\n")
file.write(f"{file.fileno() > 2} {sys.stdout.isatty()} {sys.stderr.isatty()}")
"""


@pytest.mark.parametrize("closed", [("1",), ("2",), ("0", "1", "2")])
def test_a_process_without_standard_streams_writes_into_none_of_its_files(tmp_path: Path, closed):
    command = [sys.executable, "-c", STARTED_WITHOUT, OPENS_A_FILE, *closed]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "made").read_text() == "True False False"
    assert done.returncode == 0
    assert done.stdout == ("" if "1" in closed else "to stdout\na library's\n")
    assert done.stderr == ("" if "2" in closed else "to stderr\na library's\n")


INTERRUPTED_BESIDE_A_THREAD = """
import threading, time
from core.errors import run_command

threading.Thread(target=time.sleep, args=(100,)).start()  # as a compiler's, which Python's end would wait for

def main():
    print("said")
    raise KeyboardInterrupt

run_command(main)
"""


def test_ctrl_c_ends_a_command_without_pythons_own_end():
    """While XLA compiles in threads of its own, that ends in a segmentation fault."""
    command = [sys.executable, "-c", INTERRUPTED_BESIDE_A_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "said\n", "interrupted\n")


INTERRUPTED_IMPORT = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "tyro":  # every command imports it, at its top
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize(
    "module", ["train_tpu.run", "stacking.grow", "core.generate", "port_torch.convert", "eval.run"]
)
def test_ctrl_c_while_modules_are_imported(tmp_path: Path, module: str):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
