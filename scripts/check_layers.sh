#!/usr/bin/env bash
# Checks which folder includes which, from the #include lines.
#
#   scripts/check_layers.sh [ROOT]        checks the tree at ROOT (default: the repository)
#   scripts/check_layers.sh --self-test   shows on trees of its own that each rule can fail
#
#   data   -> itself
#   model  -> itself; model/formats also data
#   train  -> itself, model, data
#   cuda   -> itself, model/ops
#   tests  -> everything; nothing else includes cuda
# An include of ours is in quotes and starts at the root of the repository. LibTorch stays out of
# data, model/formats, model/model_config, model/recompute_mode, model/version_shapes and
# model/ops/head_chunks, which build without it; spdlog out of data and model, which do not log;
# toml++, slow to compile, in train/config_file.cpp.
# Ends with 0 if all is well, 1 with a line for every include that breaks a rule.
set -euo pipefail

check_tree() {
  cd "$1"
  local folders=()
  local folder
  for folder in data model train cuda tests; do
    if [[ -d $folder ]]; then
      folders+=("$folder")
    fi
  done
  if [[ ${#folders[@]} -eq 0 ]]; then
    echo "$1: none of data, model, train, cuda and tests is here; give the root of the repository"
    return 1
  fi
  find "${folders[@]}" -type f \
    \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) -print0 |
    sort -z |
    xargs -0 --no-run-if-empty awk '
      function starts_with(text, prefix) { return index(text, prefix) == 1 }
      function complain(what) {
        printf "%s:%d: includes %s: %s\n", FILENAME, FNR, included, what
        failed = 1
      }
      # Whether a file may include `path`, one of ours.
      function allowed(file, path) {
        if (starts_with(file, "tests/")) return 1
        if (starts_with(file, "data/")) return starts_with(path, "data/")
        if (starts_with(file, "model/formats/"))
          return starts_with(path, "model/") || starts_with(path, "data/")
        if (starts_with(file, "model/")) return starts_with(path, "model/")
        if (starts_with(file, "train/"))
          return starts_with(path, "train/") || starts_with(path, "model/") ||
                 starts_with(path, "data/")
        if (starts_with(file, "cuda/"))
          return starts_with(path, "cuda/") || starts_with(path, "model/ops/")
        return 0
      }
      BEGIN { ours = "^(data|model|train|cuda|tests)/" }
      /^[ \t]*#[ \t]*include[ \t]*["<]/ {
        quoted = $0 ~ /include[ \t]*"/
        included = $0
        sub(/^[^"<]*["<]/, "", included)
        sub(/[">].*$/, "", included)

        if (included ~ ours) {
          if (!quoted) complain("ours go in quotes")
          if (!allowed(FILENAME, included)) {
            folder = FILENAME
            sub(/\/[^\/]*$/, "", folder)
            complain(folder " may not")
          }
        } else if (quoted) {
          complain("in quotes, it must start at the root of the repository, as in \"data/binidx.h\"")
        }
        if (included ~ /^(torch|ATen|c10|caffe2)\// &&
            FILENAME ~ /^(data\/|model\/formats\/|model\/(model_config|recompute_mode|version_shapes|ops\/head_chunks)\.)/)
          complain("this part builds without LibTorch")
        if (starts_with(included, "spdlog/") && FILENAME ~ /^(data|model)\//)
          complain("only train logs")
        if (starts_with(included, "toml++/") && FILENAME != "train/config_file.cpp")
          complain("only train/config_file.cpp knows TOML")
      }
      END { exit failed }' || return 1
}

# Makes a tree of one file with one include, and says whether check_tree accepts it.
accepts() {
  local file=$1 line=$2
  local tree
  tree=$(mktemp -d)
  mkdir -p "$tree/$(dirname "$file")"
  printf '#pragma once\n%s\n' "$line" > "$tree/$file"
  local status=0
  (check_tree "$tree") > "$tree/report" || status=$?
  # A refusal must say where.
  if [[ $status -ne 0 ]] && ! grep -q "^$file:2: " "$tree/report"; then
    status=0
  fi
  rm -r "$tree"
  return "$status"
}

self_test() {
  local failures=0 file line
  while IFS='|' read -r file line; do
    if accepts "$file" "$line"; then
      echo "self-test: $file with '$line' was accepted"
      failures=1
    fi
  done <<'BAD'
data/a.h|#include "model/a.h"
data/a.cpp|#include "train/a.h"
data/a.cpp|#include "tests/a.h"
data/a.cpp|#include "cuda/a.h"
data/deep/a.cpp|  #  include  "train/a.h"
data/a.cpp|#include <train/a.h>
data/a.cpp|#include <data/a.h>
data/a.cpp|#include "a.h"
data/a.cpp|#include "../model/a.h"
data/a.h|#include <torch/torch.h>
data/a.h|#include <ATen/core/Tensor.h>
data/a.h|#include <c10/util/Exception.h>
data/a.cpp|#include <spdlog/spdlog.h>
data/a.cpp|#include <toml++/toml.h>
model/a.h|#include "data/a.h"
model/a.h|#include "train/a.h"
model/a.h|#include "cuda/a.h"
model/ops/a.cpp|#include "data/a.h"
model/a.cpp|#include <spdlog/spdlog.h>
model/model_config.h|#include <c10/util/Exception.h>
model/model_config.cpp|#include <torch/torch.h>
model/model_config.cpp|#include "data/a.h"
model/formats/a.h|#include <ATen/ATen.h>
model/formats/a.h|#include "train/a.h"
train/a.cpp|#include "cuda/a.h"
train/a.cpp|#include "tests/a.h"
train/run_config.cpp|#include <toml++/toml.h>
train/config_file.h|#include <toml++/toml.h>
train/a.cpp|#include "spdlog/spdlog.h"
cuda/a.cu|#include "model/rwkv4.h"
cuda/a.cuh|#include "train/a.h"
tests/a.cpp|#include <toml++/toml.h>
BAD
  while IFS='|' read -r file line; do
    if ! accepts "$file" "$line"; then
      echo "self-test: $file with '$line' was refused"
      failures=1
    fi
  done <<'GOOD'
data/a.h|#include "data/b.h"
data/a.h|#include <vector>
data/a.h|// #include "train/a.h"
model/a.h|#include "model/ops/a.h"
model/a.h|#include <torch/torch.h>
model/model_config.h|#include <cstdint>
model/formats/a.h|#include "data/a.h"
model/formats/a.h|#include "model/model_config.h"
train/a.cpp|#include "data/a.h"
train/a.cpp|#include "model/a.h"
train/a.cpp|#include "train/commands/a.h"
train/a.cpp|#include <spdlog/spdlog.h>
train/config_file.cpp|#include <toml++/toml.h>
cuda/a.cpp|#include "model/ops/a.h"
cuda/a.cu|#include "cuda/a.cuh"
tests/cuda/a.cpp|#include "cuda/a.h"
tests/a.cpp|#include "train/a.h"
GOOD
  local empty
  empty=$(mktemp -d)
  if (check_tree "$empty") > /dev/null; then
    echo "self-test: an empty tree was accepted"
    failures=1
  fi
  rmdir "$empty"
  return "$failures"
}

if [[ ${1:-} == --self-test ]]; then
  self_test
else
  check_tree "${1:-$(dirname "$0")/..}"
fi
