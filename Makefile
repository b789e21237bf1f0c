# `make demo` draws a picture from a bare checkout; `make test` runs the default suite. Both can be run again safely.

PYTHON ?= python3
# Processes that run the tests; a core and 3 GB each.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Beside the one for development, which NVIDIA's library is no part of.
RTX_VENV := .venv-tensorrt-rtx
# A worker gets a file at a time, in the order of tests/conftest.py.
DEFAULT_SUITE = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu'
CHECKPOINT := model_store/checkpoints/tiny-emoji
BUNDLE := model_store/bundles/tiny-emoji

.DEFAULT_GOAL := help
.PHONY: help install bundle repository demo test test-all test-real test-tensorrt coverage lint format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## a virtual environment with everything

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

bundle: install
	@$(BIN)/diffuserve export $(CHECKPOINT) --output $(BUNDLE)

repository: bundle
	@$(BIN)/diffuserve assemble $(BUNDLE) --output triton_repo

demo: repository  ## export the bundled checkpoint, start Triton, draw demo.png, stop
	@$(BIN)/python examples/demo.py

test: repository  ## the default suite: lint, types and tests, about 6 minutes on two cores
	@begun=$$(date +%s); \
	$(MAKE) --no-print-directory lint && \
	$(DEFAULT_SUITE) && \
	echo "make test took $$(($$(date +%s) - begun)) s"

test-all: repository  ## everything, including slow tests, except test-real's and test-tensorrt's
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest --ignore tests/export/test_real_size.py --ignore tests/tensorrt

test-real: install  ## export Stable Diffusion 1.5 and XL at their real size with random weights: 24 GB of memory, 40 minutes
	$(BIN)/pytest -s tests/export/test_real_size.py

test-tensorrt: bundle $(RTX_VENV)/installed  ## build plans with TensorRT for RTX (91 MiB, NVIDIA's licence), without a GPU: 6 minutes
	@begun=$$(date +%s); \
	$(RTX_VENV)/bin/pytest -s --confcutdir tests/tensorrt tests/tensorrt && \
	echo "make test-tensorrt took $$(($$(date +%s) - begun)) s"

$(RTX_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RTX_VENV)
	$(RTX_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[tensorrt-rtx]' pytest pytest-timeout
	@touch $@

coverage: repository  ## the default suite, and which lines it does not run; half as long again
	$(DEFAULT_SUITE) --cov

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: repository  ## every benchmark but bench gpu, an hour or two on two cores; results in bench-results/
	$(BIN)/diffuserve bench engine --save
	$(BIN)/diffuserve assemble $(BUNDLE) --output triton_repo
	$(BIN)/diffuserve archive $(BUNDLE)
	@for verb in generator unet overhead efficiency mixed short cancel same policies torchserve; do \
		echo "== $$verb"; $(BIN)/diffuserve bench $$verb || exit 1; \
	done

clean:  ## remove what was made, except the virtual environments
	rm -rf model_store/bundles model_store/mar triton_repo/*/1/[!m]* demo.png bench-results
