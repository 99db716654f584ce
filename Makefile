# Every target does its own set-up; `make setup` alone builds .venv.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow test-s3 test-browser test-gpu lint check bench clean

setup: $(VENV)/.installed

# torch and torchvision come from the registry in one go, so that they fit each other.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/selftrain run demo --store ./selftrain-store

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-s3: setup
	$(BIN)/python -m pytest -m s3

test-browser: setup
	$(BIN)/python -m pytest -m browser

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) selftrain-store .pytest_cache .ruff_cache
