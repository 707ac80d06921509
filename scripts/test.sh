#!/usr/bin/env bash
# Sets the machine up, builds everything and runs every test: what CI does, from a bare Debian 12.
#
#   scripts/test.sh [PRESET]    a preset of CMakePresets.json that builds tests; default ci
set -euo pipefail
cd "$(dirname "$0")/.."

preset=${1-ci}
current="nothing yet"
trap 'status=$?; ((status == 0)) || echo "test: failed in: $current" >&2' EXIT

# Runs a command under its name, and says how long it took.
stage() {
  current=$1
  shift
  echo "test: $current"
  local start=$SECONDS
  "$@"
  echo "test: $current: $((SECONDS - start)) s"
}

stage "set-up" scripts/setup.sh --tests
stage "format" scripts/format.sh
stage "configure" cmake --preset "$preset"
stage "build" cmake --build --preset "$preset"
stage "tests" ctest --preset "$preset"
echo "test: all passed (${SECONDS} s)"
