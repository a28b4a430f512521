# Two commands: `make demo` and `make test`. Everything is installed into .venv; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# so many processes share the tests, a thread each: make test JOBS=8 where cores and memory (2 GB each) allow
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal
# what decides the contents of .venv; a change of any of it sets .venv up anew
STAMP := $(VENV)/.stamp-$(shell (cat pyproject.toml constraints.txt; $(PYTHON) --version) | sha256sum | cut -c1-16)

# torchaudio is built against one torch, older than the pinned one: it has an environment of its own, which goes with
# .venv when that is set up anew
TORCHAUDIO := $(VENV)/torchaudio
TORCHAUDIO_PINS := torch==2.11.0 torchaudio==2.11.0
TORCHAUDIO_STAMP := $(TORCHAUDIO)/.stamp-$(shell (echo $(TORCHAUDIO_PINS); cat pyproject.toml constraints.txt; $(PYTHON) --version) | sha256sum | cut -c1-16)

.PHONY: help setup demo test test-slow test-all executorch test-torchaudio test-cuda lint types clean

help:
	@echo "make demo      speak, train, decode and score the embedded corpus (egs/synth)"
	@echo "make test      the fast tests"
	@echo "make test-slow  of the slow tests one of each file, in minutes"
	@echo "make test-all  all tests"
	@echo "make test-torchaudio  the tests of the losses beside torchaudio, in an environment of its own (4.7 GB)"
	@echo "make test-cuda  the tests that need a CUDA device, with the python3 of the shell: a torch built for CUDA"
	@echo "make lint      ruff"
	@echo "make types     mypy"
	@echo "make clean     remove .venv (experiments under egs/*/exp stay)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: Python {v[0]}.{v[1]} is too old; this project needs 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev,synth,export]'
	@touch $@

demo: setup
	@egs/synth/run.sh

test: setup
	$(PYTEST)

test-slow: executorch
	$(PYTEST) -m slow --slow one

test-all: executorch
	$(PYTEST) --slow all

# what only slow tests need
executorch: setup
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[executorch]'

test-torchaudio: $(TORCHAUDIO_STAMP)
	$(TORCHAUDIO)/bin/python -m pytest -q tests/losses

# in whatever environment has a torch for the device: .venv may hold the build for CPU
test-cuda:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: $(PYTHON) has no torch that sees a CUDA device")'
	$(PYTHON) -m pytest -q tests/cuda

$(TORCHAUDIO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(TORCHAUDIO)
	@grep -v '^torch==' constraints.txt >$(TORCHAUDIO)/constraints.txt
	$(TORCHAUDIO)/bin/python -m pip install --quiet --constraint $(TORCHAUDIO)/constraints.txt $(TORCHAUDIO_PINS) --editable '.[dev]'
	@touch $@

lint: setup
	$(PY) -m ruff check .

types: setup
	$(PY) -m mypy

clean:
	rm -rf $(VENV)
