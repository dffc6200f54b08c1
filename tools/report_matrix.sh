#!/usr/bin/env bash
# The kernel report under each version of Triton that the kernels are to be clean on; exit status 1 where one is not.
#
#   tools/report_matrix.sh [VERSION ...] [-- ARGUMENTS OF THE REPORT]
#
# A version that is not installed lies in build/triton, where the first call puts it; ahead of all else on the path it is the
# one that is imported.
set -euo pipefail
cd "$(dirname "$0")/.."
versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    versions+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ ${#versions[@]} -gt 0 ] || versions=(3.6.0 3.8.0 3.9.0)
[ $# -gt 0 ] || set -- --arch 80 90 100

status=0
for version in "${versions[@]}"; do
    folder=$PWD/build/triton/$version
    if [ ! -d "$folder" ]; then
        rm -rf "$folder.part"
        python -m pip install --quiet --no-deps --target "$folder.part" "triton==$version"
        mv "$folder.part" "$folder"
    fi
    SECONDS=0
    echo "Triton $version:"
    PYTHONPATH=$folder:$PWD python -m tools.kernel_report "$@" || status=1
    echo "Triton $version: $SECONDS s"
done
exit $status
