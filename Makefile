# Each target sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: audit demo test test-all check docs clean

demo: .venv/ready
	$(BIN)/sparc3 demo --out demo-run

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

# Everything, the tests of several processes and of long runs included.
test-all: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_promises.py

# The documentation's site, in site/. The variable keeps an announcement of another product out of the output.
docs: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch .venv/docs-ready

# Known faults of the packages in constraints.txt; needs a network with PyPI's or OSV's advisories.
audit: .venv/ready
	$(BIN)/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python scripts/audit.py

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and by its exact version: a range would let pip take a newer one, with CUDA's gigabytes where an index offers both.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

clean:
	rm -rf .venv demo-run site build dist src/*.egg-info
