# `make train` and `make test` install what they need first, into $(VENV).
# PYTHON=… names the Python that $(VENV) is made with; `make clean` before changing it.

VENV ?= .venv
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c $(RECENT) 2>/dev/null && echo $$name && break; done)
# A name may be on PATH and still not start (pyenv), so each is tried.
RECENT = 'import sys; sys.exit(sys.version_info < (3, 11))'
BIN = $(VENV)/bin
WHICH ?= not slow and not cloud
TESTS ?= $(wildcard tests/test_*.py) tests/launcher

.PHONY: help train bench cloud test test-cloud test-cloud-slow test-slow lint format install lock clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 24

# A step on CPU allocates and frees tens of megabytes; in huge pages that costs a sixth less time.
train: $(VENV)/installed ## train the quickstart model on this machine
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m txl_jax.train --local

cloud: $(VENV)/installed-dev ## start a cloud on this machine to try the launcher with, as root
	$(BIN)/python -m tests.cloud

# A file's tests share what they compile and the runs that they look at, so files are dealt out whole;
# in their order, as those with the fewest tests are not the quickest. Tests wait at times, for
# processes and for what does not answer: there is one worker more than cores, eight at most.
test: $(VENV)/installed-dev ## run the tests, on several cores
	$(BIN)/python -m pytest -q -m '$(WHICH)' -n $$(($$(nproc) + 1)) --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder $(TESTS)

test-cloud: $(VENV)/installed-dev ## test the launcher, on a cloud of this machine; needs root, sshd and tmux
	$(BIN)/python -m pytest -q -m 'not slow' tests/cloud tests/launcher

test-cloud-slow: $(VENV)/installed-dev ## test whole launches and what can go wrong in them, which takes longer
	$(BIN)/python -m pytest -q -m 'slow and cloud' tests/cloud tests/launcher

bench: $(VENV)/installed ## time this machine: lines of JSON; `python -m bench --compare OLD NEW` compares
	$(BIN)/python -m bench

test-slow: $(VENV)/installed-dev ## run the tests that take longer
	$(BIN)/python -m pytest -q -m 'slow and not cloud'

lint: $(VENV)/installed-dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev ## put the source into its format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(VENV)/installed ## only install, into $(VENV)

$(VENV)/installed: install.py requirements.txt requirements.lock
	@"$(PYTHON)" -c $(RECENT) 2>/dev/null || { echo >&2 \
	'error: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3'; \
	exit 2; }
	@"$(PYTHON)" install.py $(VENV)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.lock
	@$(BIN)/python install.py $(VENV) --dev
	@touch $@

lock: $(VENV)/installed-dev ## choose the newest versions that requirements*.txt allow
	$(BIN)/python -m pip install --quiet uv
	sed 's/\[cuda12\]//; /^nvidia/d' requirements.txt | $(LOCK) requirements.lock -
	$(LOCK) requirements-dev.lock --constraints requirements.lock requirements-dev.txt
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	--custom-compile-command 'make lock' --no-annotate --output-file

clean: ## remove what was installed or cached; runs and data stay
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
