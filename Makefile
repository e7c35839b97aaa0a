# make demo   installs, and tells the whole story on the bundled digits
# make test   installs, and runs every check
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test install chromium clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@python3 -c 'import sys; assert sys.version_info >= (3, 11)' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@python3 -c 'import ensurepip' || { echo "python3 lacks venv: apt-get install python3-venv"; exit 1; }
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app,dev]'
	touch $@

demo: install
	$(BIN)/igpt demo

# The web page is tested in a real browser, which pip does not bring.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -qq chromium; \
	else echo "The tests of the web page need Chromium: apt-get install chromium"; exit 1; fi

test: install chromium
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
