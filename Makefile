# Two commands do everything: `make demo` and `make test`. Both make .venv first (editable, with all that tests need).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test slow lint clean

demo: $(VENV)/ready
	$(BIN)/evenbits demo

# Two workers with one thread each: two torch thread pools on two cores wait for each other more than they work.
test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n 2

slow: $(VENV)/ready
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

clean:
	rm -rf $(VENV) evenbits-demo
