# `make demo` needs nothing but Python 3.11 or 3.12 and the package index, `make test` a C compiler and chromium.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
MODEL := .cache/models/smollm2-135m-instruct
# Of `make chaos`: forward or inline.
SCORER ?= forward
# The CPU build of torch is not on the package index: where PIP_FIND_LINKS names no folder with it, PyTorch's own.
TORCH_INDEX := $(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test long lint chaos lock clean

demo: $(VENV)/.ready $(MODEL)/model.safetensors
	$(BIN)/agd-vllm decode examples/demo.jsonl --model $(MODEL) --output runs/demo --max-model-len 2048 \
		--engine-arg enforce_eager=true

# Two files at a time: most of the time goes to engines that start, on one core each.
test: $(VENV)/.ready lint $(MODEL)/model.safetensors
	$(BIN)/python -m pytest tests -m "not long" -n 2 --dist loadfile

# What `make test` leaves out for its time: runs of the real thing whose parts other tests cover.
long: $(VENV)/.ready $(MODEL)/model.safetensors
	$(BIN)/python -m pytest tests -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Thirty kills, about half an hour.
chaos: $(VENV)/.ready $(MODEL)/model.safetensors
	$(BIN)/python tests/chaos.py --model $(MODEL) --kills 30 --scorer $(SCORER) \
		--json benchmarks/results/chaos-$(SCORER).json

# Exact pins without what vLLM's metadata asks for and nobody imports (requirements/overrides.txt): hence --no-deps.
$(VENV)/.ready: $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH_INDEX) -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(MODEL)/model.safetensors: | $(VENV)/.ready
	$(BIN)/agd-vllm model fetch smollm2-135m-instruct --output $(MODEL)

# Needs uv; writes the lock anew from pyproject.toml.
lock:
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --extra cpu --extra dev --extra eval \
		--override requirements/overrides.txt $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		$(TORCH_INDEX) pyproject.toml -o $(LOCK)

clean:
	rm -rf $(VENV) runs build *.egg-info
