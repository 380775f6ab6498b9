# `make demo` or `make test` is all that a fresh clone needs: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
CASES := 10000
SEED := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-star test fuzz soak faults check format bench lock clean

help:
	@echo "make setup   .venv with vLLM (its CPU build where there is no NVIDIA GPU), Ray and the development tools"
	@echo "make demo    a question over a long prompt, vLLM's own attention next to ours"
	@echo "make demo-star  one question over a long context on two hosts, exact and in blocks"
	@echo "make test    the tests that this machine can run; ARGS='-n 2 -k merge' goes to pytest (-n: workers)"
	@echo "make fuzz    10,000 random requests against vLLM's own tokens; CASES=… SEED=… say how many and which"
	@echo "make soak    10,000 short requests through one server, and whether it holds more than before; CASES=… ARGS='-- …'"
	@echo "make faults  what happens when hosts die, are late or lie, memory is full, requests are aborted or preempted"
	@echo "make check   ruff and mypy; 'make format' mends what ruff can"
	@echo "make bench   benchmarks on a GPU; ARGS='decode --out DIR', ARGS='--dry-run' without one"
	@echo "make lock    resolve requirements/cpu.lock anew"
	@echo "make clean   remove .venv and everything generated"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/cpu.lock requirements/dev.in tools/setup_env.py
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

demo-star: $(STAMP)
	$(BIN)/python examples/star_demo.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

fuzz: $(STAMP)
	FARSPAN_FUZZ_CASES=$(CASES) FARSPAN_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -s tests/integration/test_fuzz.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tools.soak --requests $(CASES) --seed $(SEED) $(ARGS)

faults: $(STAMP)
	$(BIN)/python -m pytest -v -m faults $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typecheck.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)

lock: $(STAMP)
	$(BIN)/python tools/lock.py

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
