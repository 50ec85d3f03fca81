# POSIX make: GNU make and the BSDs' make both run it.
.POSIX:
.PHONY: help demo test test-scripted test-guests lint docs bench clean

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
# Several tests at the same time; PARALLEL= for one after the other. From Python 3.12 on a process
# with threads, as pytest-xdist's are, is warned when it forks, which tests of the sandbox do.
PARALLEL = $$($(BIN)/python -c 'import sys; sys.version_info < (3, 12) and print("-n logical --maxprocesses 4")')
PLATFORMS = linux openbsd7 freebsd14

help:
	@echo "make demo    run a guest's traffic through vq and show what happened"
	@echo "make test    run the tests: test-scripted, then test-guests"
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

test: test-scripted test-guests

test-scripted: $(VENV)/test.done
	$(BIN)/python -m pytest $(PARALLEL) --ignore=tests/guests $(TESTS)

# One after the other: a guest and its device take two processors.
test-guests: $(VENV)/test.done
	$(BIN)/python -m pytest tests/guests

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
