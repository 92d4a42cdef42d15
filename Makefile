# `make engine` and `make test` need nothing but Python >= 3.11, make and a package index.
#   make engine [MODEL=dir-or-hub-id] [FORMAT=nvfp4|fp8|int4_awq...] [GPU=cpu|h100|b200...] [TARGET=local|trtllm] [ARGS='--tp 4']
#   make qat [MODEL=...] [FORMAT=...] [DATA=text or JSONL] [ARGS='--steps 200 --lora']
# Without MODEL the demo MoE is trained first (build/demo-moe) and used.

PYTHON ?= python3
FORMAT ?= nvfp4
GPU ?= cpu
TARGET ?= local
ARGS ?=
DEMO := build/demo-moe
VENV := .venv
TOOLCHAIN := $(VENV)/bin/toolchain
READY := $(VENV)/.installed

ifdef MODEL
SOURCE := $(MODEL)
else
SOURCE := $(DEMO)
endif
# What `make qat` trains on: the model's own calibration text, unless DATA says other.
DATA ?= $(SOURCE)/calibration.jsonl
# The name that `toolchain engine` gives by default (with options in ARGS it may differ: then say ENGINE=engines/...).
BASE := $(if $(wildcard $(SOURCE)/.)$(if $(MODEL),,demo),$(notdir $(abspath $(SOURCE))),$(subst /,--,$(SOURCE)))
NAME := $(shell printf %s "$(BASE)-$(FORMAT)$(if $(filter-out local,$(TARGET)),-$(TARGET)-$(GPU))" \
	| tr A-Z a-z | sed 's/[^a-z0-9._-][^a-z0-9._-]*/-/g')
ENGINE ?= engines/$(NAME)

.PHONY: engine qat demo triton serve bench report test test-slow test-matrix lm-eval aiperf check docs goldens gpu-check tritonserver browser doctor clean help

engine: $(READY) $(if $(MODEL),,demo) ## plan, quantize, verify, evaluate, build and render MODEL
	$(TOOLCHAIN) engine "$(SOURCE)" --format $(FORMAT) --gpu $(GPU) --target $(TARGET) $(ARGS)

qat: $(READY) $(if $(MODEL),,demo) ## train MODEL with fake quantization on DATA (distilled from itself), then as engine
	$(TOOLCHAIN) qat "$(SOURCE)" --format $(FORMAT) --data "$(DATA)" --gpu $(GPU) --target $(TARGET) $(ARGS)

demo: $(READY) ## train the demo MoE (about two minutes, once)
	$(TOOLCHAIN) demo --output $(DEMO)

triton: $(READY) ## render the Triton repository of ENGINE again
	$(TOOLCHAIN) triton "$(ENGINE)" --force $(ARGS)

serve: $(READY) tritonserver ## serve ENGINE with a real tritonserver
	$(TOOLCHAIN) serve "$(ENGINE)" $(ARGS)

bench: $(READY) tritonserver ## start a server for ENGINE and measure it
	$(TOOLCHAIN) bench "$(ENGINE)" $(ARGS)

report: $(READY) ## write the report page of ENGINE again
	$(TOOLCHAIN) report "$(ENGINE)" $(ARGS)

test: check tritonserver browser lm-eval ## lint, then the whole test suite, a file of tests per core
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(READY) tritonserver ## the longer tests
	$(VENV)/bin/python -m pytest -m slow

test-matrix: $(READY) ## quantize, audit and run every format x model x KV cache (minutes); renews docs/matrix.json and the README
	WRITE_GOLDENS=1 $(VENV)/bin/python -m pytest -m matrix
	$(VENV)/bin/python docs/generate.py

check: $(READY) ## ruff, mypy, import-linter, generated docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy toolchain
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python docs/generate.py --check

docs: $(READY) ## write docs/cli.md and the tables of the README
	$(VENV)/bin/python docs/generate.py

goldens: $(READY) ## write tests/golden again from what the code does now; review the diff
	WRITE_GOLDENS=1 $(VENV)/bin/python -m pytest -k golden

tritonserver: $(READY) ## install a real tritonserver apart from the environment (186 MB, once)
	$(TOOLCHAIN) triton install

browser: ## install Chromium with apt-get, for the tests that open reports (once; without it they are skipped)
	@for name in "$${CHROMIUM:-chromium}" chromium-browser google-chrome google-chrome-stable; do \
		if command -v "$$name" >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Chromium: about a minute, once"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			chromium fonts-dejavu-core >/dev/null; } && exit 0; \
	fi; \
	echo "no Chromium: install it (Debian: apt-get install chromium), or set CHROMIUM to one; its tests are skipped"

lm-eval: $(VENV)/lm-eval/.installed ## put lm-evaluation-harness beside the environment, for `evaluate --tasks` (200 MB, once)

$(VENV)/lm-eval/.installed: $(READY) requirements-lm-eval.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/lm-eval -r requirements-lm-eval.lock
	touch $@

aiperf: $(VENV)/aiperf/.installed ## aiperf in an environment of its own, for `bench --engine aiperf` (1.2 GB, once)

$(VENV)/aiperf/.installed: $(READY) requirements-aiperf.lock
	test -x $(VENV)/aiperf/bin/python || $(VENV)/bin/python -m venv $(VENV)/aiperf
	$(VENV)/aiperf/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-aiperf.lock
	touch $@

gpu-check: ## on a machine with an NVIDIA GPU: quantize, export and run on CUDA, compare with the CPU
	$(if $(wildcard $(READY)),$(VENV)/bin/python,$(PYTHON)) benchmarks/gpu_check.py

doctor: $(READY) ## what this machine has and can do
	$(TOOLCHAIN) doctor

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, found " + sys.version)'
	@echo "installing into $(VENV): about a minute, once"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

clean: ## remove what was built, not what was downloaded
	rm -rf build $(wildcard engines/*-*/) $(wildcard triton_repo/*/)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
