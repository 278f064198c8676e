# `make test` and `make demo` set up everything they need in .venv; nothing else has to be installed but Python 3.10+.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.edgeomni-installed

WORK   ?= build/pythons

.PHONY: test demo setup lint links test-pythons check-aarch64 clean
.DEFAULT_GOAL := test

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 1

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(STAMP)
	$(BIN)/edgeomni demo -o build/nano-demo --force

setup: $(STAMP)

# A source distribution comes without these links, and a clone may hold small files in their place.
links:
	@for name in exporters profiles runtimes; do \
		test -L edgeomni/$$name || { rm -f edgeomni/$$name && ln -s ../$$name edgeomni/$$name; }; \
	done

# The device install and its tests, without torch, on every Python from 3.10 to 3.13 that is found. Needs a package index.
test-pythons: $(STAMP)
	$(BIN)/python tests/run_pythons.py --work $(WORK)

# Whether wheels alone make a device install on 64-bit ARM. Needs a package index; nothing is installed.
check-aarch64: $(STAMP)
	$(BIN)/python benchmarks/aarch64_install.py

# llama-cpp-python is compiled here, without its library for images, which nothing uses: some minutes on two cores.
# torch goes first so that a local build of the pinned version is preferred before anything else can ask for another.
$(STAMP): pyproject.toml constraints.txt | links
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "EdgeOmni needs Python 3.10 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,synth,gguf,openvino,optimum,tensorrt,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
