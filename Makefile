# Two commands do everything on a machine with Python 3.11: `make quickstart` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: quickstart test lint env env-dev seeds clean

quickstart: env
	$(BIN)/python -m opd.train recipe=tiny

test: env-dev lint
	$(BIN)/python -m pytest

lint: env-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by itself: a CPU wheel where one is offered, the build that is already there on a GPU host.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/speech.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[speech]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/speech.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[speech,dev]"
	touch $@

env: $(VENV)/speech.stamp
env-dev: $(VENV)/dev.stamp

# Makes the shipped seeds again (about 15 minutes on 2 cores) and copies them to seeds/.
seeds: env
	$(BIN)/python scripts/make_seeds.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
