# setup: everything into .venv, and the system packages the demo and the browser test use.
# Each target is quick when nothing changed. Extra arguments: make demo ARGS=--no-serve

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
FAISS ?= cpu
SYSTEM_PACKAGES := fonts-noto-color-emoji libfribidi0 chromium
ARGS ?=

.PHONY: setup system demo test test-all lint bench clients docker-proof clean

setup: $(VENV)/.installed system

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable ".[$(FAISS),demo,dev,clients]"
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

# Clients whose pins do not fit beside ours; without them their tests say so and are skipped.
clients: $(CLIENTS)/.installed

$(CLIENTS)/.installed: tests/clients.txt
	$(PYTHON) -m venv $(CLIENTS) \
	  && $(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --requirement tests/clients.txt \
	  && touch $@ || echo "could not install tests/clients.txt; the tests of those clients are skipped"

test: lint clients
	$(BIN)/pytest -n 2 $(ARGS)

test-all: lint clients
	$(BIN)/pytest -n 2 -m "" $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.embedding $(ARGS)

# As root, with debootstrap and iproute2: each Dockerfile's own steps, run without a container engine.
docker-proof: setup
	$(BIN)/python docker/prove.py service $(ARGS)
	$(BIN)/python docker/prove.py training $(ARGS)

clean:
	rm -rf $(VENV) $(CLIENTS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
