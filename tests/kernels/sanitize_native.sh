#!/usr/bin/env bash
# Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder, and runs its tests
# with that build. The first finding ends the run with a report. Linux; needs cmake and a GCC with its sanitizers.
#
#   bash tests/kernels/sanitize_native.sh [pytest's arguments; without any: all tests of the native library]
#
# PYTHON names another interpreter, CXX another compiler.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}
compiler=${CXX:-c++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

if ! { cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER="$compiler" \
  -DSPOT_SANITIZE=address,undefined && cmake --build "$build" --parallel 2; } >"$build/log" 2>&1; then
  echo "error: no build with sanitizers: $(grep -m1 -i error "$build/log" || tail -n1 "$build/log")" >&2
  exit 3
fi

if [ $# = 0 ]; then
  set -- "$root"/tests/kernels/test_{native,mask_labels,linear_assignment,mask_matching,default_dtype}.py -k "not triton and not sanitizer"
fi
echo "with address and undefined-behaviour sanitizers: pytest $*"
# Python itself is not built with them: their run-time library has to be loaded first, with the C++ library whose exceptions
# they intercept. Leak detection would report memory that Python keeps.
cd "$root"
PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" SPOT_KERNELS_LIBRARY="$build/kernels/libspot_native.so" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)" \
  "$python" -m pytest -q --capture=no -p no:cacheprovider "$@"
