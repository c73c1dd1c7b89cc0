# make serve   a server on this machine, answering curl, with a first clip saved
# make test    lint, types and every test but the load; where the CPU has AVX-512, those of the engine without it too
# make load    the load: many requests at once, and a thousand one after another
# make faults  faults and attacks, the minutes of overload too
VARIANT ?= debug
PORT ?= 8080

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Torch, oneDNN, FBGEMM and MKL each have a switch of their own.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
CPU_TESTS := $(addprefix tests/,unit/test_linear.py unit/test_block_attention.py unit/test_language_model.py \
	unit/test_musicgen.py e2e/test_engine.py)

.PHONY: serve test test-avx2 load faults lint clean

serve: .venv/serving
	exec $(BIN)/python -m archive_scripts serve $(VARIANT) --port $(PORT) --open

# Half of the time a test waits for a server to start or to end, so two files run at once, on a core each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	@if grep -qw avx512f /proc/cpuinfo; then $(MAKE) test-avx2; fi

# The products, the language model and the engine, as on a CPU with AVX2 alone.
test-avx2: .venv/development
	$(AVX2) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(CPU_TESTS)

load: .venv/development
	$(BIN)/python -m pytest -m load --capture=no

faults: .venv/development
	$(BIN)/python -m pytest -m faults

lint: .venv/development
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv model-store .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/serving: requirements.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found;" \
		"install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@echo "installing requirements.lock and PyTorch into .venv (PyTorch is large; a few minutes the first time)"
	$(INSTALL) --require-hashes --no-deps --requirement requirements.lock
	$(INSTALL) --requirement requirements.txt
	touch $@

.venv/development: requirements-dev.txt .venv/serving
	@echo "installing requirements-dev.txt into .venv"
	$(INSTALL) --requirement requirements-dev.txt
	touch $@
