#!/usr/bin/env bash
# The tests of the GPU kernels without a GPU: ttsem runs on a CPU what Triton 3.8.0 compiles, bf16 included. A test fails at the
# kernel's line where programs race, an access leaves its tensor or a result is undefined.
#
#   tools/ttsem.sh                                   all of tests/kernels/test_gpu_*.py, a process per file
#   tools/ttsem.sh FILE ... [-- ARGUMENTS OF PYTEST]
#
# Its environment lies in build/ttsem and is made by the first call. torch has to be a build for CPUs; where the package index
# has none: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/build/ttsem
if [ ! -e "$folder/complete" ]; then
    python3 -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet torch triton==3.8.0 numpy safetensors pytest pytest-xdist -c constraints.txt
    # its metadata asks for Python 3.12 and torch 2.14.0, and it runs on Python 3.11 with the torch of constraints.txt too
    "$folder/bin/pip" install --quiet --no-deps --ignore-requires-python ttsem==0.1.0
    touch "$folder/complete"
fi

files=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    files+=("$1")
    shift
done
[ $# -eq 0 ] || shift
# the largest first, so that the processes end together; workers of pytest-xdist would run without ttsem
[ ${#files[@]} -gt 0 ] || mapfile -t files < <(ls -S tests/kernels/test_gpu_*.py)

export OMP_NUM_THREADS=1 TRITON_INTERPRET=0 TRITON_CACHE_DIR=$folder/cache
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" bash -c '
    python=$1 file=${!#}
    SECONDS=0 status=0
    output=$("$python" -m ttsem.sanitize pytest -q -n 0 "${@:2}" 2>&1) || status=$?
    printf "%s\n%s: %s s\n" "$output" "$file" "$SECONDS"
    exit $((status > 0))
' ttsem "$folder/bin/python" "$@"
