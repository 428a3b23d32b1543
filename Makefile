# make .venv: the environment.  make demo: the whole pipeline on scikit-learn's digits.  make help: the rest.
PYTHON ?= python3
N ?= 200
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LAVA_STAMP := $(VENV)/.lava
LAVA := lava-nc==0.10.0 lava-dl==0.6.0
LAVA_NEEDS := asteval networkx pillow
NEUROBENCH := neurobench==2.3.0

.PHONY: help .venv lava demo test check conformance bench golden clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z.]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.venv: $(STAMP)  ## the environment, Lava included where it can be installed (PYTHON=python3.12 chooses)

$(STAMP): pyproject.toml constraints.txt
	@echo 'ranvier: installing into $(VENV); torch alone is large, so this takes some minutes'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts -c constraints.txt -e '.[test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(NEUROBENCH) || true  # for one test, which skips without it
	@touch $@
	@$(MAKE) --no-print-directory lava || true

# The two packages ask for Python 3.10, numpy 1 and torch 2.3. ranvier.deploy.lava_compat mends what newer versions
# break, so that this one command serves every Python, 3.10 included, beside current packages.
lava: $(STAMP)  ## only Lava, into the environment
	@$(MAKE) --no-print-directory $(LAVA_STAMP) || { \
	  echo 'ranvier: Lava could not be installed, so that its column stays empty; `make lava` tries again.'; exit 1; }

$(LAVA_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts -c constraints.txt $(LAVA_NEEDS)
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python $(LAVA)
	@touch $@

demo: $(STAMP)  ## train, export, compile, run, compare; writes report.html
	$(BIN)/ranvier demo

test: $(STAMP)  ## the tests; ARGS='-k lava' chooses
	$(BIN)/python -m pytest -n 2 -rs $(ARGS)

check: $(STAMP)  ## ruff, formatting, mypy, the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

conformance: $(STAMP)  ## N random Programs in Lava and in every engine against the reference (N=200)
	RANVIER_CONFORMANCE=$(N) $(BIN)/python -m pytest tests/conformance -m slow -s $(ARGS)

bench: $(STAMP)  ## benchmarks, each with its equality check first
	$(BIN)/ranvier bench $(ARGS)

golden: $(STAMP)  ## write the golden files anew
	$(BIN)/python -m pytest tests -k golden --golden $(ARGS)

clean:  ## everything that make made
	rm -rf $(VENV) build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
