# The two commands of the README: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs
SCENES ?= .cache/scenes

.PHONY: demo test lint format parity train-scenes scenes-report clean

demo: $(VENV)/.demo
	$(BIN)/python examples/generate.py --backend cpu --prompt "a red sphere" --seed 1 --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.test
	$(BIN)/python tests/parity.py tests/golden

# Trains the embedded model from nothing: image tokenizer, transformer and text encoder, export into the package.
train-scenes: $(VENV)/.demo
	$(BIN)/python -m toprovar_jax.training.scenes all --directory $(SCENES)

# The embedded model's score on 24 prompts, with a contact sheet, into benchmarks/results.
scenes-report: $(VENV)/.demo
	$(BIN)/python benchmarks/scenes_prompts.py
	$(BIN)/python benchmarks/readme_tables.py

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $(VENV)/.demo $@

# Leaves $(SCENES) alone: it holds the checkpoints of a long training.
clean:
	rm -rf $(VENV) .cache/xla .pytest_cache .ruff_cache
