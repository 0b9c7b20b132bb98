# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# One more than cores: tests wait for processes that start, one after the other.
# A process that dies ends the suite: one in its place would wait for work that does not come.
PROCESSES := -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

.PHONY: install demo test test-all check suite clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[dev]'
	touch $@

install: $(VENV)/installed

$(VENV)/oracles: $(VENV)/installed
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[dev,oracles,wandb,mlflow,trackio]'
	touch $@

demo: install
	$(BIN)/tutelage run cluster/recipes/demo.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

suite: install
	$(BIN)/pytest -m 'not drill and not benchmark' --durations=15 $(PROCESSES)

test: install
	$(MAKE) --no-print-directory --jobs=2 suite check

test-all: check $(VENV)/oracles
	$(BIN)/pytest --durations=25

clean:
	rm -rf $(VENV) runs
