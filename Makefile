# `make demo` and `make test` need nothing but Python 3.11 or later: each makes .venv and installs
# what it uses.
PYTHON ?= python3
BIN := .venv/bin

# XLA on CPU allocates its large temporaries anew for every call. With huge pages (Linux, glibc)
# these allocations are cheaper: measured, a training step takes 30 % less time. Ignored elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-all lint clean help

help:
	@echo "make demo    train the embedded tiny model, evaluate before and after (no torch)"
	@echo "make test    lint, types and the test suite"
	@echo "make test-all  the same and what takes minutes each: more kills, full-size plans"
	@echo "make lint    lint and types only"
	@echo "make clean   remove .venv and caches; runs/ stays"

demo: .venv/.installed-demo
	@if [ -e runs/demo ]; then echo "removing the earlier runs/demo"; rm -rf runs/demo; fi
	$(BIN)/p2r train --config configs/tiny.yaml

test: lint
	$(BIN)/pytest -n 2 --dist loadscope

test-all: lint
	$(BIN)/pytest -n 2 --dist loadscope -m "slow or not slow"

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "p2r_jax needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/python tests/compilers.py | $(BIN)/python -m pip install --quiet --no-deps \
	  --target .venv/compilers --upgrade -r /dev/stdin || \
	  echo "no TPU and GPU compilers for this machine: their tests will be skipped"
	@touch $@
