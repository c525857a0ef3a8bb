# Everything a person runs by hand; each target makes the environment by itself when it is missing or stale.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: demo proof test test-slow lint clean

demo: $(READY)
	$(VENV)/bin/video-swinv2 demo --out $(OUT)

proof: $(READY)
	$(VENV)/bin/python -m tests.proof

test: $(READY)
	$(VENV)/bin/python -m pytest -q --numprocesses 2 --dist loadfile

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -q -m slow

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
