# make train: train the default model on a CPU. make test: the quick tests. make test-gpu: those that need an NVIDIA GPU.
# Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Bytecode is kept whatever the shell says: the tests start many processes. There is one for each core, in which
# PyTorch's threads would only wait for each other.
PLATFORM = cpu
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 JAX_PLATFORMS=$(PLATFORM) $(VENV)/bin/python -m pytest -n auto \
  --dist worksteal

.PHONY: train test test-slow test-gpu lint clean

train: $(VENV)/base
	$(VENV)/bin/python -m train_tpu.run $(ARGS)

test: $(VENV)/dev
	$(PYTEST) -m "not slow and not gpu and not tpu_compiler" $(ARGS)

test-slow: $(VENV)/dev
	$(PYTEST) -m "(slow or tpu_compiler) and not gpu" $(ARGS)

# Installs nothing: which JAX and PyTorch fit, the GPU's driver decides. VENV=DIR names another environment.
test-gpu: PLATFORM = cuda
test-gpu:
	@JAX_PLATFORMS=$(PLATFORM) $(VENV)/bin/python -c 'import jax, pytest; jax.devices()' 2>/dev/null || \
	  { echo "$(VENV) has no JAX that sees a GPU, or no pytest: BUILD.md says what to install" >&2; exit 1; }
	$(PYTEST) -m "gpu and not two_gpus" $(ARGS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/base: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing the pinned packages into $(VENV) (about a minute)"
	$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "installing what the tests need into $(VENV), PyTorch among it"
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
