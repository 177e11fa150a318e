#!/usr/bin/env bash
# Builds the native module with AddressSanitizer and UndefinedBehaviorSanitizer in a scratch folder and runs the exact,
# stride and hostile-input tests of every operation on it. About 10 minutes on 2 cores.
#
#   tests/sanitize.sh [PYTEST_ARGUMENT...]      needs GCC, cmake, pybind11 and the test requirements in python's reach
#
# Left out: tests that die on purpose or measure the resident set (the sanitizer has its own handler and shadow), and
# child processes of theirs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}

sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
cmake -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER="$cxx" \
  -DCMAKE_CXX_FLAGS="-O1 $sanitize" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(python -c 'import sys; print(sys.executable)')" >"$work/configure.log" || {
  cat "$work/configure.log"
  exit 1
}
cmake --build "$work/build" --target _C --parallel 2 >"$work/build.log" || {
  tail -50 "$work/build.log"
  exit 1
}

mkdir "$work/site"
cp -r "$root/python/fastdl" "$work/site/"
rm -f "$work"/site/fastdl/_C.*.so
cp "$work"/build/_C.*.so "$work/site/fastdl/"

export PYTHONPATH=$work/site FASTDL_BUILD_DIR=$work/build
# libstdc++ too: the sanitizer must find the real __cxa_throw when it starts.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$work/report
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$work/report
cd "$root"
# Captured by pytest in Python alone: the last words of a process that ends in the middle of a test are seen.
run() { python -m pytest -q -p no:cacheprovider --capture=sys "$@" || { cat "$work"/report.* 2>/dev/null; exit 1; }; }
# built_unit: no weak symbol escapes an instruction-set unit of this build either.
run tests/test_layering.py tests/test_gemm_exact.py tests/test_gemm_strides.py tests/test_gemm_hostile.py \
  tests/test_errors_native.py -k "not guard_pages and not peak_memory" "$@"
# Tails, layouts, masks, packed sequences, sizes of zero, what is no number, wrong arguments: about a minute each.
run tests/test_attention_native.py -k "every_tail or head_dimension or every_layout or grouped or sequences or nothing \
  or without_a_visible or nan or masked_keys or errors" "$@"
run tests/test_attention_backward.py -k "every_tail or layouts or broadcast_mask or sequences or see_nothing or nan \
  or zero or refusals" "$@"
run tests/test_rnn_native.py -k "tails or packed or projections or special or nothing or strides or missing or bad \
  or apart or checks" "$@"
run tests/test_conv_native.py tests/test_conv_wgrad.py tests/test_conv_direct.py \
  -k "not guard_pages and not nothing_outside" "$@"
