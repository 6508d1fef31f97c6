# Two commands do everything: `make demo` and `make test`. Both make .venv first (editable, with all that tests need).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

BUILD := src/evenbits/kernels/cpu/build.py
CSRC := $(BUILD) $(wildcard src/evenbits/kernels/cpu/csrc/*)

.PHONY: demo test slow lint clean kernels sanitize

demo: $(VENV)/kernels
	$(BIN)/evenbits demo

# Two workers with one thread each: two torch thread pools on two cores wait for each other more than they work.
test: $(VENV)/kernels lint
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n 2

slow: $(VENV)/kernels
	$(PYTEST) -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The constraint pins torch for this checkout only; pyproject.toml asks for >= 2.6.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Rebuilt when a C source changes; a library of other sources than those beside it is refused when it is loaded.
$(VENV)/kernels: $(VENV)/ready $(CSRC)
	-$(BIN)/python $(BUILD)
	touch $@

kernels: $(VENV)/ready
	$(BIN)/python $(BUILD)
	touch $(VENV)/kernels

# The kernels' tests with address and undefined-behaviour checks (GCC; torch itself is not instrumented). libstdc++ is
# loaded with the checker, which otherwise does not find what C++ exceptions are thrown with.
sanitize: $(VENV)/ready
	mkdir -p build/sanitized
	$(BIN)/python $(BUILD) --sanitize build/sanitized
	EVENBITS_CPU_LIBRARY=build/sanitized/libevenbits_cpu.so \
		LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(PYTEST) -p no:cacheprovider \
		tests/kernels/test_cpu_kernels.py tests/kernels/test_weight_only.py

clean:
	rm -rf $(VENV) evenbits-demo build src/evenbits/kernels/cpu/libevenbits_cpu.*
