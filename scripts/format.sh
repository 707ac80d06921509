#!/usr/bin/env bash
# Checks that every C++ and CUDA file is as clang-format 14 (Debian 12's) would write it.
#
#   scripts/format.sh          names the files that are not, and fails
#   scripts/format.sh --fix    rewrites them
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
  "") mode=(--dry-run --Werror) ;;
  --fix) mode=(-i) ;;
  *)
    echo "usage: scripts/format.sh [--fix]" >&2
    exit 2
    ;;
esac

# Another version breaks some lines elsewhere: what it says would be no verdict.
tool=
for candidate in clang-format-14 clang-format; do
  if command -v "$candidate" > /dev/null && [[ $("$candidate" --version) == *" version 14."* ]]; then
    tool=$candidate
    break
  fi
done
if [[ -z $tool ]]; then
  echo "format: clang-format 14 is not installed (scripts/setup.sh --tests brings it); nothing checked"
  exit 0
fi

mapfile -d '' files < <(find . -mindepth 1 \( -path './.*' -o -path ./build -o -path ./runs \) -prune \
  -o -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0)
if ! "$tool" "${mode[@]}" "${files[@]}"; then
  echo "format: files above are not as clang-format writes them; run scripts/format.sh --fix" >&2
  exit 1
fi
echo "format: ${#files[@]} files checked"
