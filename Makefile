# make demo    everything from nothing: environment, model, a question answered, a picture seen
# make test    the whole suite
# make check   lint, format, types
# make bench   speed against transformers, in one run
# make bench-cpu  the native step against openvino-genai (and llama.cpp with LLAMA=1)
# make bench-gpu  the engine on a GPU: decode, prefill, 256 sequences, start
# make docs    the command line's reference, from the commands themselves
# make web     the page, from web/ into the package (needs node; users do not)

PYTHON ?= python3
# The build of torch to install first, so that nothing else chooses one. On a machine with a GPU,
# set it to the build that fits, or empty to keep the environment's own.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
QUESTION ?= Why does a language model keep its keys and values?

.PHONY: demo test check bench bench-cpu bench-gpu docs web clean

demo: $(VENV)/.core
	@$(BIN)/kvist pull smollm2-135m > /dev/null
	@echo "> $(QUESTION)"
	@$(BIN)/kvist generate smollm2-135m "$(QUESTION)" --greedy --max-tokens 120
	@echo
	@$(BIN)/python examples/look.py

test: $(VENV)/.dev
	@$(BIN)/kvist pull smollm2-135m > /dev/null || echo "no SmolLM2: its tests will be skipped" >&2
	$(BIN)/pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/kvist pull smollm2-135m > /dev/null
	$(BIN)/python benchmarks/generate.py

bench-cpu: $(VENV)/.dev
	$(BIN)/kvist pull smollm2-135m > /dev/null
	$(BIN)/python benchmarks/cpu.py

bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_engine.py --seconds 600 --out benchmarks/results/gpu_engine.json

docs: $(VENV)/.dev
	$(BIN)/typer kvist.cli.app utils docs --name kvist --output docs/cli.md

web:
	cd web && npm ci --no-audit --no-fund && npm run build

$(VENV)/.core: pyproject.toml hatch_build.py $(wildcard src/kvist/native/src/*)
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install --quiet $(TORCH))
	$(BIN)/pip install --quiet --editable ".[images]"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
