# POSIX make: GNU make and the BSDs' make both run it.
.POSIX:
.PHONY: help demo test lint docs bench clean

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
PLATFORMS = linux openbsd7 freebsd14

help:
	@echo "make demo    run a guest's traffic through vq and show what happened"
	@echo "make test    run the tests"
	@echo "make lint    linter, formatter and type checker, for every platform"
	@echo "make docs    build the documentation, into build/docs"
	@echo "make bench   measure the rings"
	@echo "make clean   remove what the others made"

demo: $(VENV)/run.done
	@echo "A scripted guest sends the traffic of real kernels through its virtqueues; the device"
	@echo "gives it to a loopback link, and it comes back through the receive queue."
	@echo
	$(BIN)/vq loopback
	@echo
	@echo "The same for a guest that takes nothing undone: vq finishes checksums and cuts segments."
	@echo
	$(BIN)/vq loopback --features -GUEST_CSUM,-MRG_RXBUF

test: $(VENV)/test.done
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for platform in $(PLATFORMS); do $(BIN)/mypy --platform $$platform || exit 1; done

docs: $(VENV)/docs.done
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

bench: $(VENV)/run.done
	$(BIN)/vq bench ring

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/python.done:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/run.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/test.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@ $(VENV)/run.done

$(VENV)/dev.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/test.done $(VENV)/run.done

$(VENV)/docs.done: $(VENV)/python.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@ $(VENV)/run.done
