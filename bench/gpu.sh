#!/usr/bin/env bash
# On a machine with a CUDA GPU and a torch with CUDA, without network: does it compute the right thing, and how fast?
#
#     bench/gpu.sh DIR [--part 1|2] [--only NAME,...] [--budget SECONDS] [--device cuda|cpu]
#
# Part 1, under 8 minutes: build, smoke, own (our figures), tiles. Part 2, under 10: tests, rivals, memcheck, racecheck.
# Without --part both. --only runs these steps alone; --budget starts no step when so many seconds have gone. An extension
# from `make wheel-for`, put into fastmargin/, is used instead of building one.
#
# DIR/parts.tsv has each step's exit status and time, DIR/gpu.log what they printed, DIR/*.json their figures, written as
# they are found: a step that fails, exceeds its time or is killed leaves what it measured and does not stop the next.
# Exit status 1: a step failed. --device cpu tries the script out where there is no GPU, on tiny shapes.
set -uo pipefail
usage="usage: bench/gpu.sh DIR [--part 1|2] [--only NAME,...] [--budget SECONDS] [--device cuda|cpu]"
out=$(realpath -m "${1:?$usage}")
shift
parts=12 only="" budget=100000 device=cuda failed=0
while (($#)); do
  case $1 in
    --part) parts=${2-} ;;
    --only) only=${2-} ;;
    --budget) budget=${2-} ;;
    --device) device=${2-} ;;
    *) set -- "$1" ;;
  esac
  if (($# < 2)) || [[ ! $parts =~ ^(1|2|12)$ || ! $budget =~ ^[0-9]+$ || ! $device =~ ^(cuda|cpu)$ ]]; then
    echo "$usage; given $*" >&2
    exit 2
  fi
  shift 2
done
mkdir -p "$out"
cd "$(dirname "$0")/.."
# The interpreter itself: steps run it with another PATH.
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || exit 2
export python device PYTHONPATH=$PWD:$PWD/tests/support:$PWD/bench PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

note() { # name, status, seconds
  printf '%s\t%s\t%s s\n' "$@" | tee -a "$out/parts.tsv"
}

step() { # part, name, time limit in seconds, command
  local part=$1 name=$2 limit=$3 start=$SECONDS status=0
  shift 3
  [[ $parts == *$part* && (-z $only || ,$only, == *,$name,*) ]] || return 0
  if ((SECONDS >= budget)); then
    note "$name" "no time" 0
    return 0
  fi
  echo "== $name" >>"$out/gpu.log"
  timeout -s INT -k 10 "$limit" "$@" >>"$out/gpu.log" 2>&1 || status=$?
  ((status == 3)) && status=refused
  [[ $status == 0 || $status == refused ]] || failed=1
  note "$name" "$status" $((SECONDS - start))
  tail -n 3 "$out/gpu.log"
}

# Without a compiler in sight setup.py builds nothing, so that a binary that is here stays. `fastmargin info` would need
# the driver's packages.
build() {
  local info='from fastmargin.ops.backends import describe; print(describe())'
  if [[ $device == cpu ]]; then
    "$python" -c "$info"
    return
  fi
  nvidia-smi
  local install=("$python" -m pip install --no-index --no-deps --no-build-isolation --editable .)
  local has_cuda='from fastmargin.ops.backends import NATIVE_DEVICES as found; raise SystemExit("cuda" not in found)'
  if "$python" -c "$has_cuda"; then
    env -u CXX PATH=/nowhere "${install[@]}"
  else
    FASTMARGIN_CUDA=1 "${install[@]}"
  fi && "$python" -c "$info" && "$python" -c "$has_cuda"
}

tests() {
  local spread=()
  "$python" -c 'import xdist' && spread=(-n 8)
  "$python" -m pytest tests -m gpu -q -rs -p no:cacheprovider "${spread[@]}"
}

# Without torch's caching allocator every tensor is an allocation of its own, whose bounds the sanitizer knows. Only our
# kernels are checked, not those of libraries. Some virtual machines refuse a device to it, which a small program shows.
sanitize() {
  local first_call='import ctypes; cuda = ctypes.CDLL("libcuda.so.1"); cuda.cuInit(0)
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)'
  if timeout 10 compute-sanitizer --tool "$1" "$python" -c "$first_call" 2>&1 | grep "not supported"; then
    return 3
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=fastmargin --error-exitcode 9 \
    "$python" bench/gpu_case.py
}
export -f build tests sanitize

million=1024x512x1000000 pairs=4096x2048x512
own=("$million" 4096x512x10000000) rivals=()
tiles=(--shapes "$million" 64x512x500000 128x512x500000) interpret=0
if [[ $device == cpu ]]; then
  export CUDA_VISIBLE_DEVICES=""
  million=6x16x300 pairs=6x7x8 own=(6x16x300) rivals=(--only InsightFace cdist)
  tiles=(--shapes 3x16x150 --only "float32, Tile(rows=64") interpret=1
fi
step 1 build 150 bash -c build
step 1 smoke 90 "$python" bench/gpu_smoke.py "$out" --device "$device"
step 1 own 160 "$python" bench/gpu.py "$out" --ours --shapes "${own[@]}" --pairs "$pairs" --device "$device"
step 1 tiles 80 env TRITON_INTERPRET="$interpret" "$python" bench/gpu.py "$out" --tiles "${tiles[@]}" --device "$device"
step 2 tests 240 bash -c tests
step 2 rivals 120 "$python" bench/gpu.py "$out" --rivals --shapes "$million" --pairs "$pairs" --device "$device" \
  "${rivals[@]}"
if [[ $device == cuda ]]; then
  step 2 memcheck 90 bash -c "sanitize memcheck"
  step 2 racecheck 90 bash -c "sanitize racecheck"
fi
exit "$failed"
