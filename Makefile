# Everything a newcomer needs: `make demo` and `make test`. Each brings the virtual environment up to date first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo serve test test-unit regret lint env clean help

help:
	@echo "make demo       a stock server and ours side by side, on real prompts"
	@echo "make serve      the demo server alone, until Ctrl-C (PORT=8000)"
	@echo "make test       all tests; real vLLM engines on the CPU included"
	@echo "make test-unit  the tests without an engine"
	@echo "make regret     is ours ever slower than the best of no speculation and fixed lengths? (minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make env        only the virtual environment"

env:
	@$(PYTHON) tools/make_env.py --venv $(VENV)

demo: env
	@$(BIN)/vllm-instant demo

serve: env
	@exec $(BIN)/vllm-instant demo serve --port $(or $(PORT),8000)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-unit: env
	$(BIN)/pytest -m unit

regret: env
	$(BIN)/python benchmarks/regret.py --short

# Two processes: one for the tests with engines, one for all others (see tests/conftest.py).
test: lint
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
