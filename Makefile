# make run    start the server on 127.0.0.1:8000 (flags: make run ARGS="--port 9000")
# make top    a running service, live in the terminal (another than the one on 127.0.0.1:8000: make top ARGS="--url URL")
# make test   run the tests
# make test-clients  install seventeen clients that others wrote into .clients/ (npm, PyPI, Go, Maven; Chromium has to be there), and
#             kill and stop the service under them
# make chaos  kill, stop, reload and fill up what there is, under load, and count what clients get: eleven minutes
# make lint   ruff and mypy
# make bench  what a client costs and how fast it is served, beside baselines, in one run of about eight minutes
# make friends  a million users who follow 15 each, into data/ (smaller: make friends ARGS="--users 10000")
# make million  metabrew's test, a million clients on this machine: CLIENTS=, DURATION= (seconds), RATE= (messages/s),
#             APPLY=1 to set what the kernel must allow (as root), ARGS= for more (--help). CLIENTS=20000 for a laptop
# make soak   10,000 clients, messages for an hour, and whether memory grows: the same variables
# Each makes the virtual environment in .venv when it is missing or its requirements changed.

PYTHON ?= python3
VENV := .venv
unexport PYTHONDONTWRITEBYTECODE # each start of a service would compile all of it anew
BIN := $(VENV)/bin

.PHONY: run top test test-clients chaos lint bench friends million soak clean

run: $(VENV)/.run
	@exec $(BIN)/python app.py $(ARGS)

top: $(VENV)/.run
	@exec $(BIN)/python -m comet top $(ARGS)

test: $(VENV)/.load
	$(BIN)/python -m pytest -n 5 --dist worksteal $(ARGS)

test-clients:
	$(PYTHON) -m tests.clients.install
	.clients/python/bin/python -m pytest -n 0 tests/clients $(ARGS)

chaos: $(VENV)/.run
	COMET_CHAOS=full $(BIN)/python -m pytest -s tests/behaviour/test_chaos.py tests/behaviour/test_machines.py $(ARGS)

bench: $(VENV)/.load
	$(BIN)/python -m loadtest.bench $(ARGS)

LOADTEST := $(if $(CLIENTS),--clients $(CLIENTS)) $(if $(DURATION),--duration $(DURATION)) $(if $(RATE),--rate $(RATE)) $(if $(APPLY),--apply)

million soak: $(VENV)/.load
	@$(BIN)/python -m loadtest $@ $(LOADTEST) $(ARGS)

friends: $(VENV)/.load
	$(BIN)/python -m loadtest friends --out friends.txt $(ARGS)
	$(BIN)/python -m comet load-friends friends.txt --data data

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .clients .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "comet needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt deploy/requirements.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.load: loadtest/requirements.txt $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -r loadtest/requirements.txt
	@touch $@

$(VENV)/.lint: requirements-dev.txt $(VENV)/.load
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
