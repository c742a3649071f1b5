#!/usr/bin/env bash
# Makes an environment for each peer of benchmarks/attribution.py, with the versions it needs:  benchmarks/peers.sh FOLDER
set -euo pipefail
folder="${1:?a folder for the environments}"
python="${PYTHON:-python3}"

environment() {
    "$python" -m venv "$folder/$1"
    # torch first and by its exact version: a range would let pip take a newer one, with CUDA's gigabytes where an index offers both.
    "$folder/$1/bin/pip" install --quiet torch==2.13.0
}

environment lxt
# lxt 2.1 fails to import on later transformers. zennit, which it imports, would bring torchvision with CUDA's gigabytes; peers.py does without.
"$folder/lxt/bin/pip" install --quiet transformers==4.52.4 accelerate tabulate matplotlib
"$folder/lxt/bin/pip" install --quiet --no-deps zennit lxt==2.1
environment wanda
"$folder/wanda/bin/pip" install --quiet llmcompressor
