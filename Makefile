# make demo   installs, and runs `igpt demo` on the bundled digits
# make docs   installs, and builds the manual into site/
# make test   installs, builds the manual, and runs every check
# make test-floors   runs the core of the tests with the lowest versions that pyproject.toml allows, in an environment of
#                    their own; not part of make test, because torch 2.11 takes gigabytes where pip finds no CPU build
VENV ?= .venv
BIN = $(VENV)/bin

FLOORS = .venv-floors
CORE = tests/golden tests/model tests/sampling tests/data tests/evaluation tests/training/test_pretrain.py \
	tests/training/test_resume.py tests/training/test_finetune.py tests/training/test_checkpoints.py tests/cli/test_cli.py \
	tests/test_config.py tests/test_files.py tests/test_locks.py tests/test_readme.py

.PHONY: demo docs test test-floors install chromium clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@python3 -c 'import sys; assert sys.version_info >= (3, 11)' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@python3 -c 'import ensurepip' || { echo "python3 lacks venv: apt-get install python3-venv"; exit 1; }
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,onnx,tensorboard,wandb,trackio,mlflow,ray,remote,dev,docs]'
	touch $@

demo: install
	$(BIN)/igpt demo

# Strict says nothing when it is to be quiet: it counts the warnings that are shown.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The web page is tested in a real browser, which pip does not bring.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -qq chromium; \
	else echo "The tests of the web page need Chromium: apt-get install chromium"; exit 1; fi

test: install chromium
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/pytest --numprocesses 2 --dist worksteal

# First what the package needs at its lowest and nothing else. Then the extras at their lowest, which raise some of it.
test-floors: chromium
	python3 -m venv $(FLOORS)
	python3 tests/helpers/floors.py > $(FLOORS)/package.txt
	python3 tests/helpers/floors.py dev | grep '^pytest' > $(FLOORS)/pytest.txt
	python3 tests/helpers/floors.py app onnx dev docs > $(FLOORS)/extras.txt
	$(FLOORS)/bin/pip install --quiet --disable-pip-version-check -r $(FLOORS)/package.txt -r $(FLOORS)/pytest.txt
	$(FLOORS)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(FLOORS)/bin/pytest --numprocesses 2 --dist worksteal $(CORE)
	$(FLOORS)/bin/pip install --quiet --disable-pip-version-check -r $(FLOORS)/extras.txt
	$(FLOORS)/bin/ruff check
	$(FLOORS)/bin/ruff format --check
	NO_MKDOCS_2_WARNING=1 $(FLOORS)/bin/mkdocs build --strict --site-dir $(FLOORS)/site
	$(FLOORS)/bin/pytest --numprocesses 2 --dist worksteal tests/parity tests/report tests/webapp

clean:
	rm -rf $(VENV) $(FLOORS) site .mypy_cache .pytest_cache .ruff_cache
