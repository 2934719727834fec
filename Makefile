# `make demo` and `make test` do all the set-up on a fresh machine, in a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test sanitize ptx lint docs bench bench-results gpu aot-36 clean

demo: $(INSTALLED)  ## the main job on real crystals, in under five minutes
	$(BIN)/python -m crystalformer.app.demo --out demo-output

# Tests of time and memory run alone, the others on all cores.
test: $(INSTALLED)
	$(BIN)/python -m pytest tests/costs --cov --cov-report=
	$(BIN)/python -m pytest --ignore=tests/costs --numprocesses=auto --maxprocesses=8 --dist=worksteal \
	--cov --cov-append --cov-report=term-missing:skip-covered --cov-fail-under=90

SANITIZED := build/sanitized
sanitize: $(INSTALLED)  ## the C++ kernels' tests on a build of csrc that stops at a wrong address or undefined behaviour
	CRYSTALFORMER_SANITIZE=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	nm -D $(SANITIZED)/lib/crystalformer/_C.so | grep -q __asan_init
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath $(SANITIZED))/lib CRYSTALFORMER_FROM=$(SANITIZED) $(BIN)/pytest \
	--backends=cpu tests/contract/test_sums.py tests/contract/test_not_finite.py tests/contract/test_list_builders.py \
	tests/contract/test_sums_of_orbits.py tests/contract/test_refused_lists.py tests/test_lists.py \
	tests/test_cpu.py tests/test_shells.py tests/test_fuzz.py -k "not instruction_sets"
	@echo "no wrong address and no undefined behaviour in $(SANITIZED)/lib/crystalformer/_C.so"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

docs: $(INSTALLED)  ## the site, in build/site: pages, mathematics and the reference of the public functions
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the first page is build/site/index.html"

bench: $(INSTALLED)  ## is it still as fast? ratios between providers on this machine
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name

bench-results: $(INSTALLED)  ## bench/results/ and the pages that show it; OFFICIAL=checkout adds the paper's code
	$(BIN)/python -m bench all --out bench/results
	$(BIN)/python -m bench report

# The contract of the Triton kernels, wherever they run.
TRITON := --backends=triton tests/contract tests/triton_kernels

# A driver of Triton's that executes the PTX compiled for our launches on the CPU, and watches every access to memory. It
# is no part of the project.
PTX ?= ../shared/ptx
PTX_ARCH ?= 90
ptx: $(INSTALLED)  ## the contract of the Triton kernels as compiled code, without a GPU, where the folder PTX is there
	@if test -d $(PTX); then \
	env -u TRITON_INTERPRET PTX_ARCH=$(PTX_ARCH) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 \
	TRITON_CACHE_DIR=$(abspath build/ptx-cache) PYTHONPATH=$(abspath $(PTX)):. \
	timeout 600 $(BIN)/python -m pytest -p plugin --numprocesses=auto --maxprocesses=8 --dist=worksteal $(TRITON); \
	else echo "make ptx: skipped, there is no folder $(PTX)"; fi

# COMMIT names the commit in the results, where the files have no repository with them.
RESULTS ?= bench/results
gpu:  ## what needs an NVIDIA GPU, in eight minutes at most; takes the Python it finds, with torch, triton, numpy, pytest
	code=0; export PYTHONPATH=. PYTHONUNBUFFERED=1; \
	timeout -s INT -k 5 190 $(PYTHON) -m pytest tests/test_cuda.py $(TRITON) || code=1; \
	timeout -s INT -k 5 190 $(PYTHON) -m bench all --device cuda --repeat 200 --out $(RESULTS) || code=1; \
	$(PYTHON) -m pytest tests/test_sanitizer.py || code=1; \
	exit $$code

aot-36:  ## the Triton kernels on Triton 3.6.0, without a GPU
	test -x $(VENV)-36/bin/python || $(PYTHON) -m venv $(VENV)-36
	$(VENV)-36/bin/pip install --quiet --disable-pip-version-check $$(grep ^torch= constraints.txt) 'numpy<2.4' pytest
	$(VENV)-36/bin/pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	PYTHONPATH=. $(VENV)-36/bin/python -m pytest tests/test_aot.py tests/test_interpreter.py

# The compiled kernels are built with the headers of the torch that is installed, so not in isolation.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja
	$(PIP) --no-build-isolation --editable '.[data,train,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build demo-output crystalformer.egg-info crystalformer/_C*.so
