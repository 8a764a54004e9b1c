# Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# For instance PIP_ARGS="--find-links wheels/", where torch must come from another place.
PIP_ARGS ?=
# For instance PYTEST_ARGS="-k upsample -x".
PYTEST_ARGS ?=

BIN := .venv/bin
VENV_PYTHON := $(BIN)/python
PIP := $(VENV_PYTHON) -m pip install --disable-pip-version-check $(PIP_ARGS)
# Developers want a compiler error, not a silent pure Python install.
INSTALL = DEEPLAB_FAST_BUILD_EXT=$${DEEPLAB_FAST_BUILD_EXT:-1} \
	$(PIP) --no-build-isolation --no-deps -e .

DEPS := .venv/.deps
LINT_DEPS := .venv/.lint-deps
INSTALLED := .venv/.installed
RESULTS := build/test-results
# The package as it is imported, with kernels/ in it: mypy does not see it in the checkout.
TYPED := build/mypy/deeplab_fast
CPP_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu')

# The folders count too: their time changes when a file comes or goes.
SOURCES := setup.py pyproject.toml $(shell find csrc 2>/dev/null)

# The groups of tests; each runs in a process of its own. The one that skips all its tests where
# there is no GPU does not come last, where it would read as a run without a test.
GROUPS := gpu launch interpret aot training unit
# In a process that ran thousands of other tests before, the first training crashed.
FOLDERS_training := $(wildcard tests/unit/test_train*.py)
FOLDERS_unit := $(filter-out $(FOLDERS_training),$(wildcard tests/unit/test_*.py)) tests/models
FOLDERS_interpret := tests/interpret
# Those of many seconds first: a file stays in one process, as its tests share what they compile.
SLOW_aot := $(patsubst %,tests/aot/test_%.py,cpu_sanitized cpu_threads)
FOLDERS_aot := $(SLOW_aot) $(filter-out $(SLOW_aot),$(wildcard tests/aot/test_*.py))
FOLDERS_gpu := tests/gpu
FOLDERS_launch := tests/launch
# Two processes; the one that has no test left takes some of the other's.
STEALING := -n 2 --dist worksteal
ARGS_launch := $(STEALING)
ARGS_interpret := $(STEALING)
ARGS_aot := -n 2 --dist loadfile --no-loadscope-reorder
ARGS_unit := $(STEALING)
ARGS_training := $(STEALING)
# One thread each. More, which a test asks for, sleep while they wait: on a busy machine they spun
# for minutes.
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# Triton reads it when it is imported; the other groups need it unset.
ENV_interpret := TRITON_INTERPRET=1

# The oldest PyTorch and Triton that are supported, beside Python 3.12: what a GPU machine has.
PYTHON312 ?= $(shell for python in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && \
	echo "$$python" && break; done)
OLDEST := .venv-oldest/bin/python
OLDEST_DEPS := .venv-oldest/.deps
OLDEST_INSTALLED := .venv-oldest/.installed
# Of ops, backends and models, but for what tells models apart and writes them down, the pages about
# them, single models, and how units of a GPU's run are started and watched.
OLDEST_UNIT = $(filter-out tests/unit/test_gpu_program.py,$(wildcard tests/unit/test_gpu*.py)) \
	$(filter-out $(patsubst %,tests/models/test_%.py,accuracy activations options precision demo \
	accelerate_libraries deployment_page readme saved_models weights bird efficientnet_lite embedded fregu856 torchvision_parity),$(wildcard tests/models/test_*.py)) \
	$(wildcard $(patsubst %,tests/unit/test_%*.py,\
	aspp backends batch_norm bilinear conv prepared tuned upsample))
# Of launches not what the newest Triton tells as well: modes of fp16 and TF32, which differ from
# those of bf16 and fp32 in types alone; consumer cards, which have an A100's instructions and less
# shared memory; which calls the tuner makes.
OLDEST_LAUNCH := -k 'not (test_every_mode_twice and (fp16 or tf32)) \
	and not (test_every_kernel_on_another_gpu and RTX) and not test_what_tune_runs_is_launched'
BUILD_LOG := build/oldest-build.log

.DEFAULT_GOAL := help
.PHONY: help demo test $(GROUPS:%=test-%) test-oldest python312 bench bench-report ext wheel lint \
	format clean

help: ## show this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18
	@echo "test-GROUP        run one group of tests: $(GROUPS)"

demo: $(INSTALLED) ## segment a street, time each precision, and a DeepLabv3 beside torchvision's
	$(VENV_PYTHON) -m deeplab_fast.demo

test: $(INSTALLED) ## run all tests and print one combined result
	@rm -rf $(RESULTS) && mkdir -p $(RESULTS)
	@status=0; \
	for group in $(GROUPS); do $(MAKE) --no-print-directory test-$$group || status=1; done; \
	$(VENV_PYTHON) -c "$$SUMMARY" $(RESULTS) || status=1; \
	exit $$status

# Exit status 5 is pytest's for "no test selected", which PYTEST_ARGS can cause in some groups.
$(GROUPS:%=test-%): test-%: $(INSTALLED)
	@folders="$(wildcard $(FOLDERS_$*))"; \
	if [ -z "$$folders" ] || [ -z "$$(find $$folders -name 'test_*.py')" ]; then \
		echo "== $*: no tests"; exit 0; \
	fi; \
	echo "== $*"; \
	mkdir -p $(RESULTS); touch $(RESULTS)/$*.started; \
	env -u TRITON_INTERPRET $(THREADS) $(ENV_$*) $(VENV_PYTHON) -m pytest $$folders \
		--junitxml=$(RESULTS)/$*.xml $(ARGS_$*) $(PYTEST_ARGS) || [ $$? -eq 5 ]

