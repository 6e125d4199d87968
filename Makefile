# The two commands of the README: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs
SCENES ?= .cache/scenes
RECIPE ?=

.PHONY: demo test lint format parity train-scenes scenes-report pruning-report aot-tpu aot-gpu test-triton gpu-suite clean

demo: $(VENV)/.demo
	$(BIN)/python examples/generate.py --backend cpu --prompt "a red sphere" --seed 1 --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Compiles the kernels and a 2B scale for TPUs (v5e, v5p, v6e) on a machine without one.
aot-tpu: $(VENV)-aot-tpu/.installed
	$(VENV)-aot-tpu/bin/python benchmarks/aot_tpu.py
	$(VENV)-aot-tpu/bin/python -m pytest tests/test_ahead_of_time_tpu.py

# Compiles the kernels for NVIDIA GPUs (sm_80, sm_89, sm_90) on a machine without one.
aot-gpu: $(VENV)-aot-gpu/.installed
	$(VENV)-aot-gpu/bin/python benchmarks/aot_gpu.py
	$(VENV)-aot-gpu/bin/python -m pytest tests/test_ahead_of_time_gpu.py

# Runs the Triton kernel in Triton's interpreter, which needs torch.
test-triton: $(VENV)-triton-interpreter/.installed
	$(VENV)-triton-interpreter/bin/python -m pytest tests/pallas_kernels/test_triton_gpu.py

# On a machine with a GPU: conformance, tuning and timings of every kernel, into benchmarks/results.
gpu-suite: $(VENV)/.gpu
	$(BIN)/python benchmarks/gpu_suite.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python benchmarks/readme_tables.py --check
	$(BIN)/python benchmarks/pod_tables.py --check

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.test
	$(BIN)/python tests/parity.py tests/golden

# Trains an embedded model: image tokenizer, transformer and text encoder, export as a model folder. Another one:
# make train-scenes SCENES=.cache/base RECIPE="--recipe scenes-base --minutes 24 --parts-mb 15"   (one GPU)
train-scenes: $(VENV)/.demo
	$(BIN)/python -m toprovar_jax.training.scenes all --directory $(SCENES) $(RECIPE)

# What pruning saves and costs, on the larger embedded model, into benchmarks/results.
pruning-report: $(VENV)/.test
	$(BIN)/python benchmarks/ablation.py --model scenes-medium
	$(BIN)/python benchmarks/pruning_curve.py --model scenes-medium
	$(BIN)/python benchmarks/readme_tables.py

# The embedded models' scores on the six tasks, with contact sheets, into benchmarks/results.
scenes-report: $(VENV)/.demo
	$(BIN)/python benchmarks/scenes_report.py
	$(BIN)/python benchmarks/scenes_report.py --model scenes-medium
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

$(VENV)/.gpu: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[gpu]"
	touch $@

# One environment per compiler: each brings gigabytes that the others do not need.
$(VENV)-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test,$*]"
	touch $@

# Leaves $(SCENES) alone: it holds the checkpoints of a long training.
clean:
	rm -rf $(VENV) $(VENV)-* .cache/xla .pytest_cache .ruff_cache
