# Two commands on a fresh machine do everything:
#   make demo    environment, build, a real model on 4-bit weights
#   make test    environment, build, tests, lint and type checks
#
# PYTHON chooses the interpreter the environment is made from, TORCH what pip installs first: a
# requirement, with options if need be. Without a GPU a CPU build of torch saves gigabytes.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
# The extension is built against the torch in the environment, never against another one.
INSTALL := $(PIP) install --no-build-isolation
JOBS ?= 2
export MAX_JOBS ?= $(JOBS)

.PHONY: demo test test-mps test-metal-cuda lint format types pytest build clean help build-cuda-check compile-cuda test-cuda sanitize-cuda
.DEFAULT_GOAL := help

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install $(TORCH)
	$(PIP) install "setuptools>=77" wheel ninja
	@touch $@

NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc csrc/*/*.mm csrc/*/*.cu csrc/*/*.cuh mps_kernels/*)

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(NATIVE)
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(NATIVE)
	$(INSTALL) -e ".[demo,test]"
	@touch $@

build: $(VENV)/demo.stamp ## the environment and the extension, in place

demo: $(VENV)/demo.stamp ## a real model from a GGUF file answers a prompt on 4-bit weights
	$(BIN)/mkrs demo --cache .cache $(ARGS)

test: $(VENV)/test.stamp lint types pytest test-mps ## everything: lint, types, all tests

lint: $(VENV)/test.stamp ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.mm' | xargs $(BIN)/clang-format --dry-run --Werror

types: $(VENV)/test.stamp ## mypy
	$(BIN)/mypy

# The simulated GPU needs a process in which nobody has asked torch for MPS yet.
pytest: $(VENV)/test.stamp ## the test suite; ARGS go to pytest
	$(BIN)/python -m pytest --ignore=tests/metal_sim --cov=mergekit_torch --cov-report= $(ARGS)
	$(BIN)/python -m pytest tests/metal_sim --cov=mergekit_torch --cov-append --cov-report=term $(ARGS)

# One thread: kernels run on the simulator's own, and OpenMP's idle ones would only spin.
test-mps: $(VENV)/test.stamp ## the op suite on the simulated GPU, every kernel call in 3 orders of threads
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKRS_TEST_DEVICE=mps MKRS_SIM_SEED=11,12,13 \
	  $(BIN)/python -m pytest tests/ops -n $(JOBS) --durations=10 $(ARGS)

# nvcc and a GPU; METAL_CUDA=build stops before the GPU, METAL_CUDA=run starts there.
METAL_CUDA ?= build run
CUDA_ARCH ?= native
test-metal-cuda: $(VENV)/test.stamp ## the Metal kernels on an NVIDIA GPU, compared bit by bit
	cd tests && for step in $(METAL_CUDA); do \
	  ../$(BIN)/python -m metal_sim.cuda_replay $$step ../build/metal_cuda \
	    --arch $(CUDA_ARCH) --sanitize || exit 1; done

build-cuda-check: $(VENV)/torch.stamp ## compile and link the CUDA kernels (needs nvcc, no GPU)
	MKRS_CUDA=1 $(BIN)/python setup.py build_ext --build-lib build/cuda/lib --build-temp build/cuda/temp

# CI's part of the above, within minutes on two cores.
compile-cuda: $(VENV)/torch.stamp ## compile the CUDA kernels for sm_90a (skipped where nvcc is missing)
	@if command -v nvcc >/dev/null || [ -n "$$CUDA_HOME" ]; then \
	  MKRS_CUDA_ARCHS=90a $(BIN)/python setup.py -q compile_cuda; \
	else echo "compile-cuda: skipped, there is no nvcc on PATH and no CUDA_HOME"; fi

test-cuda: $(VENV)/test.stamp ## on a machine with an NVIDIA GPU: build for it, the op suite, CUDA's own tests
	MKRS_CUDA=1 $(INSTALL) -e ".[test]"
	MKRS_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/ops tests/cuda $(ARGS)

# racecheck misreads the fused kernel's barriers: docs/performance-cuda.md says how.
sanitize-cuda: $(VENV)/test.stamp ## memory and race checks of the kernels (needs compute-sanitizer)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m tests.cuda.sanitize
	compute-sanitizer --tool racecheck --error-exitcode 1 \
	  --kernel-name-exclude kernel_substring=fused_kernel $(BIN)/python -m tests.cuda.sanitize

format: $(VENV)/test.stamp ## rewrite sources in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.mm' | xargs $(BIN)/clang-format -i

clean: ## remove the environment, build products and caches
	rm -rf $(VENV) build dist .cache *.egg-info mergekit_torch/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
