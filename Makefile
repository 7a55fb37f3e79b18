# Everything runs from a bare Python 3.11 and make: the first target builds .venv from constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# One thread per process: pytest runs one process per core.
SINGLE := OMP_NUM_THREADS=1
PYTEST := $(SINGLE) $(BIN)/pytest -n 2

.PHONY: help setup demo test check sweep bench bench-criteria coverage format clean

help:
	@echo 'make demo    train a small network on digits, prune it to half its MACs, verify, fine-tune'
	@echo 'make test    formatter, linter, types, import layers, tests'
	@echo 'make sweep   the tests that are too slow for make test'
	@echo 'make bench   timings beside Torch-Pruning'
	@echo 'make bench-criteria  accuracy beside Torch-Pruning on Fashion-MNIST, write docs/explanation/benchmarks.md'
	@echo 'make coverage  prune and verify every model of the zoos, write docs/reference/coverage.md'
	@echo 'make format  format the code and apply the safe fixes of the linter'
	@echo 'make clean   remove .venv and every cache'

setup: $(READY)

# PyTorch goes first and by exact version: any other name for it may bring gigabytes of CUDA. What
# follows is installed without dependencies, because constraints.txt holds the whole closure.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'fxprune needs Python >= 3.11; set PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0 -qq --constraint constraints.txt
	$(BIN)/pip install --no-deps torchvision==0.28.0 -qq
	$(BIN)/pip install --no-deps -qq --requirement constraints.txt
	$(BIN)/pip install --no-deps -qq --no-build-isolation --editable .
	$(BIN)/pip check
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	$(PYTEST) -m 'not slow'

sweep: $(READY)
	$(PYTEST) -m slow

bench: $(READY)
	$(BIN)/python examples/bench/analysis_speed.py
	$(BIN)/python examples/bench/depth_scaling.py

# Hours from nothing; networks, slim models and rows that are there already are not made again.
CRITERIA := $(BIN)/python examples/bench/criteria.py
TRAINED := 'fp.prune*' 'CPMC, sum, added' Random 'TP LAMP' 'TP BNScale' 'TP GroupTaylor, iso*' 'TP GroupHessian'

bench-criteria: $(READY)
	$(CRITERIA) run
	$(CRITERIA) run --seeds 0 --keep 0.7 0.3
	$(CRITERIA) reconstruct
	$(CRITERIA) epoch --methods $(TRAINED)
	$(CRITERIA) latency --seeds 0 --keep 0.7 0.5 0.3
	$(CRITERIA) report

# The zoos stay out of .venv: a folder of their own, which only the sweep sees.
ZOOS := build/coverage-zoos

$(ZOOS)/ready: examples/coverage/requirements.txt $(READY)
	rm -rf $(ZOOS)
	$(BIN)/pip install --no-deps -qq --target $(ZOOS) --requirement $<
	@touch $@

coverage: $(ZOOS)/ready
	$(SINGLE) PYTHONPATH=$(ZOOS) $(BIN)/python -m examples.coverage run
	$(SINGLE) PYTHONPATH=$(ZOOS) $(BIN)/python -m examples.coverage report

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