# A group without a result file crashed, and counts as one failure.
define SUMMARY
import pathlib, sys
from xml.etree import ElementTree
total = failed = skipped = 0
for started in pathlib.Path(sys.argv[1]).glob("*.started"):
    result = started.with_suffix(".xml")
    if not result.is_file():
        print(f"{started.stem}: crashed")
        total, failed = total + 1, failed + 1
        continue
    for suite in ElementTree.parse(result).iter("testsuite"):
        total += int(suite.get("tests"))
        failed += int(suite.get("failures")) + int(suite.get("errors"))
        skipped += int(suite.get("skipped"))
print(f"total: {total - failed - skipped} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0)
endef
export SUMMARY

test-oldest: $(OLDEST_INSTALLED) ## test beside the oldest PyTorch and Triton, with its CUDA extensions
	@! grep -E '[^ ] warning ?[:#]' $(BUILD_LOG) || \
		{ echo "test-oldest: the extensions compile with the warnings above"; exit 1; }
	$(OLDEST) -c 'from deeplab_fast import _ext; \
		missing = [e.reason for e in (_ext.CPU, _ext.CUDA, _ext.SM90) if not e.loaded]; \
		raise SystemExit("\n".join(missing) or 0)'
	@status=0; unset TRITON_INTERPRET; \
	$(OLDEST) -m pytest tests/gpu -q || status=1; \
	env $(THREADS) $(OLDEST) -m pytest tests/launch $(OLDEST_LAUNCH) $(ARGS_launch) $(PYTEST_ARGS) || status=1; \
	env $(THREADS) $(OLDEST) -m pytest $(OLDEST_UNIT) $(ARGS_unit) $(PYTEST_ARGS) || status=1; \
	exit $$status

python312: ## print the Python 3.12 that test-oldest takes
	@"$(PYTHON312)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && \
		echo "$(PYTHON312)" || \
		{ echo "there is no Python 3.12: install one, or name it, make PYTHON312=/path/to/python3.12"; \
		exit 1; }

# For instance make bench SUITE=cpu BENCH_ARGS="-k upsample".
SUITE ?= quick
BENCH_ARGS ?=

bench: $(INSTALLED) ## measure this machine against PyTorch: SUITE=quick, cpu or gpu
	$(VENV_PYTHON) -m bench.run --suite $(SUITE) --out build/bench $(BENCH_ARGS)

bench-report: $(INSTALLED) ## write the tables of README and DEPLOYMENT.md from bench/data
	$(VENV_PYTHON) -m bench.report --readme README.md
	$(VENV_PYTHON) -m bench.exports --table DEPLOYMENT.md

ext: $(DEPS) ## build the extensions again; ninja compiles what changed
	$(INSTALL)
	@touch $(INSTALLED)

wheel: $(DEPS) ## build a wheel and an sdist into dist/
	rm -rf build/lib* build/bdist*
	$(VENV_PYTHON) -m build --no-isolation --sdist --wheel

lint: $(LINT_DEPS) ## check format, style and types; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	@rm -rf $(TYPED) && mkdir -p $(TYPED)
	@ln -s $(CURDIR)/deeplab_fast/* $(CURDIR)/kernels $(TYPED)
	$(BIN)/mypy $(TYPED)
	for hook in no-block-pointers no-long-lines no-unanchored-todo; do \
		$(BIN)/pre-commit run --all-files $$hook || exit 1; \
	done

format: $(LINT_DEPS) ## format Python and C++ and apply safe fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

clean: ## remove everything built, but not .venv and .venv-oldest
	rm -rf build .gpu dist demo_output *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache
	rm -f deeplab_fast/*.so deeplab_fast/build.json $(INSTALLED) $(OLDEST_INSTALLED)
	find . -path './.venv*' -prune -o -name __pycache__ -exec rm -rf {} +

$(VENV_PYTHON):
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

$(DEPS): requirements/dev.txt requirements/no-deps.txt | $(VENV_PYTHON)
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/no-deps.txt
	@touch $@

$(OLDEST_DEPS): requirements/oldest.txt
	@$(MAKE) --no-print-directory python312
	test -x $(OLDEST) || "$(PYTHON312)" -m venv .venv-oldest
	$(OLDEST) -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements/oldest.txt
	@touch $@

$(OLDEST_INSTALLED): $(OLDEST_DEPS) $(SOURCES)
	@mkdir -p build
	DEEPLAB_FAST_BUILD_EXT=1 $(OLDEST) -m pip install --disable-pip-version-check --verbose \
		--no-build-isolation --no-deps -e . >$(BUILD_LOG) 2>&1 || { tail -n 60 $(BUILD_LOG); exit 1; }
	@touch $@

$(LINT_DEPS): requirements/lint.txt $(DEPS)
	$(PIP) -r requirements/lint.txt
	@touch $@

$(INSTALLED): $(DEPS) $(SOURCES)
	$(INSTALL)
	@touch $@
