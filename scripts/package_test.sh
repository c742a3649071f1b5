#!/usr/bin/env bash
# Builds wheel and sdist from what is committed, checks them, installs each into an environment that holds nothing else, and runs the
# demo from a folder outside of the repository. Needs a package index. About five minutes; the last lines are what it found.
set -euo pipefail

repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/sparc3-package.XXXXXX")
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
found=()

mkdir "$work/source" "$work/elsewhere"
git -C "$repo" archive HEAD | tar -x -C "$work/source"
"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --disable-pip-version-check build twine
"$work/tools/bin/python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
"$work/tools/bin/twine" check --strict "$work"/dist/*
wheel=$(ls "$work"/dist/*.whl) sdist=$(ls "$work"/dist/*.tar.gz)

inside=$("$python" -m zipfile -l "$wheel")
for part in LICENSE recipe/bundled/demo.yaml demo/sparc3-demo/model.safetensors demo/sparc3-demo/tokenizer.json report/page.html report/page.css py.typed; do
    grep -q "$part" <<<"$inside" || { echo "the wheel lacks $part"; exit 1; }
done
archived=$(tar -tzf "$sdist")
for part in LICENSE pyproject.toml src/sparc3/recipe/bundled/demo.yaml src/sparc3/demo/sparc3-demo/model.safetensors; do
    grep -q "$part" <<<"$archived" || { echo "the sdist lacks $part"; exit 1; }
done
found+=("wheel $(stat -c %s "$wheel") bytes, sdist $(stat -c %s "$sdist") bytes, LICENSE in both, twine check passed")

"$python" -m venv "$work/empty"
pip=("$work/empty/bin/pip" --disable-pip-version-check --quiet)
# torch first and by its exact version: a range would let pip take a newer one, with CUDA's gigabytes where an index offers both.
"${pip[@]}" install --constraint "$repo/constraints.txt" torch==2.13.0
cd "$work/elsewhere"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
unset PYTHONPATH

"${pip[@]}" install --constraint "$repo/constraints.txt" "$wheel"
"${pip[@]}" check
"$work/empty/bin/python" -c "import sparc3, sys; assert sparc3.__file__.startswith('$work/empty'), sparc3.__file__"
"$work/empty/bin/sparc3" demo --out demo-run | tee "$work/demo.log"
test -s demo-run/report.html && test -s demo-run/results.json
found+=("installed from the wheel: pip check clean, sparc3 demo ran: $(grep '^toxicity.mean' "$work/demo.log" | tr -s ' ')")

"${pip[@]}" uninstall --yes sparc3
"${pip[@]}" install --constraint "$repo/constraints.txt" "$sdist"
"${pip[@]}" check
"$work/empty/bin/sparc3" run demo --out sdist-run --set references.general.count=16 --set references.undesired.count=16 --set selection.count=20 \
    --set evaluation.toxicity.count=16 --set evaluation.perplexity.count=16 --set evaluation.ioi.count=16 --set compare.counts='[10]' >"$work/sdist.log"
test -s sdist-run/report.html && test -s sdist-run/results.json
found+=("installed from the sdist: pip check clean, a small run of the demo recipe ran")

printf '%s\n' "${found[@]}"
