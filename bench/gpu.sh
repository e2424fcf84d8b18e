#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, one after the other: the kernels built, the tests, all tables and plots.
#
#     bash bench/gpu.sh OUT                # OUT: a new folder for what each step writes; three quarters of an hour, by its parts
#     bash bench/gpu.sh OUT DATA ROWS      # and bench.train_mirror: DATA prepared with mistral and context 1024,
#                                          # ROWS of instructions, JSONL
#
# Let nothing else run meanwhile: steps of a few milliseconds wait for a busy host. A step that fails is named, and
# the next one begins; the exit code is 1 then.
set -uo pipefail
trap 'echo; exit 130' INT

fail() {
    echo "error: $1" >&2
    exit 2
}
(($# == 1 || $# == 3)) || fail "give OUT, or OUT DATA ROWS"
[[ ! -e $1 ]] || fail "$1 exists already: choose another folder, or remove it first"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    fail "PyTorch is missing or sees no GPU: pip install -c constraints.txt -e '.[cuda,dev]' in an active environment"
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
failed=()

step() { # NAME COMMAND...: its output goes into OUT/NAME.log
    local name=$1 begun=$SECONDS code
    shift
    printf '%-14s ' "$name"
    "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "$((SECONDS - begun)) s$( ((code == 0)) || echo ", failed with $code: the end of $out/$name.log says why")"
    ((code == 0)) || failed+=("$name")
}

step build python -m kernels_cuda.build
step doctor python -m kernels_cuda.doctor
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
# As `make test-gpu`, with the active environment. The processes see one GPU each; the tests of two GPUs need others.
tests() { JAX_PLATFORMS=cuda python -m pytest -q --dist worksteal "$@"; }
step tests tests -n auto -m "gpu and not two_gpus"
((gpus < 2)) || CUDA_VISIBLE_DEVICES=0,1 step two-gpus tests -n 4 -m two_gpus
step kernels python -m kernels_cuda.bench --json "$out/kernels.json" --plot "$out/kernels.png"
step train python -m bench.train --json "$out/train.json" --plot "$out/train.png" --profile "$out/train-profile"
step decode python -m bench.decode --preset mtlm1-200m --preset mtlm2-40m --preset smollm2-135m \
    --json "$out/decode.json" --plot "$out/decode.png" --profile "$out/decode-profile"
step jax python -m bench.step --kernels auto xla --json "$out/jax.json"
step ladder python -m bench.ladder --json "$out/ladder.json" --plot "$out/ladder.png"
((gpus < 2)) || step devices python -m bench.devices --json "$out/devices.json"
(($# == 1)) || step mirror python -m bench.train_mirror --data "$2" --rows "$3" --out "$out/mirror"

((${#failed[@]} == 0)) || {
    echo "failed: ${failed[*]}"
    exit 1
}
