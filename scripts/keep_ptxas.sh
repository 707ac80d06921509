#!/usr/bin/env bash
# Runs a compiler of CUDA sources and keeps what it says beside the object that it makes, as
# OBJECT.ptxas: registers and spills of each kernel (scripts/kernel_table.py reads it).
#
#   scripts/keep_ptxas.sh COMPILER ARGUMENT... -o OBJECT ...
set -uo pipefail

object=
arguments=("$@")
for ((i = 0; i + 1 < ${#arguments[@]}; ++i)); do
  if [[ ${arguments[i]} == -o ]]; then
    object=${arguments[i + 1]}
  fi
done
if [[ $object != *.o ]]; then
  exec "$@"
fi
"$@" 2> "$object.ptxas"
status=$?
if ((status != 0)); then
  cat "$object.ptxas" >&2
fi
exit "$status"
