# make train   set up, then train on glyphs and leave a report
# make test    set up, then run the tests
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
CPP := $(NATIVE) $(wildcard tests/cuda_on_cpu/* bench/contestants/*.cpp)

.PHONY: setup train test bench lint format clean

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
