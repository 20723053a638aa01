# Needs Python 3.11+ and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help run test vectors peers findings docs docs-serve install lint clean bench-gpu

# bench-gpu: on a GPU host, with its own Python, and with the wheels in this folder if there are any.
WHEELS ?= .whl
OUT ?= $(if $(SHORT),bench-results/gpu-short,benchmarks/results/bench-gpu)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

run: install ## compare the executors on the bundled layer
	$(BIN)/python -m executors compare

test: install ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile=ci

bench-gpu: $(if $(SHORT),install) ## on a GPU host: check and measure; SHORT=1: without a GPU, STAGES=, LIMIT=, OUT=
	$(if $(SHORT),OMP_NUM_THREADS=1 $(BIN)/python,$(PYTHON)) benchmarks/gpu.py --out '$(OUT)' \
	  $(if $(SHORT),--short,$(if $(wildcard $(WHEELS)/*.whl),--wheels '$(WHEELS)')) \
	  $(if $(STAGES),--stages '$(STAGES)') $(if $(LIMIT),--limit $(LIMIT)) $(if $(COMMIT),--commit '$(COMMIT)')

vectors: install ## test vectors for other languages, as dist/moe-ref-vectors.tar.gz
	rm -rf dist/moe-ref-vectors
	OMP_NUM_THREADS=1 $(BIN)/python -m moe_ref.conformance vectors dist/moe-ref-vectors --archive dist/moe-ref-vectors.tar.gz

peers: ## the suite on public implementations, in .venv-peers, as peers-results/; ONLY="liger kt_kernel"
	PYTHON='$(PYTHON)' examples/peers/install.sh .venv-peers
	.venv-peers/bin/python -m moe_ref_peers --out peers-results --findings examples/peers/findings \
	  $(if $(ONLY),--only $(ONLY) --keep)

findings: ## each finding with its package alone, in environments that are removed; ONLY="peft kt"
	PYTHONPATH=examples/peers $(PYTHON) -m moe_ref_peers.alone --out peers-results/findings.json \
	  $(if $(ONLY),--only $(ONLY) --keep)

# No page is left out of the site, and no link is dead; NO_MKDOCS_2_WARNING leaves out an advertisement.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: install ## the documentation site, as dist/site
	$(SITE) build --quiet --strict --config-file docs/site/mkdocs.yml

docs-serve: install ## the site at http://127.0.0.1:8000, made anew when a page changes
	$(SITE) serve --config-file docs/site/mkdocs.yml

lint: install ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(READY) ## the environment in .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v.major}.{v.minor}: must be 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist bench-results compare-results train-results peers-results .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
