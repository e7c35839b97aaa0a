# make demo   installs, and tells the whole story on the bundled digits
# make docs   installs, and builds the manual into site/
# make test   installs, builds the manual, and runs every check
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo docs test install chromium clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@python3 -c 'import sys; assert sys.version_info >= (3, 11)' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@python3 -c 'import ensurepip' || { echo "python3 lacks venv: apt-get install python3-venv"; exit 1; }
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,dev,docs]'
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

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
