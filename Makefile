# make demo   the whole pipeline at the tiny setting: environment, data, tokenizer, training, exam, a short chat
# make test   everything CI checks: sync, the book's form, every chapter, tests/
# The environment lives in .venv. PYTHON chooses the interpreter (3.10 or newer); CONSTRAINTS= lifts the tested versions.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
CONSTRAINTS ?= dev/constraints.txt
VENV ?= .venv
PY := $(VENV)/bin/python
CHAPTERS ?=

.PHONY: demo test env execute sync check html hooks clean
demo: env
	rm -rf runs/demo
	NANOCHAT_BASE_DIR= $(PY) -m nanochat_nb.speedrun -f configs/tiny.yaml

test: env
	$(PY) dev/book.py test

env: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 or newer is needed and was not found; try: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev,clean]"
	@touch $@

execute: env  ## run chapters in place and store their outputs: make execute CHAPTERS="02_model 03_pretrain"
	$(PY) dev/book.py execute $(CHAPTERS)

sync: env     ## export and clean in place
	$(PY) dev/book.py sync --fix

check: env
	$(PY) dev/book.py sync
	$(PY) dev/book.py check

html: env     ## the book as HTML in _proc/html
	$(PY) -m nbconvert --to html --output-dir _proc/html nbs/*.ipynb

hooks:        ## check sync before every commit
	git config core.hooksPath dev/hooks

clean:        ## everything made here except runs/
	rm -rf $(VENV) _proc build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
