# make train   set up, then train on glyphs and leave a report
# make test    set up, then run the tests
# By hand, beside this build, with a torch for CUDA of several GB (CUDA_VENV=DIR names an environment that has it):
# make check-gpu                        build the CUDA kernels, then run all tests that need no device
# make wheel-for PY=3.12 TORCH=2.11.0   build the extension for that Python, to be carried to a machine with a GPU
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
CPP := $(NATIVE) $(wildcard tests/cuda_on_cpu/* bench/contestants/*.cpp)

PY ?= 3.12
TORCH ?= 2.11.0
CHECK := build/check-gpu
WHEEL := build/wheel-for/python$(PY)-torch$(TORCH)

.PHONY: setup train test bench lint format clean check-gpu wheel-for

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch numpy setuptools wheel pybind11 cmake ninja
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[train,export,tb,test,lint,triton]'
	touch $@

train: setup
	$(BIN)/fastmargin train $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

bench: setup
	$(PIP) install --quiet --constraint constraints.txt pytorch-metric-learning cut-cross-entropy
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench -s --benchmark-enable --benchmark-json .benchmarks/latest.json $(ARGS)

# Sets up $(1), a Python, in $(2), an environment. The torch decides which triton and setuptools go with it.
define setup_cuda
	mkdir -p $(2)
	(grep -vE '^(torch|triton|setuptools)==' constraints.txt; echo 'torch==$(TORCH)') > $(2)/constraints.txt
	test -x $(2)/bin/python || $(1) -m venv $(2)
	$(call cuda_pip,$(2)) torch numpy 'setuptools>=77' wheel pybind11 cmake ninja
endef
cuda_pip = $(abspath $(1))/bin/python -m pip --disable-pip-version-check install --quiet \
	--constraint $(abspath $(1))/constraints.txt

# The tracked files are copied, so that neither build nor tests touch this folder's; kept objects make rebuilds quick.
check-gpu: ENV := $(or $(CUDA_VENV),$(CHECK)/.venv)
check-gpu:
	$(call setup_cuda,$(PYTHON),$(ENV))
	mkdir -p $(CHECK)/tree
	find $(CHECK)/tree -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z | tar -c --null -T - | tar -x -C $(CHECK)/tree
	cd $(CHECK)/tree && FASTMARGIN_CUDA=1 $(call cuda_pip,$(ENV)) --no-build-isolation --editable '.[train,export,tb,test,lint,triton]'
	cd $(CHECK)/tree && $(abspath $(ENV))/bin/python -m fastmargin info | tee info.txt && grep -q '^CUDA  *built' info.txt
	cd $(CHECK)/tree && $(abspath $(ENV))/bin/python -m pytest -q -m 'not gpu' $(ARGS)

# The binary is for fastmargin/ of a copy of this tree; 60 MiB is what is still handy to send along.
wheel-for: ENV := $(or $(CUDA_VENV),$(WHEEL)/.venv)
wheel-for:
	@python$(PY) -c '' 2>/dev/null || { echo 'wheel-for: no python$(PY) here: install it, with its headers, or name another: PY=3.x'; exit 1; }
	$(call setup_cuda,python$(PY),$(ENV))
	FASTMARGIN_CUDA=1 $(ENV)/bin/python setup.py -q build_ext --build-lib $(WHEEL) --build-temp $(WHEEL)/temp
	@du -m $(WHEEL)/fastmargin/_C*.so | sed 's/\t/ MiB, /'
	@test -z "$$(find $(WHEEL)/fastmargin -size +60M)" || { echo 'wheel-for: over 60 MiB'; exit 1; }

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .benchmarks *.egg-info fastmargin/_C*.so
