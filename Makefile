# make test and make demo need python3 (3.10 or newer) with venv, make and git; nothing else.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install test slow check demo bench clean

help:
	@echo "make test    install into $(VENV), then check style, types and run the tests"
	@echo "make slow    run the tests that take long"
	@echo "make demo    compress the bundled model and show what it costs before and after"
	@echo "make check   style and types only"
	@echo "make bench   measure everything, about an hour, and write benchmarks/RESULTS.md"
	@echo "make clean   remove $(VENV) and what the demo wrote"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]' $(foreach p,$(wildcard plugins/*),--editable $(p))
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# glibc gives large tensors back to the system and asks for them again: a quarter of the time.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648

test: check
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) $(BIN)/python -m pytest -n 2 -m slow

demo: $(INSTALLED)
	mkdir -p out
	$(BIN)/tdkit compress garipov --budget 0.25 --data fashion-mnist-sample --output out/garipov-0.25.pt --force

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache .hypothesis
