# Everything runs in one virtual environment, .venv. Its stamps say how far it is built: .made (an empty
# environment), .demo (what a run needs), .test (tests, linters and the oracles too). A stamp is written last,
# so an install that failed or was interrupted is done again by the next call, and an edit of pyproject.toml
# or constraints.txt reinstalls.

# Candidates, the first that is new enough is taken; `make PYTHON=/path/to/python3.12` names one.
PYTHON ?= python3 python3.11 python3.12 python3.13 python3.14
python = $(shell for p in $(PYTHON); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Options for pytest or the script behind a target: make test ARGS="-k nf4"
ARGS ?=

# setuptools comes first and without build isolation, because pip does not hold a build environment of its own
# to constraints.txt.
pip = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
install = $(pip) setuptools && $(pip) --no-build-isolation --editable

.DEFAULT_GOAL := help
.PHONY: help demo gsm8k test test-all lint bench figures clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo ## fine-tune a small model, compare it before and after (some 8 minutes on 2 cores)
	.venv/bin/python scripts/demo.py $(ARGS)

# GSM8K's train.jsonl, from github.com/openai/grade-school-math (grade_school_math/data/).
DATA ?= $(or $(MINQLORA_DATA),.)/gsm8k_train.jsonl
gsm8k: .venv/.demo ## solve GSM8K's problems before and after fine-tuning (some 20 minutes on 2 cores; DATA=train.jsonl)
	.venv/bin/python scripts/gsm8k.py "$(DATA)" $(ARGS)

test: .venv/.test assets ## run the tests, but for the slow ones
	.venv/bin/python -m pytest $(ARGS)

test-all: .venv/.test assets ## run all the tests
	.venv/bin/python -m pytest -m "" $(ARGS)

lint: .venv/.test ## check style, formatting and types: ruff, mypy
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# Without ARGS, the training step: make bench ARGS="quant --output docs/results/quant_cpu.json"
bench: .venv/.test ## measure on this machine; ARGS names what: train, quant, error, load, data or gpu, and its options
	.venv/bin/python scripts/bench.py $(or $(ARGS),train)

figures: .venv/.test ## redraw the figures of the README
	.venv/bin/python scripts/figures.py $(ARGS)

clean: ## remove the virtual environment, the demo's assets and all caches; runs/ stays
	rm -rf .venv assets build minqlora.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find minqlora scripts tests -name __pycache__ -prune -exec rm -rf {} +

# The script returns at once when the assets are there. Without them (no network, say) the tests that need
# them skip, each with its reason, so a failure here is told and does not stop.
.PHONY: assets
assets: .venv/.test
	@.venv/bin/python scripts/demo_assets.py || \
		echo "note: the demo's assets could not be made (see above); tests that need them will skip" >&2

.venv/.made:
	$(if $(python),,$(error minqlora needs Python 3.11 or newer, and $(PYTHON) is not that: name one, as in \
	make PYTHON=/path/to/python3.12))
	@$(python) -m venv --clear .venv
	@touch $@

.venv/.demo: .venv/.made pyproject.toml constraints.txt
	@echo "Installing minqlora, PyTorch and the rest of what a run needs into .venv (once, a few minutes) ..."
	@$(install) '.[demo]'
	@touch $@

.venv/.test: .venv/.demo
	@echo "Installing pytest, ruff, mypy, transformers, peft, bitsandbytes, torchao into .venv (once, a few minutes) ..."
	@$(install) '.[demo,plots,parquet,tensorboard,browser,dev,parity]'
	@touch $@
