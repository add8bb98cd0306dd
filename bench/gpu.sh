#!/usr/bin/env bash
# On a machine with a CUDA GPU and a torch with CUDA, without network: builds, tests, measures, looks for bad memory
# accesses and races.
#
#     bench/gpu.sh DIR
#
# The output of each part goes to a log in DIR as it is printed; DIR/parts.tsv has each part's exit status and time. A
# part that fails or exceeds its time limit does not stop the next. All take less than ten minutes.
set -uo pipefail
out=$(realpath -m "${1:?want a folder for the results}")
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/tests/support:$PWD/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 FASTMARGIN_CUDA=1
: >"$out/parts.tsv"

part() { # name, time limit in seconds, command
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout -s INT -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '%s\t%s\t%s s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$out/parts.tsv"
  tail -n 5 "$out/$name.log"
}

build() {
  nvidia-smi
  python3 -m pip install --no-index --no-deps --no-build-isolation --editable . && python3 -m fastmargin info
}

# Without torch's caching allocator every tensor is an allocation of its own, whose bounds the sanitizer knows. Only our
# kernels are checked, not those of libraries.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=fastmargin --error-exitcode 9 \
    python3 bench/gpu_case.py
}
export -f build sanitize

part build 150 bash -c build
part tests 200 python3 -m pytest tests -m gpu -q -rs
part bench 130 python3 bench/gpu.py "$out"
part tiles 50 python3 bench/gpu.py "$out" --tiles --shapes 64x512x500000 128x512x500000 1024x512x1000000
part memcheck 45 bash -c "sanitize memcheck"
part racecheck 45 bash -c "sanitize racecheck"
