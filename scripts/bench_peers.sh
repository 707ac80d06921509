#!/usr/bin/env bash
# Times rookery beside the programs that do the same, in one run on this machine: see
# scripts/bench_peers.py, which takes the options.
#
#   scripts/bench_peers.sh [OPTION...]     installs what it needs into .deps/venv_bench first
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.deps/venv_bench
readonly list=scripts/requirements-bench.txt

scripts/setup.sh --tests
if [[ ! -x $venv/bin/python ]]; then
  /usr/bin/python3 -m venv "$venv"
fi
# Behind the packages of its own it sees those of the tests: torch alone is 3 GB.
for packages in "$venv"/lib/python3*/site-packages; do
  readlink -f .deps/venv/lib/python3*/site-packages > "$packages/tests.pth"
done
if ! cmp -s "$list" "$venv/installed"; then
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$list"
  cp "$list" "$venv/installed"
fi
exec "$venv/bin/python" scripts/bench_peers.py "$@"
