#!/usr/bin/env bash
# ./run gpu test [--all] | bench ep|local | kills | growth | elastic | sanitize [arguments]: what needs CUDA GPUs.
#
# Builds what is missing. On a machine without the system packages of the build, NIXL_PREBUILT names a folder with
# libnixl.so.1, plugins/ and the native programs from elsewhere; then only the small Python modules are compiled.
# NIXL_GPU_PYTHON: an interpreter whose torch has CUDA (default python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[gpu] %s\n' "$*" >&2; }
die() { printf '[gpu] %s\n' "$*" >&2; exit 1; }

python=${NIXL_GPU_PYTHON:-python3}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
((gpus > 0)) || die "nvidia-smi lists no GPU on this machine; ./run test covers what runs without one"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  die "$python has no torch with CUDA; set NIXL_GPU_PYTHON to an interpreter that has"

prepare() {
  if [ -n "${NIXL_PREBUILT:-}" ]; then
    library=$(realpath "$NIXL_PREBUILT/libnixl.so.1") || die "NIXL_PREBUILT=$NIXL_PREBUILT holds no libnixl.so.1"
    say "compiling the Python modules against $library"
    cmake -S python -B build/gpu -G Ninja -DNIXL_LIBRARY="$library" -DPython_EXECUTABLE="$(command -v "$python")" >build-gpu.log 2>&1 &&
      cmake --build build/gpu >>build-gpu.log 2>&1 || { tail -n 40 build-gpu.log >&2; die "the Python modules do not build"; }
    rm -f build-gpu.log
    export PYTHONPATH=$PWD/build/gpu/python
  else
    ./run build dev || exit 1
    export PYTHONPATH=$PWD/build/dev/python
  fi
}

native() {  # the path of a native program, empty when it was not built
  if [ -n "${NIXL_PREBUILT:-}" ]; then
    [ -f "$NIXL_PREBUILT/$1" ] && chmod +x "$NIXL_PREBUILT/$1" && printf '%s' "$NIXL_PREBUILT/$1"
  else
    find build/dev -name "$1" -type f -perm -u+x | head -n 1
  fi
}

failed=()
step() {  # step LIMIT_S NAME command...
  local limit=$1 name=$2
  shift 2
  say "== $name"
  timeout -k 10 "$limit" "$@"
  local code=$?
  case $code in 0) ;; 77) say "skipped: $name" ;; *) failed+=("$name (exit $code)") ;; esac
}

# gpu test [--all] [arguments of pytest]; --all adds growth, 200 kills and the elastic plans.
gpu_test() {
  local program everything=0
  [ "${1:-}" = --all ] && { everything=1; shift; }
  program=$(native ep_cuda_test)
  if [ -n "$program" ]; then  # 1100 replays of 31 operations in each of three cases: 10^5
    step 300 "kernels, native" env EP_TEST_STRESS="${EP_TEST_STRESS:-1100}" "$program" "$gpus" "$gpus"
    ((gpus > 1)) && step 200 "kernels, lines of 16 bytes" env NIXL_EP_LINE_BYTES=16 "$program" "$gpus" "$gpus"
    ((gpus > 3)) && step 200 "kernels, 3 ranks" "$program" 3 "$gpus"
    ((gpus == 2 || gpus == 3)) && step 200 "kernels, 4 ranks that share GPUs" env EP_TEST_STRESS=1 "$program" 4 "$gpus"
    gpu_sanitize
  fi
  program=$(native ep_cuda_grid) && [ -n "$program" ] && ((gpus > 1)) && step 300 "grid of shapes" "$program" "$(power_of_two "$gpus")"
  program=$(native samehost_vram_test) && [ -n "$program" ] && step 200 "same-host transfers of GPU memory" "$program"
  step 100 "what cuFile answers here" "$python" tests/gpu/cufile_report.py
  step 200 "storage and GPU memory" "$python" -m pytest -q -rs -s --timeout 60 tests/gpu/test_gpu_storage.py
  step 400 "expert parallel through Python" env NIXL_EP_TEST_DEVICE=cuda "$python" -m pytest -q -rs --maxfail 4 --timeout 120 \
    tests/conformance/ep "$@"
  step 400 "faults" env NIXL_EP_TEST_DEVICE=cuda "$python" -m pytest -q -rs --timeout 200 tests/faults/ep "$@"
  # What needs four ranks, where some of them share a GPU (in turns, so without figures).
  ((gpus == 2 || gpus == 3)) && step 400 "expert parallel and faults, ranks that share GPUs" env NIXL_EP_TEST_DEVICE=cuda NIXL_EP_TEST_SHARE_GPU=1 \
    NIXL_EP_LINE_BYTES=16 "$python" -m pytest -q -rs --timeout 200 tests/conformance/ep tests/faults/ep "$@"
  ((everything)) || return 0
  gpu_growth
  gpu_kills
  gpu_elastic
}

