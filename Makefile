# The only entrance. Every target sets up .venv by itself when it is missing or out of date.
#   make demo    the main job, in both backends          make bench   an hour of timings into docs/performance.md
#   make test    the tests, two at a time (JOBS=4 ...)   make docs    API pages in build/docs
#   make lint    ruff and mypy                           make clean   remove .venv and everything built
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready
# What has a reference page beside each package's own: protocols, result types, the equations of the losses, and what a
# part of one's own is given (tests/test_docstrings.py finds what is missing here)
PAGES := losses divergences hypergradients hypergradients.problem rivals rivals.nce sampling sampling.kernels energies \
	evaluation evaluation.normalizer evaluation.annealing evaluation.fit evaluation.scores evaluation.guide_draws \
	evaluation.psis evaluation.calibration evaluation.comparison evaluation.verdicts evaluation.report \
	programs.pair programs.records programs.visible training.runaways

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# .ready is touched last, so an installation that was interrupted is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bism needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv \
		|| { echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/quickstart.py

# One thread a worker: two workers with a thread a core each only get in each other's way.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tests/benchmarks/performance.py

docs: $(READY)
	$(BIN)/python -m pdoc --math --docformat restructuredtext --output-directory build/docs \
		pyro_bism numpyro_bism $(PAGES:%=pyro_bism.%) $(PAGES:%=numpyro_bism.%)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
