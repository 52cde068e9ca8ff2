# Everything starts here: `make quickstart` to see it work, `make test` to check it.
# The newest Python that the dependencies have wheels for, unless one is given (make PYTHON=python3.12 test).
PYTHON ?= $(shell for one in python3.13 python3.12 python3.11; do "$$one" -c 'import venv, ensurepip' 2> /dev/null && echo "$$one" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DETECTRON2 := $(VENV)/.detectron2

.PHONY: install quickstart check docs test fuzz format clean detectron2

install: $(STAMP)

# Made again when the dependencies change; a half-made environment has no stamp and is completed.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found: install one (with its venv module), or give PYTHON=" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) with $$($(BIN)/python --version) (the first time: some minutes, several GB)"
	@if command -v uv > /dev/null; then uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else $(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'; fi
	@touch $@

# detectron2's Python code, for the tests of regionclip/detectron2; nothing else needs it.
detectron2: $(DETECTRON2)

$(DETECTRON2): $(STAMP) tools/install_detectron2.sh
	@tools/install_detectron2.sh $(VENV)
	@touch $@

quickstart: install
	@$(BIN)/regionclip quickstart

check: install
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@MYPYPATH=benchmarks $(BIN)/mypy --no-error-summary benchmarks
	@$(BIN)/lint-imports > $(VENV)/lint-imports.log || (cat $(VENV)/lint-imports.log; exit 1)

# The pages, into build/docs; a broken link or a page that the menu lacks is an error. Nothing is fetched.
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Fast tests first, so that a mistake shows early; each part ends with what was slowest. Two processes with one
# thread each take half the time of one with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --durations 12 --durations-min 2

test: check docs detectron2
	@$(PYTEST) -m "not slow"
	@$(PYTEST) -m slow

# Damaged files and killed jobs, by the thousand: hours on two cores. The tables go into docs/reliability.md.
FUZZ_FILES ?= 20000
FUZZ_SEED ?= 1
FUZZ_KILLS ?= 20

fuzz: install
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/campaign.py --files $(FUZZ_FILES) --seed $(FUZZ_SEED) --keep build/fuzz --write
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kills.py --kills $(FUZZ_KILLS) --seed $(FUZZ_SEED) --write

format: install
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
