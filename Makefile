# `make demo` and `make test` are all a fresh machine with Python 3.11 or newer needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Tests run in this many processes, each with one thread: threads that share cores with other processes wait for them.
JOBS   ?= auto
# Their files lie in memory where 4 GiB are free there: they sync thousands of small files.
SCRATCH ?= $(shell df -k /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4194304 {print "/dev/shm"}')

.PHONY: demo test check format docs bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,demo]"
	touch $@

# Real flights: convert, fit, kill, resume, evaluate, report. A few minutes; results in .demo/.
demo: $(VENV)/ready
	$(BIN)/python examples/flights_demo.py .demo

# Everything that must hold before a change lands: the checks, then every test that needs no GPU. The package is kept
# compiled, whatever the environment says: tests start hundreds of processes.
test: check
	TMPDIR=$(or $(SCRATCH),$(TMPDIR)) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of docs/ into site/: `python -m http.server -d site`. A link that leads nowhere ends it.
docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The figures of the README, in about six minutes. Needs Debian's package dataset-fashion-mnist.
bench: $(VENV)/ready
	$(BIN)/python tools/bench_memory.py
	$(BIN)/python tools/bench_resume.py
	$(BIN)/python tools/bench_fashion.py --seeds 0,1,2

clean:
	rm -rf $(VENV) site .demo .examples .bench .mypy_cache .pytest_cache .ruff_cache .hypothesis
