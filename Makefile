# Every command sets up what it needs in .venv: start with `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.[ch]*')

.PHONY: help install demo test bench lint format notebook gpu clean

help:
	@echo "make demo      learn five tasks on real digits; writes out/demo/report.html"
	@echo "make test      the whole test suite"
	@echo "make bench     every way to do each job, side by side; writes out/benchmarks/report.html"
	@echo "make install   only set up .venv, with the kernels built in place"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make notebook  execute examples/AMS_Train.ipynb in place"
	@echo "make gpu       everything that needs a GPU: checks and timings, in out/gpu/report.md"

install: $(INSTALLED)

# torch comes first and torchvision with it, so that the two match; the kernels are then compiled
# against that torch, which is why the build is not isolated.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed "torch>=2.13" torchvision
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.12" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/mas-ext info
	touch $@

demo: install
	$(BIN)/mas-ext demo --out out/demo

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4

bench: install
	$(BIN)/python -m benchmarks --out out/benchmarks

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

notebook: install
	$(BIN)/python examples/execute.py examples/AMS_Train.ipynb

# Installs nothing: torch, nvcc and pytest are enough, in .venv or in $(PYTHON). Fails where there is
# no GPU; `make gpu ARGS="--device cpu"` is a rehearsal.
gpu:
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m tests.hardware.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info mas_ext/*.so
