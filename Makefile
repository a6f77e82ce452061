# Two commands do everything on a machine with Python 3.11: `make quickstart` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
TEACHER_VENV := .venv-teacher
TEACHER_BIN := $(TEACHER_VENV)/bin

.PHONY: quickstart test nightly drills lint env env-dev seeds teacher-env test-teachers compat clean

quickstart: env
	$(BIN)/python -m opd.train recipe=tiny

# Two processes, each with whole files: what makes the tests slow is starting Ray, verl and Python, which waits a lot.
test: env-dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes too long for `make test`: does distillation still bring what the README says, from a start that is honest?
nightly: env-dev
	$(BIN)/python -m pytest -m nightly

# Breaks small runs in every way that a cluster knows, and says what came of it (about 20 minutes; three rows need root).
drills: env-dev
	$(BIN)/python -m bench.drills

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

# Makes the shipped seeds again (about 40 minutes on 2 cores) and copies them to seeds/.
seeds: env
	$(BIN)/python scripts/make_seeds.py

# A second environment, with a newer transformers: for teachers that the training environment's does not know (Qwen3-ASR).
$(TEACHER_VENV)/teacher.stamp: requirements/teacher.txt
	test -x $(TEACHER_BIN)/python || $(PYTHON) -m venv $(TEACHER_VENV)
	$(TEACHER_BIN)/python -m pip install --quiet "$(TORCH)"
	$(TEACHER_BIN)/python -m pip install --quiet --requirement requirements/teacher.txt
	touch $@

$(TEACHER_VENV)/test.stamp: $(TEACHER_VENV)/teacher.stamp requirements/teacher-test.txt
	$(TEACHER_BIN)/python -m pip install --quiet --requirement requirements/teacher-test.txt
	touch $@

teacher-env: $(TEACHER_VENV)/teacher.stamp

# What `make test` leaves out: tests inside the second environment, then those of a run that uses both.
test-teachers: env-dev $(TEACHER_VENV)/test.stamp
	$(TEACHER_BIN)/python -m pytest -m teacher_env tests/opd/teachers/test_scores.py tests/opd/teachers/test_qwen3_asr.py tests/opd/teachers/test_other_models.py
	$(BIN)/python -m pytest -m both_envs tests/opd/teachers

# Runs an export and bench.gpu under each supported version of transformers and compares the transcripts (1.2 GB per version in .compat/).
compat: env
	$(BIN)/python scripts/compat.py --torch "$(TORCH)"

clean:
	rm -rf $(VENV) $(TEACHER_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
