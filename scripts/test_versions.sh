#!/usr/bin/env bash
# Run the tests on the oldest and the newest transformers that pyproject.toml allows.
#
#     bash scripts/test_versions.sh                    both
#     bash scripts/test_versions.sh 5.4.0              these versions instead
#
# Environments are kept in VENVS (default: build/versions) and used again. TORCH is the version of torch (a range would let pip
# take a build with CUDA's gigabytes); PYTEST is what pytest is told.
set -euo pipefail
cd "$(dirname "$0")/.."

OLDEST=$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
BELOW=$(sed -n 's/.*"transformers>=[0-9.]*,<\([0-9.]*\)".*/\1/p' pyproject.toml)
VENVS=${VENVS:-build/versions}
TORCH=${TORCH:-2.13.0}
PYTHON=${PYTHON:-python3}
PYTEST=${PYTEST:-tests}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[ $# -gt 0 ] || set -- "==$OLDEST" "<$BELOW"
failed=()
for version in "$@"; do
  case $version in [0-9]*) version="==$version" ;; esac
  place="$VENVS/transformers${version//[^0-9.]/_}"
  test -x "$place/bin/python" || "$PYTHON" -m venv "$place"
  "$place/bin/python" -m pip install --quiet "torch==$TORCH"
  "$place/bin/python" -m pip install --quiet --upgrade "torch==$TORCH" "transformers$version" --editable '.[dev]'
  "$place/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
  # shellcheck disable=SC2086  # several words are meant
  "$place/bin/python" -m pytest $PYTEST || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed on transformers ${failed[*]}" >&2
  exit 1
fi
