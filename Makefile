# Every target does its own set-up; `make setup` alone builds .venv.
# The first that runs and is new enough: a version manager may have shims for versions it lacks.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

# Two processes take whole files in the order of tests/conftest.py: the longest first.
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-marked test-slow test-s3 test-browser test-gpu lint check bench docs clean

setup: $(VENV)/.installed

# torch and torchvision come from the registry in one go, so that they fit each other.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/selftrain run demo --store ./selftrain-store

test: setup
	$(PYTEST) $(PARALLEL)

# The next three in one: none of them then ends with a core idle.
test-marked: setup
	$(PYTEST) -m 'slow or s3 or browser' $(PARALLEL)

test-slow: setup
	$(PYTEST) -m slow $(PARALLEL)

test-s3: setup
	$(PYTEST) -m s3

test-browser: setup
	$(PYTEST) -m browser

test-gpu: setup
	$(PYTEST) -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

bench: setup
	$(BIN)/python -m benchmarks

# Read it from build/site/index.html; no server is needed, save for its search:
# python -m http.server --bind 127.0.0.1 --directory build/site
docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build selftrain-store .pytest_cache .ruff_cache
