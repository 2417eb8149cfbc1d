# Every target builds what it needs in .venv; a stamp per set of extras keeps a second run from
# installing again. `make test PYTHON=python3.12` picks the interpreter, PYTEST_ARGS adds arguments,
# PARALLEL= tests in one process.
PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
PYTEST_ARGS ?=
# Two processes, a file each at a time: half the time on two cores, and compiled programs are kept
# no longer than their file.
PARALLEL ?= -n 2 --dist loadfile
DEMO_ARGS ?=
# The CPU is the default so that a test run never takes an accelerator by accident.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
PACKAGING := setup.cfg pyproject.toml

.PHONY: demo demo-rl test parity parity-latest parity-slow slow aot bench bench-quick tunix wheel docs docs-tables lint format clean

demo: $(VENV)/.demo
	$(BIN)/tunix-gemma4 demo $(DEMO_ARGS)

demo-rl: $(VENV)/.demo
	$(BIN)/tunix-gemma4 demo-rl $(DEMO_ARGS)

test: $(VENV)/.test
	$(PYTEST) $(PARALLEL) -m "not parity and not slow and not aot and not accelerator"

parity: $(VENV)/.parity
	$(PYTEST) $(PARALLEL) -m "parity and not slow and not aot and not accelerator"

# The same against versions that google-tunix does not allow, in an environment without it. Files
# in several parts are the same in all versions, and left to `make parity`. What is compared is the
# working tree, whatever of it was installed.
parity-latest: $(LATEST)/.made
	PYTHONPATH=$(CURDIR) $(LATEST)/bin/python -m pytest $(PYTEST_ARGS) $(PARALLEL) \
		-m "parity and not slow and not aot and not accelerator" -k "not several" tests/parity

slow: $(VENV)/.parity
	$(PYTEST) $(PARALLEL) -m "slow and not aot and not accelerator"

parity-slow: $(VENV)/.parity
	$(PYTEST) $(PARALLEL) -m "(parity or slow) and not aot and not accelerator"

# One process: libtpu locks the machine.
aot: $(VENV)/.aot
	$(PYTEST) -m "aot and not accelerator"

# What compilers say is the same everywhere: these fail where a figure is worse than the recorded
# one by 5 %. The first takes half an hour on two cores, and 1.3 GB for the GPU's compiler.
bench: $(VENV)/.aot-gpu
	$(BIN)/python benchmarks/memory.py --check

bench-quick: $(VENV)/.aot
	$(BIN)/python benchmarks/memory.py --quick --check

# By hand: losses on the Tunix in the folder TUNIX_CHECKOUT, beside those of the installed one.
tunix: $(VENV)/.test
	$(BIN)/python tests/tunix_versions.py

# Builds the wheel, and uses it in an environment outside of this folder.
wheel: $(VENV)/.build
	PYTHON=$(BIN)/python .ci/wheel

# The site of docs/ into site/, with the reference of the public names; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

# The tables of docs/reference/, from the classes of settings and the hooks.
docs-tables: $(VENV)/.test
	$(BIN)/python docs/tables.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LATEST) site

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.made $(PACKAGING)
	$(PIP) install -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.made $(PACKAGING)
	$(PIP) install -e ".[demo,test]"
	touch $@

$(VENV)/.parity: $(VENV)/.test
	$(PIP) install -e ".[demo,test,parity]"
	# For its reward functions alone, which need none of what it depends on.
	$(PIP) install --no-deps "trl==1.16.0"
	touch $@

$(VENV)/.aot: $(VENV)/.test
	$(PIP) install -e ".[demo,test,aot]"
	touch $@

$(VENV)/.docs: $(VENV)/.made $(PACKAGING)
	$(PIP) install -e ".[docs]"
	touch $@

$(VENV)/.build: $(VENV)/.made
	$(PIP) install build
	touch $@

$(LATEST)/.dependencies: tests/parity/latest.txt
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install --no-compile -r tests/parity/latest.txt
	touch $@

$(LATEST)/.made: $(LATEST)/.dependencies $(PACKAGING)
	$(LATEST)/bin/python -m pip install --no-deps .
	touch $@

# The plug-in's version must be that of jax.
$(VENV)/.aot-gpu: $(VENV)/.aot
	JAX=$$($(BIN)/python -c "import jax; print(jax.__version__)") && \
	$(PIP) install "jax-cuda12-plugin==$$JAX" "jax-cuda12-pjrt==$$JAX" nvidia-cuda-nvcc-cu12
	touch $@
