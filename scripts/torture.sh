#!/usr/bin/env bash
# Kills training runs with SIGKILL at random instants, also in the middle of saves and renames: a rank,
# the launcher, or all, over 1, 2 and 4 processes and the stages of ZeRO, with changes of both in between.
# After each kill: no checkpoint that was saved is lost, no process lives on and no port stays open.
# Every run ends with the losses of one that nobody disturbed: bit for bit, with the last checkpoint's
# files, if number and stage stayed the same, to 1e-5 if one changed. Then one launcher restarts its rank
# 100 times.
#
#   scripts/torture.sh             200 kills and 100 restarts; prints a summary line
#   scripts/torture.sh --short     9 kills and 3 restarts, under a minute: what CI runs
#   ... --kills N --restarts N     as many
#   ... --seed S                   begins as the run that printed this seed
#   ... --program FILE             of this program; default: the preset `release` is built
set -euo pipefail

options=()
program=
while (($# > 0)); do
  case $1 in
    --program)
      program=$(realpath "${2?torture: --program: expected a path}")
      shift 2
      ;;
    *)
      options+=("$1")
      shift
      ;;
  esac
done
cd "$(dirname "$0")/.."
if [[ -z $program ]]; then
  cmake --preset release > /dev/null
  cmake --build --preset release --target rookery rookery_torch
  program=build/release/bin/rookery
fi
exec python3 tests/python/torture.py "$program" "${options[@]}"
