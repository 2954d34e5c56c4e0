# make demo       run the main job
# make check      run the linters and the type checker, and build the site
# make test       run the tests
# make test-fast  leave out the tests marked as slow
# make test-all   run every case in Triton's interpreter too
# make test-isa   run the tests of numerics on every instruction set of this processor
# make compat     run the core tests on the oldest and the newest torch
# make mutate     check that the tests notice each missing barrier and bounds check of the kernels
# make sanitize   run the CPU engine's tests under the address and undefined-behaviour sanitizers
# make results    write the README's results, the picture and the tables of docs/ from the committed rows
# make docs       build the site into build/site
#
# Each installs what it needs.
#
# The virtual environment uses the torch that python3 has (as on a Jetson) and never replaces it; without one it installs $(TORCH).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PERSON ?= 1
# The CUDA kernels take minutes to compile, so they are compiled where there is a device. LORA_EDGE_CUDA=1 compiles them anywhere.
export LORA_EDGE_CUDA ?= $(if $(wildcard /dev/nvidiactl /dev/nvmap /dev/dxg),,0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-fast test-all test-isa check docs mutate sanitize compat results clean
.DELETE_ON_ERROR:

demo: $(VENV)/har
	$(BIN)/lora-edge adapt --data watch --target-subject $(PERSON) --protocol B --rank 2 --out demo

test: $(VENV)/test
	$(BIN)/python -m pytest

test-fast: $(VENV)/test
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/test
	LORA_EDGE_TEST_ALL=1 $(BIN)/python -m pytest

# The whole suite instead of the tests of numerics: make test-isa TESTS=tests
TESTS ?=
test-isa: $(VENV)/test
	$(BIN)/python tests/tools/isa.py $(TESTS)

check: $(VENV)/check docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors (strict in mkdocs.yml). The variable silences an announcement of mkdocs-material's.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Only one file's sites: make mutate MUTATE="--file tt_fuse.cu"
MUTATE ?=
mutate: $(VENV)/test
	PYTHONPATH=tests:. $(BIN)/python tests/tools/mutate.py $(MUTATE)

compat: $(VENV)/test
	$(BIN)/python tests/tools/compat/run.py $(MACHINES)

results: $(VENV)/study
	$(BIN)/python -m benchmarks.study.report --write .
	$(BIN)/python -m benchmarks.tables

# A copy is built with the sanitizers (setup.py compiles C++ with CXXFLAGS alone); their runtimes must be loaded before Python.
# tests/tools/sanitize.py fails unless the library holds their symbols and planted faults are found. Leaks are not reported, because
# Python leaks on purpose; an allocation that is too large is left to torch, whose error the tests expect.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := -O1 -g $(SANITIZE) -fno-omit-frame-pointer
sanitize: $(VENV)/test
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r setup.py pyproject.toml README.md LICENSE csrc lora_edge benchmarks tests build/sanitize
	rm -f build/sanitize/lora_edge/_C*.so
	cd build/sanitize && CFLAGS="$(SANITIZED)" CXXFLAGS="$(SANITIZED)" LDFLAGS="$(SANITIZE)" LORA_EDGE_CUDA=0 \
	  $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/sanitize && export CXX="$(CXX)" CXXFLAGS="$(SANITIZED)" LORA_EDGE_FUZZ_CALLS=2000 \
	  LD_PRELOAD="$$(for l in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$l.so; done | tr '\n' ' ')" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 && \
	  $(abspath $(BIN))/python tests/tools/sanitize.py && \
	  PYTHONPATH=tests:. $(abspath $(BIN))/python -m pytest -s tests/engines/test_cpu_engine.py tests/ops/test_doors.py

# The installed torch becomes a constraint, so that no other package can replace it.
$(VENV)/torch.txt:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  echo "using the torch that $(PYTHON) has"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  echo "installing $(TORCH)"; $(PYTHON) -m venv $(VENV) && $(PIP) install "$(TORCH)"; \
	fi
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > $@

$(VENV)/har $(VENV)/test $(VENV)/check $(VENV)/study $(VENV)/docs: $(VENV)/%: $(VENV)/torch.txt pyproject.toml
	@echo "installing lora_edge[$*]"
	$(PIP) install -c $(VENV)/torch.txt -e ".[$*]"
	@touch $@

$(VENV)/har $(VENV)/test $(VENV)/study: setup.py $(wildcard csrc/*.* csrc/*/*.*)

clean:
	rm -rf $(VENV) demo build *.egg-info lora_edge/_C*.so
