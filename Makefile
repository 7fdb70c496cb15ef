# nacpipe's targets; `make` prints them. Everything runs in .venv, which is built when it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.ready-demo
READY := $(VENV)/.ready-dev

BENCHMARK ?= digits
MODEL ?= $(if $(filter digits,$(BENCHMARK)),digits_cnn,)
CHECKPOINT ?=
DATA_ROOT ?=
CACHE ?= cache/$(BENCHMARK)-$(MODEL).zarr
LAYERS ?=
TRAIN_IMAGES ?=
TRIALS ?=
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

EXTRACT_OPTIONS = $(BENCHMARK) --cache $(CACHE) \
	$(if $(MODEL),--model $(MODEL)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) \
	$(if $(DATA_ROOT),--data-root $(DATA_ROOT)) $(if $(LAYERS),--layers '$(LAYERS)') \
	$(if $(TRAIN_IMAGES),--train-images $(TRAIN_IMAGES))

# Images of containers often set it; then every process that a test starts compiles some thousand modules anew.
unexport PYTHONDONTWRITEBYTECODE

ifndef BESIDE
.NOTPARALLEL:
endif
.PHONY: help demo extract search evaluate report test fuzz check every-test docs release format lint types clean

help: ## print this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "BENCHMARK=$(BENCHMARK) MODEL=$(MODEL) CHECKPOINT= DATA_ROOT= CACHE=$(CACHE) LAYERS= TRAIN_IMAGES= TRIALS="

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What the demo and the pipeline need: no servers, no linters, no type checker.
$(DEMO_READY): pyproject.toml | $(BIN)/python
	test -e $(READY) || $(BIN)/pip install --quiet --editable '.[demo,report]'
	touch $(DEMO_READY)

# What developing needs.
$(READY): pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(DEMO_READY) ## extract, search, evaluate and report on the packaged benchmark
	$(MAKE) --no-print-directory extract search report evaluate BENCHMARK=digits
	@echo
	@echo "the worst mistakes: $(CURDIR)/cache/digits-mistakes.png"
	@echo "the report:         $(CURDIR)/cache/digits-report.html"

extract: $(DEMO_READY) ## stage 1: run the network once, write its states to CACHE
	$(if $(MODEL),,$(error say which network: make extract BENCHMARK=$(BENCHMARK) MODEL=NAME CHECKPOINT=FILE))
	$(BIN)/python stages/extract.py $(EXTRACT_OPTIONS)

search: $(DEMO_READY) ## stage 2: tune the parameters against CACHE
	$(BIN)/python stages/search.py $(CACHE) $(if $(TRIALS),--trials $(TRIALS)) $(if $(LAYERS),--layers '$(LAYERS)')

evaluate: $(DEMO_READY) ## the table: NAC beside baselines
	$(BIN)/nacpipe evaluate $(CACHE)

report: $(DEMO_READY) ## one page about CACHE, with pictures of the worst mistakes
	$(BIN)/nacpipe report $(CACHE) --output cache/$(BENCHMARK)-report.html --mosaic cache/$(BENCHMARK)-mistakes.png

test: $(READY) ## the tests of three minutes: all but those that pyproject.toml marks as slow, server, browser, reference
	$(PYTEST) -m "not slow and not server and not browser and not reference" --hypothesis-profile quick

fuzz: $(READY) ## hostile caches, lists, folders, images, TOML, parameters, checkpoints and names, FUZZ of each (make check tries few)
	NACPIPE_FUZZ=$(or $(FUZZ),2000) $(BIN)/python -m pytest tests/test_fuzz.py

# Types, site and release, one after another, take what the tests' waiting leaves of the processors.
check: $(READY) lint ## format, lint, import rules, types, site, release, every test: what CI runs
	$(MAKE) --no-print-directory --jobs 2 BESIDE=1 every-test types docs release

every-test: $(READY)
	$(PYTEST)

docs: $(READY) ## build the documentation site into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# An environment that has this one's packages but not this checkout: what is missing from the wheel is missing there.
release: $(READY) ## build wheel and sdist, install the wheel in a clean environment, run the demo from it
	rm -rf dist build/release
	$(BIN)/python tools/release.py --output dist --workspace build/release

format: $(READY) ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

clean: ## remove what is built, caches of states excepted
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
