# Every target sets itself up: a virtual environment in .venv, the pinned packages, then the work.
# Offline: PIP_NO_INDEX=1 PIP_FIND_LINKS=folder-of-wheels make test

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT   ?= out

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types check bench pins clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install arvis with the pinned packages

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
			if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "arvis needs Python 3.11 or newer; python3 here is: $$(python3 --version 2>&1 || true)" >&2; \
			echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
			exit 1; \
		fi; \
		echo "==> creating $(VENV) with $$($$python --version)"; \
		rm -rf $(VENV); \
		$$python -m venv $(VENV) || { \
			rm -rf $(VENV); \
			echo "python's venv module failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "==> installing arvis and the packages of constraints.txt (some minutes the first time)"; \
	{ $(BIN)/python -m pip install --quiet -c constraints.txt setuptools && \
	  $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'; } || { \
		echo "installing failed; without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=folder-of-wheels make $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@touch $@

demo: $(STAMP) ## paint "red apple" with the model in the box
	@echo "==> painting four pictures of a red apple, coarse to fine, with the model that ships in the package"
	@mkdir -p $(OUT)
	$(BIN)/arvis generate "red apple" -n 4 -o $(OUT)/apple.png --preview
	@echo "==> the picture is $(abspath $(OUT)/apple.png); the steps lie beside it"
	@echo "==> next: .venv/bin/arvis generate \"a prompt of yours\" -o picture.png, or .venv/bin/arvis --help"

test: lint types ## lint, types, import rules, tests
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## pyright
	$(BIN)/pyright

check: $(STAMP) ## the laptop-scale claim of every system, or of SYSTEM=name (long)
	@set -e; for system in $(or $(SYSTEM),$$($(BIN)/python -c 'import arvis; print(*arvis.list_systems())')); do \
		echo "==> arvis check $$system"; $(BIN)/arvis check $$system; done

bench: $(STAMP) ## speed on this machine; with OFFICIAL=folder of official checkouts (VAR, LlamaGen, mar, Infinity), against them
	@set -e; if [ -z "$(OFFICIAL)" ]; then \
		for system in brush var-d16 llamagen-b-256; do $(BIN)/arvis bench $$system; done; \
	else \
		$(BIN)/python -m benchmarks.pairs all --official "$(OFFICIAL)"; \
	fi

pins: $(STAMP) ## rewrite constraints.txt from what the metadata resolves to
	@mkdir -p build
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report build/pins.json -c constraints.txt setuptools '.[dev]'
	$(BIN)/python .ci/pins.py build/pins.json > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove what the targets made, except pictures and runs
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
