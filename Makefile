# `make demo` and `make test` are all that a newcomer needs. Each target first brings the virtual environment up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-unit nightly perf regret lint docs env clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf 'make %-10s %s\n' "$$name" "$$text"; done

demo: env  ## a baseline server and ours side by side, on real prompts
	@$(BIN)/vllm-instant demo

serve: env  ## the demo server alone, until Ctrl-C (PORT=8000)
	@exec $(BIN)/vllm-instant demo serve --port $(or $(PORT),8000)

# Two processes: one for the tests with engines, one for all others (see tests/conftest.py).
test: lint  ## lint and all tests; real vLLM engines on the CPU included
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=25

test-unit: env  ## the tests without an engine
	$(BIN)/pytest -m unit

nightly: env  ## the slow tests with real engines, which `make test` leaves out
	$(BIN)/pytest -m nightly

perf: env  ## the tests that assert wall-clock time; wants a quiet machine
	$(BIN)/pytest -m perf

regret: env  ## is ours ever slower than the best of no speculation and fixed lengths? (minutes)
	$(BIN)/python benchmarks/regret.py --short

lint: env  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: env  ## the documentation as a site, in build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

env:  ## the virtual environment alone
	@$(PYTHON) tools/make_env.py --venv $(VENV)

clean:  ## remove the virtual environment and all caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
