# Everything that is run by hand. Each target builds the environment first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: demo docs proof test test-slow lint clean

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
	rm -rf $(VENV) runs build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
