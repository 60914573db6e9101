# setup: everything into .venv, and the system packages the demo and the browser test use.
# Each target is quick when nothing changed. Extra arguments: make demo ARGS=--no-serve

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAISS ?= cpu
SYSTEM_PACKAGES := fonts-noto-color-emoji libfribidi0 chromium
ARGS ?=

.PHONY: setup system demo test test-all lint bench clean

setup: $(VENV)/.installed system

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable ".[$(FAISS),demo,dev]"
	touch $@

# Asks for nothing that is there; without apt or the rights it says what will be missing.
system:
	@missing=""; for package in $(SYSTEM_PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q "ok installed" \
	    || missing="$$missing $$package"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq \
	    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null \
	    || echo "could not install:$$missing (the demo and the browser test do with less)"; \
	else echo "not installed:$$missing (the demo and the browser test do with less)"; fi

demo: setup
	$(BIN)/clipserve demo $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 $(ARGS)

test-all: lint
	$(BIN)/pytest -n 2 -m "" $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.embedding $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
