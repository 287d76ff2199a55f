# `make train` and `make test` need Python 3.11 or newer and nothing else of ours.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Compilers for GPUs and TPUs live apart: beside them JAX looks for devices that are not here.
COMPILERS := .venv-compile/installed

# Trainers as they are published, which need Python 3.12. Some of what they need names an older
# Python as its last, which pip minds and uv does not.
CLIENTS := .venv-clients/installed .venv-haliax/installed
FREEZE := uv pip freeze --exclude-editable --exclude pip --exclude uv

# On a CPU, LAPACK's threads and XLA's wait for each other: small factorisations want one.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: train test test-slow test-compiled compiled test-clients test-versions test-docs docs linkcheck notebooks lint dist repository clean

train: $(INSTALLED)
	$(BIN)/python examples/pretrain.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow

test-compiled: $(COMPILERS)
	.venv-compile/bin/python -m pytest -n 2 --dist loadgroup -rs tests/compiled

compiled: $(COMPILERS)
	.venv-compile/bin/python benchmarks/compiled.py

test-clients: $(CLIENTS)
	.venv-haliax/bin/python -m pytest -rs -o filterwarnings=default tests/clients/test_haliax.py
	.venv-clients/bin/python -m pytest -rs -o filterwarnings=default \
	  --ignore tests/clients/test_haliax.py tests/clients
	.venv-haliax/bin/$(FREEZE) --python .venv-haliax > tests/clients/haliax_versions.txt
	.venv-clients/bin/$(FREEZE) --python .venv-clients > tests/clients/versions.txt

test-versions:
	.ci/test_versions

test-docs: docs
	$(BIN)/python -m pytest docs

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -E -W --keep-going -q docs docs/_build/html

linkcheck: $(INSTALLED)
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

notebooks: $(INSTALLED)
	$(BIN)/jupytext --to ipynb --update notebooks/*.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check

dist: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[release]"
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# make repository URL=https://github.com/you/sumo-optax
repository:
	$(PYTHON) .ci/repository.py "$(URL)"
	$(MAKE) notebooks

clean:
	rm -rf .venv .venv-clients .venv-compile .venv-haliax .venv-newest .venv-oldest build dist runs docs/_build docs/_generated docs/gallery *.egg-info

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[examples,test,lint,docs,notebooks]"
	touch $@

$(COMPILERS): pyproject.toml
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/python -m pip install --quiet --editable ".[compile,test]"
	touch $@

.venv-clients/installed: PINS := versions.txt
.venv-haliax/installed: PINS := haliax_versions.txt
$(CLIENTS): %/installed: pyproject.toml tests/clients/requirements.txt tests/clients/haliax_requirements.txt
	$$(.ci/python 3.12) -m venv $*
	$*/bin/python -m pip install --quiet uv
	$*/bin/uv pip install --quiet --python $*/bin/python --editable . \
	  --requirement tests/clients/$(PINS)
	touch $@
