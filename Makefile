# EXTRA=gpu installs faiss-gpu instead of faiss-cpu.
EXTRA ?= cpu
PYTHON ?= python3
BIN := .venv/bin
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: install test test-all lint demo serve

install: .venv/.installed-$(EXTRA)

.venv/.installed-%: pyproject.toml constraints.txt
	@echo "installing into .venv: 7 GB, minutes"
	$(PYTHON) -m venv .venv
	rm -f .venv/.installed-*
	$(BIN)/pip uninstall --quiet --quiet --yes $(if $(filter gpu,$*),faiss-cpu,faiss-gpu)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*,dev]'
	touch $@

test: install lint
	$(BIN)/python -m pytest -m "not slow"

# Those that are marked slow too: whole jobs, sweeps, reports, kills of workers, nodes and replicas.
test-all: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything on a small catalogue of its own; results lie under $$ACEBERT_HOME (~/.acebert).
demo: install
	$(BIN)/python ray_jobs/compare.py --recipes twinbert_tiny acebert_tiny

# The search page of a model of the demo on http://127.0.0.1:8000; what is missing is made first.
serve: install
	model="$$($(BIN)/python ray_jobs/finetune.py --recipe acebert_plus_tiny | tee /dev/stderr | tail -n 1)" && \
	  $(BIN)/python ray_jobs/publish.py --model "$$model"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/serve run serve.app:app
