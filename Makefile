# make help lists the targets. Each makes what it needs of .venv by itself.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1: \2/p' Makefile

demo: .venv/.lowra-test ## compress SmolLM2-135M and show what came of it
	$(BIN)/python examples/quickstart.py

test: .venv/.lowra-test ## run the tests that need no GPU and little time
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow"

check: .venv/.lowra-dev ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/.lowra-test ## measure compile time, passes, speed and quality
	$(BIN)/python -m benchmarks.compile
	$(BIN)/python -m benchmarks.fit
	$(BIN)/python -m benchmarks.assign
	$(BIN)/python -m benchmarks.speed.cpu
	$(BIN)/python -m benchmarks.quality

clean: ## remove caches, builds and demo output (.venv stays)
	rm -rf build dist *.egg-info lowra-demo .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "lowra needs Python 3.11 or newer; '$(PYTHON)' is missing or older." \
	         "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch first and alone: inside this range the machine's own build of it is found and kept.
.venv/.lowra-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
