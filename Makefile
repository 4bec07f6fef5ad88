# Each target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test kill-test check bench gpu-check coverage clean

demo: $(VENV)/demo.done
	$(BIN)/hf-rmt demo --out demo-report

test: $(VENV)/test.done
	$(BIN)/python -m pytest

kill-test: $(VENV)/test.done
	$(BIN)/python tests/kills/run.py

check: $(VENV)/dev.done
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(VENV)/dev.done
	$(BIN)/python tests/benchmarks/run.py --out docs/benchmarks.md

# In the machine's own environment, where torch knows the GPU.
gpu-check:
	$(PYTHON) -m pytest tests/test_gpu.py -rs
	$(PYTHON) tests/benchmarks/run.py --only llama_blocks --out docs/benchmarks.md

coverage: $(VENV)/dev.done
	$(BIN)/python tests/coverage/run.py --out docs/coverage.md

clean:
	rm -rf $(VENV) demo-report build *.egg-info

# torch first and alone: asked for by a range it may bring gigabytes of CUDA libraries.
$(VENV)/base.done: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/%.done: $(VENV)/base.done pyproject.toml setup.cfg
	$(PIP) --editable .[$*]
	touch $@
