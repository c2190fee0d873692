# What a contributor types. CI and the pre-commit hooks call the same targets, so they cannot disagree.
# `make` alone lists them.

PYTHON ?=# the interpreter, 3.11 to 3.13; empty: scripts/setup.sh picks one
WHEELS ?=# a folder of wheels to prefer, for example one that holds the CPU build of torch
JOBS   ?= 2# processes that run tests
ARGS   ?=# further arguments for pytest, for example ARGS="tests/data -k packing"

BIN := .venv/bin
# Tests are offline: a hub that answers on one machine and not on another would decide their outcome.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export PYTHON WHEELS

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo setup-docs setup-trackers demo docs test test-slow lint types contracts format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: ## make .venv with the tunesmith command and the tools; a second call takes no time
	@bash scripts/setup.sh

setup-demo: ## setup, and the small model that the demo trains (93 MB)
	@bash scripts/setup.sh demo

setup-docs: setup ## setup, and what makes the documentation
	@bash scripts/setup.sh docs

setup-trackers: setup ## setup, and MLflow and Trackio, whose tests are skipped without
	@bash scripts/setup.sh trackers

demo: setup-demo ## fine-tune the small model on this machine, no account and no hub needed
	@$(BIN)/tunesmith demo

# A link or an anchor that leads nowhere is an error.
docs: setup-docs ## make the documentation as a site in build/docs, which opens without network
	@$(BIN)/sphinx-build -q -W --keep-going -b html -c docs -d build/doctrees . build/docs
	@echo "build/docs/index.html"

# One thread a process: with several test processes, torch's own threads only get in each other's way.
test: setup ## run the fast tests
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(ARGS)

test-slow: setup-demo ## run the tests that take minutes, one after the other
	@$(OFFLINE) $(BIN)/pytest -m "slow and not gpu and not multi_gpu" $(ARGS)

lint: setup ## check lint rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup ## check types
	@$(BIN)/mypy

contracts: setup ## check which layer imports which
	@$(BIN)/lint-imports --no-logo

format: setup ## mend what lint can mend, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove caches and build outputs; .venv and runs stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
