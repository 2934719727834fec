# `make demo` and `make test` do all the set-up on a fresh machine, in a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench gpu clean

demo: $(INSTALLED)  ## the main job on real crystals, in under five minutes
	$(BIN)/python -m crystalformer.demo --out demo-output

test: $(INSTALLED)
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## speed on this machine
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name

gpu:  ## what needs an NVIDIA GPU; takes the Python it finds, with torch, triton, numpy and pytest
	PYTHONPATH=. $(PYTHON) -m pytest tests/test_cuda.py tests/triton_contract.py
	PYTHONPATH=. $(PYTHON) bench/gpu.py

# The compiled kernels are built against the torch that is installed, so not in isolation.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja
	$(PIP) --no-build-isolation --editable '.[data,train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build demo-output crystalformer.egg-info crystalformer/_C*.so
