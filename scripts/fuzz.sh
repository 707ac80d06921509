#!/usr/bin/env bash
# Feeds made-up files to the readers of files from strangers (libFuzzer, with AddressSanitizer and
# UndefinedBehaviorSanitizer) and prints what came of it, a line a target.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]    SECONDS for each target, default 10; default all targets
#
# Builds the preset `fuzz`, which needs clang; without clang it says so and ends with 77 (in CI: 1).
# Inputs that taught the fuzzer something stay in build/fuzz/corpus and serve the next run. An input
# that a reader could not take is left in build/fuzz/crashes; to see what it does again:
#   build/fuzz/bin/fuzz_TARGET build/fuzz/crashes/TARGET-...
set -euo pipefail
cd "$(dirname "$0")/.."

readonly build=build/fuzz
readonly seconds=${1-10}
shift || true
# No reader may need more than this, whatever the file says; nor so long, for so few bytes.
readonly limits=(-rss_limit_mb=1024 -malloc_limit_mb=1024 -timeout=10 -max_len=20000)

if ! command -v clang++ > /dev/null; then
  echo "fuzz: skipped: no clang++; install Debian's clang" >&2
  [[ -n ${CI-} ]] && exit 1
  exit 77
fi

build_targets() {
  local log=$build/build.log
  mkdir -p "$build"
  if ! { cmake --preset fuzz && cmake --build --preset fuzz; } > "$log" 2>&1; then
    tail -n 30 "$log" >&2
    echo "fuzz: the preset fuzz could not be built, its last lines are above" >&2
    exit 1
  fi
}

# The last number after a label in libFuzzer's log.
last_number() {
  grep -o "$1 *[0-9]*" "$2" | tail -n 1 | grep -o '[0-9]*$' || echo "?"
}

# Runs one target and prints its line; fails if it found something.
fuzz_target() {
  local target=$1 log=$build/$1.log status=0
  mkdir -p "$build/corpus/$target" "$build/crashes"
  "$build/bin/fuzz_$target" "${limits[@]}" -max_total_time="$seconds" -print_final_stats=1 \
    -artifact_prefix="$build/crashes/$target-" \
    "$build/corpus/$target" "$build/seeds/$target" > "$log" 2>&1 || status=$?
  printf '%-14s %12s %9s %8s %8s\n' "$target" \
    "$(last_number 'stat::number_of_executed_units:' "$log")" "$(last_number ' cov:' "$log")" \
    "$((status != 0))" "$(last_number 'stat::peak_rss_mb:' "$log")"
  if ((status != 0)); then
    tail -n 40 "$log" >&2
    return 1
  fi
}

build_targets
rm -rf "$build/seeds"
"$build/bin/make_fuzz_seeds" "$build/seeds"
targets=("$@")
if ((${#targets[@]} == 0)); then
  mapfile -t targets < <(ls "$build/seeds")
fi

# Readers take paths: in memory, files cost nothing.
TMPDIR=$(mktemp -d -p "$([[ -w /dev/shm ]] && echo /dev/shm || echo /tmp)" rookery_fuzz.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
failed=0
printf '%-14s %12s %9s %8s %8s\n' target executions coverage crashes "peak MB"
for target in "${targets[@]}"; do
  fuzz_target "$target" || failed=1
done
exit $failed
