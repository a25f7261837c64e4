# Needs make and Python 3.10 or newer, nothing else. Everything is installed into one virtual
# environment, and each target installs only what it uses.
#
#   make PYTHON=python3.12 test       another interpreter
#   make VENV=/somewhere/else test    another environment

PYTHON ?= python3
VENV = .venv
# Without the packages of the optional parts the tests of those parts would be skipped.
TEST_EXTRAS = test,demo,hf,lightning,tensorboard,completion
# The reference describes the optional parts too, and the gallery is computed on a small network.
DOCS_EXTRAS = docs,demo,hf,lightning

# `make bench BENCH_OPTIONS=--quick` takes minutes, all of it five hours.
BENCH = experiments/benchmarks
BENCH_OPTIONS =

# Programs are run as modules of the environment's interpreter, never as $(VENV)/bin/program: the
# first line of such a script holds the environment's path and breaks when the folder is moved.
RUN = "$(VENV)/bin/python"

# For a file that changes, make would need file names as targets, and a path with a space in it
# (VENV=...) cannot be one. So a stamp holds checksums of what the environment was made from.
CHECKSUMS = cksum pyproject.toml tests/constraints.txt $(BENCH)/constraints.txt $(BENCH)/peers.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs docs-links bench clean venv
.PHONY: demo-requirements test-requirements lint-requirements docs-requirements
.PHONY: bench-requirements bench-run
# Two pips in one environment, as under make -j, would spoil it.
.NOTPARALLEL:

help: ## list these targets
	@awk -F ': ## ' '/^[a-z-]+: ## /{ printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## analyse a small network and write demo-run/report.html
test: ## run the quick tests
test-all: ## run all tests, the slow ones too
lint: ## check style, formatting, types, and the direction of imports
docs: ## build the documentation into docs/_build/html/
docs-links: ## ask every address that the documentation links to; needs a network
bench: ## measure spectra beside other packages, into bench-run/
clean: ## delete virtual environments, caches, builds and the output of demo and bench

demo: demo-requirements
	@echo "Running the demo; its report will be demo-run/report.html"
	@$(RUN) -m spectra demo --out demo-run

# One thread each: two test processes that use every core at once slow each other down.
test: test-requirements
	@echo "Running the quick tests"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow"

test-all: test-requirements
	@echo "Running all tests, the slow ones too"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

# import-linter has no module to run, so its entry point is called.
lint: lint-requirements
	@echo "Checking style, formatting, types and imports"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo

# Warnings are errors, and every name in the reference has to be found. The source is the repository:
# see docs/conf.py.
SPHINX = $(RUN) -m sphinx -c docs -d docs/_build/doctrees --fail-on-warning --keep-going --nitpicky --quiet

docs: docs-requirements
	@echo "Building the documentation; it begins at docs/_build/html/index.html"
	@$(SPHINX) -b html . docs/_build/html

docs-links: docs-requirements
	@echo "Following the links of the documentation"
	@$(SPHINX) -b linkcheck . docs/_build/links

# The other packages get an environment of their own: some contradict what the tests are run with.
bench:
	@$(MAKE) --no-print-directory VENV="$(VENV)-bench" bench-run

bench-run: bench-requirements
	@echo "Measuring; the results will be in bench-run/"
	@$(RUN) -m experiments.benchmarks $(BENCH_OPTIONS)

clean:
	@echo "Deleting virtual environments, caches, builds and the output of demo and bench"
	@rm -rf .venv .venv-bench bench-run demo-run large-run build dist docs/_build .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find docs/gallery -name '*.png' -o -name '*.md' ! -name README.md | xargs rm -f
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@$(RUN) -c 'import pip' 2>/dev/null || { \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "spectra needs Python 3.10 or newer, but '$(PYTHON) --version' says: $$("$(PYTHON)" --version 2>&1). Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv (for another Python than the system's, its own: python3.12-venv)" >&2; exit 1; }; \
	  echo "Making a virtual environment in $(VENV) with $$("$(PYTHON)" --version)"; \
	  "$(PYTHON)" -m venv $$([ ! -f "$(VENV)/pyvenv.cfg" ] || echo --clear) "$(VENV)"; }

PIP_INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt

# $(call install,NAME,EXTRAS,CONSTRAINTS,WITHOUT THEIR REQUIREMENTS), the last two optional
define install
	@$(CHECKSUMS) | cmp -s - "$(VENV)/$(1)-requirements" || { \
	  echo "Installing spectra[$(2)] into $(VENV): minutes the first time, most of it PyTorch"; \
	  $(PIP_INSTALL) $(3) -e ".[$(2)]" \
	  && { [ -z "$(4)" ] || $(PIP_INSTALL) $(3) --no-deps $(4); } \
	  && $(CHECKSUMS) > "$(VENV)/$(1)-requirements"; }
endef

demo-requirements: venv
	$(call install,demo,demo)

test-requirements: venv
	$(call install,test,$(TEST_EXTRAS))

lint-requirements: venv
	$(call install,lint,lint)

docs-requirements: venv
	$(call install,docs,$(DOCS_EXTRAS))

bench-requirements: venv
	$(call install,bench,bench,-c $(BENCH)/constraints.txt,-r $(BENCH)/peers.txt)