power_of_two() { local n=1; while ((2 * n <= $1)); do ((n *= 2)); done; echo "$n"; }

# The profiler's library, which comes with torch where the toolkit has none.
find_cupti() {
  "$python" -c 'import glob, sysconfig
found = glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib/libcupti.so.13")
print(found[0] if found else "")'
}

# gpu bench ep [name part]: table, JSON lines and plot in build/gpu_ep (NIXL_GPU_REPORT names another folder).
bench_ep() {
  local program ranks out=${NIXL_GPU_REPORT:-build/gpu_ep}
  program=$(native ep_cuda_bench) && [ -n "$program" ] || die "ep_cuda_bench was not built (no nvcc?)"
  mkdir -p "$out" && rm -f "$out"/*
  NIXL_CUPTI=${NIXL_CUPTI:-$(find_cupti)}
  [ -n "$NIXL_CUPTI" ] && export NIXL_CUPTI || unset NIXL_CUPTI
  step 300 "ours" "$program" "$gpus" "$@" >"$out/ours_$gpus"
  for ranks in 2 3; do
    ((ranks < gpus)) && step 200 "ours, $ranks ranks" "$program" "$ranks" "${1:-token}" >"$out/ours_$ranks"
  done
  program=$(native ep_floor) && [ -n "$program" ] && step 100 "the probe, in the same call" "$program" "$gpus" >"$out/probe"
  program=$(native link_floor) && [ -n "$program" ] && step 60 "the link" "$program" "$gpus" >"$out/link"
  step 60 "report" "$python" tests/gpu/ep_report.py "$out"/* --json "$out/ep.jsonl" --plot "$out/ep.png"
}

gpu_bench() {
  local name=${1:-} program
  shift
  case $name in
    ep) bench_ep "$@" ;;
    local)
      prepare
      step 300 "through agents, musts beside floors of the same call" "$python" benchmarks/bench_local.py --memory vram "$@"
      program=$(native samehost_vram_bench) && [ -n "$program" ] && step 100 "the backend alone" "$program"
      ;;
    *) die "gpu bench: '$name' is unknown; known: ep local" ;;
  esac
}

# 200 kills at random points; further calls go on counting (--seconds, --kills and others: tests/faults/ep/kill_loop.py).
gpu_kills() {
  mkdir -p build
  step 900 "kills" "$python" tests/faults/ep/kill_loop.py --device cuda --state build/kills.json "$@"
}

gpu_growth() { step 200 "operations while ranks connect" "$python" tests/gpu/ep_growth.py --device cuda "$@"; }

# gpu elastic [TIMES]: acceptance of the elastic suite; the plan with a fault runs TIMES times (default 1).
gpu_elastic() {
  local times=${1:-1} turn
  local run=("$python" tests/elastic/elastic.py --device cuda --num-processes 4 --num-experts-per-rank 32 --num-topk 8 --num-tokens 256
    --timeout-ms 10000 --validate-phase-failures --store-port 0 --rank-server-port 0 --limit-seconds 290 --plan)
  step 300 "elastic: no expansion" "${run[@]}" tests/elastic/no_expansion.json
  for ((turn = 1; turn <= times; turn++)); do
    step 300 "elastic: expansion, fault, contraction ($turn of $times)" "${run[@]}" tests/elastic/expansion_fault_contraction.json
  done
}

# Kernels of two ranks under the memory checker, a small case: polling is slow there.
gpu_sanitize() {
  local program checker
  checker=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
    { say "skipped: sanitize (there is no compute-sanitizer on this machine)"; return; }
  program=$(native ep_cuda_test) && [ -n "$program" ] || die "ep_cuda_test was not built (no nvcc?)"
  step 300 "memory checker" env EP_TEST_BLOCKS=8 "$checker" --tool memcheck --target-processes all --error-exitcode 9 "$program" 2 "$gpus" "${1:-one token}"
}

command=${1:-}
shift || true
case $command in
  test) prepare; gpu_test "$@" ;;
  bench) [ -n "${NIXL_PREBUILT:-}" ] || ./run build dev || exit 1; gpu_bench "$@" ;;
  kills | growth | elastic) prepare; "gpu_$command" "$@" ;;
  sanitize) [ -n "${NIXL_PREBUILT:-}" ] || ./run build dev || exit 1; gpu_sanitize "$@" ;;
  *) die "usage: ./run gpu test [--all] | bench ep|local | kills | growth | elastic | sanitize" ;;
esac
for name in "${failed[@]}"; do say "FAILED $name"; done
((${#failed[@]} == 0))
