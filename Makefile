# Every target sets up ./.venv by itself, once; it needs Python 3.11 or later, make and access to a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo test e2e chaos lint check lock clean

help: ## list what can be made
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## (.*)/  make \1\t\2/' | expand -t 14

demo: $(READY) ## train a consortium of hospitals with synthetic patients; writes one report under runs/
	$(BIN)/polyclinic demo

test: $(READY) ## run the tests
	$(BIN)/pytest -m "alone and not deployed"
	$(BIN)/pytest -m "not alone and not deployed" --numprocesses 2 --dist worksteal

lint: $(READY) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

e2e: $(READY) ## run the tests with real processes on loopback: coordinator, gateway (nginx), three sites
	$(BIN)/pytest -m "deployed and not slow" tests/deployment

chaos: $(READY) ## the same, and everything killed that can be
	$(BIN)/pytest -m deployed tests/deployment tests/deploy/test_restore.py

check: lint test ## what CI runs: style, types, tests with warnings as errors

lock: $(READY) ## resolve pyproject.toml anew into requirements.lock, with hashes and without hosts
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate \
		--extra dev --extra ray --output-file requirements.lock pyproject.toml > /dev/null

clean: ## remove ./.venv, caches and builds; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

# pip only fetches the locked uv, which installs the rest in parallel and checks every hash. It compiles as it installs:
# else each process would, wherever PYTHONDONTWRITEBYTECODE is set (4 s for torch and torchvision).
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"error: {sys.executable} is Python " \
		f"{sys.version.split()[0]}; Polyclinic needs 3.11 or later\n  fix: make PYTHON=python3.12 ...")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep -oE '^uv==[0-9.]+' requirements.lock)
	$(UV) --compile-bytecode --require-hashes -r requirements.lock
	$(UV) --no-deps --editable .
	touch $@
