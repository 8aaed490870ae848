# make quickstart   everything from nothing to a report: virtual environment, installs, the whole run
# make test         everything from nothing to green tests
# make docs         the API page from the docstrings
# make dist         source archive and wheel, with their metadata checked
# make check        format, lint, types, import contracts, image files

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An index to take torch from; the default is the one that pip is configured with.
# For CPU-only machines: make TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu" quickstart
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install quickstart test check docs dist clean

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@# torch comes first and pinned: packages that ask for any torch would pull a CUDA build of several gigabytes.
	@echo "installing torch"; $(BIN)/python -m pip install --quiet $(TORCH_INDEX) "$(TORCH)"
	@echo "installing unlearn-ties and what it needs"; $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(INSTALLED)

install: $(INSTALLED)

quickstart: $(INSTALLED)
	@$(BIN)/unlearn quickstart $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --config setup.cfg
	$(BIN)/mypy --num-workers 2
	@# Where it exists: it is built for x86-64 only.
	@if test -x $(BIN)/hadolint; then $(BIN)/hadolint docker/Dockerfile.*; fi

docs: $(INSTALLED)
	$(BIN)/python docs/make_api.py

dist: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
