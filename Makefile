# The whole interface. `make demo` and `make test` need nothing but Python 3.11 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RESULTS ?= results
ZOO    := .venv-zoo
ZOO_STAMP := $(ZOO)/.installed
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test quick check bench bench-full bench-peers docs clean

demo: $(STAMP)
	$(BIN)/gracile demo --out runs/demo $(if $(wildcard runs/demo/compressed/state/run.json),--resume,)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: $(STAMP)
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --tier smoke --results $(RESULTS)

bench-full: $(STAMP)
	$(BIN)/python -m benchmarks.run --tier full --results $(RESULTS)

# Beside other libraries. torchvision beside CPU torch breaks packages that import it, so these have an environment of their own.
bench-peers: $(ZOO_STAMP)
	$(ZOO)/bin/python -m benchmarks.run --tier full --only structure --results $(RESULTS)
	$(ZOO)/bin/python -m benchmarks.run --tier full --only structure_speed --results $(RESULTS)
	$(ZOO)/bin/python -m benchmarks.run --tier full --only pipeline --results $(RESULTS)
	$(ZOO)/bin/python -m benchmarks.run --tier full --only ptq --results $(RESULTS)
	$(ZOO)/bin/python -m benchmarks.run --tier full --only qat_step --results $(RESULTS)

docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch is named so that its pinned build is taken, whatever the index offers.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $(STAMP)

$(ZOO_STAMP): pyproject.toml constraints.txt
	test -x $(ZOO)/bin/python || $(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]' \
		torchvision timm transformers torch-pruning nncf torchao
	touch $(ZOO_STAMP)

clean:
	rm -rf $(VENV) $(ZOO) runs site .pytest_cache .mypy_cache .ruff_cache
