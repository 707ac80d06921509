#!/usr/bin/env bash
# Proves and times a build on a machine with a GPU: see scripts/gpu_check.py, which takes the
# options. Needs Python 3 with the torch package alone; scripts/package_gpu.sh gathers the rest.
#
#   scripts/gpu_check.sh --out FOLDER [OPTION...]
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 scripts/gpu_check.py "$@"
