# `make demo` needs nothing but Python 3.11 or 3.12 and the package index, `make test` a C compiler, too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
MODEL := .cache/models/smollm2-135m-instruct
# Of `make chaos`: forward or inline.
SCORER ?= forward

.PHONY: demo quick test long lint browser chaos lock clean

demo: $(VENV)/.ready $(MODEL)/model.safetensors
	@echo "decode: examples/demo.jsonl with AGD, into runs/demo"
	@$(BIN)/agd-vllm decode examples/demo.jsonl --model $(MODEL) --output runs/demo --max-model-len 2048 \
		--engine-arg enforce_eager=true

# Two workers with a core each; which files go together, and first: tests/two_workers.py.
PYTEST := $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations=10

# TIERS=all: with what is long, too, in one session.
TIERS := short
MARKS := $(if $(filter all,$(TIERS)),,-m "not long")

# What starts no engine and takes less than five seconds a test (tests/quick_tests.py): before each push.
quick: $(VENV)/.ready lint $(MODEL)/model.safetensors
	$(PYTEST) --quick

# How often the tests may start vLLM and Ray: a start takes half a minute of a core.
MOST_STARTS := $(if $(filter all,$(TIERS)),150,80)

test: $(VENV)/.ready lint browser $(MODEL)/model.safetensors
	$(PYTEST) $(MARKS) --most-starts $(MOST_STARTS)

# What `make test` has a short form of, or covers in parts: runs of the real thing that take minutes.
long: $(VENV)/.ready $(MODEL)/model.safetensors
	$(PYTEST) -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Thirty kills, about half an hour.
chaos: $(VENV)/.ready $(MODEL)/model.safetensors
	$(BIN)/python tests/chaos.py --model $(MODEL) --kills 30 --scorer $(SCORER) \
		--json benchmarks/results/chaos-$(SCORER).json

# The report's tests show it in a real browser.
browser: $(VENV)/.ready
	@$(BIN)/python tests/browser.py

$(VENV)/.ready: $(LOCK) pyproject.toml
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) requirements/set_up.py $(VENV)
	@touch $@

$(MODEL)/model.safetensors: | $(VENV)/.ready
	@echo "model: SmolLM2-135M-Instruct of its package, into $(MODEL)"
	@TQDM_DISABLE=1 $(BIN)/agd-vllm model fetch smollm2-135m-instruct --output $(MODEL) >/dev/null

# Needs uv; writes the lock anew from pyproject.toml.
lock:
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --extra cpu --extra dev --extra eval \
		--override requirements/overrides.txt $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		$(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu) pyproject.toml -o $(LOCK)

clean:
	rm -rf $(VENV) runs build *.egg-info
