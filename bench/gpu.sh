#!/usr/bin/env bash
# On a machine with a CUDA GPU, torch with CUDA and no network: builds, tests, looks for bad accesses and races, measures.
#
#     bench/gpu.sh DIR
#
# Everything it prints goes to DIR as it goes, a log per part, and DIR/parts.tsv says how each part ended and how long
# it took. A part that fails or runs past its limit does not stop the next. About ten minutes.
set -uo pipefail
out=$(realpath -m "${1:?want a folder for the results}")
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD/tests:$PWD/bench PYTHONDONTWRITEBYTECODE=1 FASTMARGIN_CUDA=1
: >"$out/parts.tsv"

part() { # name, seconds at most, command
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  printf '%s\t%s\t%s s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$out/parts.tsv"
  tail -n 5 "$out/$name.log"
}

part machine 20 nvidia-smi
part build 180 python3 -m pip install --no-index --no-deps --no-build-isolation --editable .
part info 60 python3 -m fastmargin info
part tests 200 python3 -m pytest tests -m gpu -q -rs
part memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 python3 bench/gpu_case.py
part racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 python3 bench/gpu_case.py
part bench 200 python3 bench/gpu.py "$out"
