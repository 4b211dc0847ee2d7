# Most of a test's time is XLA's: programs that run once need few of its optimisations. `make parity` and the GPU's tests have all.
# Bytecode is kept, whatever the shell says: every worker and every command that a test starts would compile all modules anew.
QUICK = JAX_DISABLE_MOST_OPTIMIZATIONS=1 PYTHONDONTWRITEBYTECODE=

# Half of the tests, as they follow each other, on each worker: one that is done takes what the other would do last.
# A worker that crashes ends the run, which would otherwise wait for it for ever.
TWO = -n 2 --dist worksteal --max-worker-restart 0

# Every command runs in .venv, which `make setup` creates and brings up to date when pyproject.toml changes.
PYTHON ?= python3

.PHONY: setup demo test slow soak browser lint format parity docs sdist clean
setup: .venv/.installed

demo: setup
	.venv/bin/python -m train.demo

test: setup
	$(QUICK) .venv/bin/python -m pytest $(TWO) --durations 15

slow: setup
	$(QUICK) .venv/bin/python -m pytest $(TWO) -m 'slow and not parity and not gpu'

# What takes too long for every change.
soak: setup
	$(QUICK) .venv/bin/python -m pytest -s -m soak

# The server's page in headless Chromium: the machine's own, or playwright's, or Debian's. Screenshots lie in build/page.
browser: setup
	.venv/bin/python -m pip install --quiet --editable '.[browser]'
	command -v chromium || .venv/bin/python -m playwright install chromium || apt-get install --yes chromium
	$(QUICK) .venv/bin/python -m pytest tests/serve/test_page.py -m browser

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# Against Hugging Face's models and the evaluation harness; in an environment of its own, so that no other test has torch.
# The harness keeps its tasks' texts in one cache, which two workers would fill at once: a file stays on one worker.
parity: .venv-parity/.installed
	.venv-parity/bin/python -m pytest $(TWO) --dist loadfile tests/parity tests/eval -m parity

# The documentation, in site/; strict: a dead link or anchor is an error.
docs: .venv-docs/.installed
	.venv-docs/bin/python -m docs.tables --check
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# A source archive carries what its tests need: they are collected in it, unpacked.
sdist: setup
	rm -rf dist
	.venv/bin/python -m build --sdist
	cd dist && tar -xzf *.tar.gz && cd */ && ../../.venv/bin/python -m pytest --collect-only -qq

clean:
	rm -rf .venv .venv-parity .venv-docs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spotlight-jax needs Python 3.11 or newer, and $(PYTHON) is older; try: make PYTHON=python3.12 setup" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.venv-parity/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet torch==2.13.0 'accelerate>=1.0' --editable '.[dev,eval]'
	@touch $@

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --editable '.[docs]'
	@touch $@
