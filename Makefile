# Every target sets up what it needs; a fresh machine needs python3 (3.11 or later) with venv, and pip's network.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint format bench chaos soak clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,onnx]'
	touch $@

demo: $(STAMP)
	rm -rf medtune-demo
	$(BIN)/medtune demo

# Two workers, a file each: half of the suite's time is waiting for processes that it starts. SLOW=1, as CI says, adds
# what takes minutes each: real clusters, studies that are killed and resumed, real data.
WORKERS ?= 2
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(if $(SLOW),,-m "not slow") $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/medtune bench train

ROUNDS ?= 50
chaos: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/chaos.py --rounds $(ROUNDS) $(ARGS)

MINUTES ?= 120
soak: $(STAMP)
	MALLOC_ARENA_MAX=2 PYTHONPATH=. $(BIN)/python tests/soak.py --minutes $(MINUTES) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
