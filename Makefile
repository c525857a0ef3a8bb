# Everything that is run by hand. Each target builds the environment first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: demo docs proof test test-slow fuzz gpu gpu-wheels lint clean

demo: $(READY)
	$(VENV)/bin/video-swinv2 demo --out $(OUT)

# The site, in site/index.html. Strict: a broken link or an undocumented reference is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

proof: $(READY)
	$(VENV)/bin/python -m tests.proof

test: $(READY)
	$(VENV)/bin/python -m pytest -q --numprocesses 2 --dist loadfile

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -q -m slow

# Damaged files of every kind through everything that reads files, for half an hour; ARGS="--only video:1234" tries one.
fuzz: $(READY)
	$(VENV)/bin/python -m tests.hostile.fuzz $(ARGS)

# Tests and benchmarks that need a GPU, in at most eight minutes (docs/gpu.md). With WHEELS=FOLDER, in an environment that
# adds these wheels to the PyTorch of PYTHON and needs no network; without it, in the usual one.
GPU_VENV := .gpu
DEVICE ?= cuda
MINUTES ?= 8
gpu: OUT = gpu.json
gpu: $(if $(WHEELS),$(GPU_VENV)/.ready,$(READY))
	$(if $(WHEELS),$(GPU_VENV),$(VENV))/bin/python -m tests.gpu --out $(OUT) --device $(DEVICE) --minutes $(MINUTES)

# Run as a file, because PYTHON may have another package called tests.
$(GPU_VENV)/.ready: tests/gpu/wheels.py
	$(PYTHON) tests/gpu/wheels.py install $(WHEELS) $(GPU_VENV)
	touch $@

# Fills the folder WHEELS for a machine without network; WITHOUT names packages that it has.
gpu-wheels: $(READY)
	$(VENV)/bin/python tests/gpu/wheels.py collect $(WHEELS) --without $(WITHOUT)

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(GPU_VENV) runs build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
