#!/usr/bin/env bash
# From a bare Debian 12 to a language model of one's own: sets up, builds, and takes the King James
# Bible from text to tokens to a trained RWKV to new text, on a CPU.
#
#   scripts/quickstart.sh [--version rwkv4|rwkv7] [FOLDER]
#
#   --version    of the model, default rwkv4; configs/VERSION_quickstart.toml describes it
#   FOLDER       default runs/quickstart; everything made lies there. Another version in the same
#                folder is trained from the same tokens, and the model that was there kept as
#                model.old
#
# Run again, it goes on where it stopped: a stage is skipped if it once ended well with the same
# command line, what it made is still there, and nothing it read is newer. The program itself does
# not count as read: after a new build, delete the folder to train anew.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  echo "usage: scripts/quickstart.sh [--version rwkv4|rwkv7] [FOLDER]" >&2
  exit 2
}

again="scripts/quickstart.sh${*:+ $*}"
version=rwkv4
if [[ ${1-} == --version ]]; then
  version=${2-}
  [[ $version == rwkv4 || $version == rwkv7 ]] || usage
  shift 2
fi
if (($# > 1)) || [[ ${1-} == -* ]]; then
  usage
fi
readonly again version
readonly run=${1:-runs/quickstart}
readonly done_folder=$run/.done
readonly rookery=build/release/bin/rookery
readonly config=configs/${version}_quickstart.toml
readonly prompt="In the beginning"

current="set-up"
report_failure() {
  local status=$?
  ((status == 0)) && return
  {
    echo
    echo "quickstart: stopped in stage '$current' (exit status $status); the cause is above."
    echo "quickstart: once it is put right, run $again again;"
    echo "quickstart: the stages that are done are kept. To start over, delete $run."
  } >&2
}
trap report_failure EXIT

# stage NAME --in FILE... --out FILE... --run COMMAND...
# Runs the command unless its outputs are there, made by the same command line, and newer than
# its inputs. The mark in .done is what later stages name as input, so that a stage done anew
# takes those behind it along.
stage() {
  current=$1
  shift
  local inputs=() outputs=() list=
  while [[ $1 != --run ]]; do
    case $1 in
      --in | --out) list=$1 ;;
      *) if [[ $list == --in ]]; then inputs+=("$1"); else outputs+=("$1"); fi ;;
    esac
    shift
  done
  shift
  local mark=$done_folder/$current command_line
  command_line=$(printf '%q ' "$@")
  if is_done "$mark" "$command_line" "${inputs[@]}" -- "${outputs[@]}"; then
    echo "== $current: already there"
    return
  fi
  echo "== $current"
  local start=$SECONDS output
  # With a mark, what is there was whole but is out of date. A folder is put aside, for a run must
  # not go on from it; without a mark it is a run that was interrupted, and goes on.
  for output in "${outputs[@]}"; do
    if [[ -f $mark && -d $output ]]; then
      echo "$output is out of date, kept as $output.old"
      rm -rf "$output.old"
      mv "$output" "$output.old"
    fi
  done
  rm -f "$mark"
  "$@"
  for output in "${outputs[@]}"; do
    if [[ ! -e $output ]]; then
      echo "$output: not there although the command ended well" >&2
      exit 1
    fi
  done
  printf '%s\n' "$command_line" > "$mark"
  echo "== $current: $((SECONDS - start)) s"
}

is_done() {
  local mark=$1 command_line=$2
  shift 2
  [[ -f $mark && $(< "$mark") == "$command_line" ]] || return 1
  while [[ $1 != -- ]]; do
    [[ -e $1 && ! $1 -nt $mark ]] || return 1
    shift
  done
  shift
  while (($# > 0)); do
    [[ -e $1 ]] || return 1
    shift
  done
}

# Shows what a command prints and keeps it in a file, which appears only if the command ends well.
keep_output() {
  local file=$1
  shift
  "$@" | tee "$file.part"
  mv "$file.part" "$file"
}

# One verse a line. Of every 20 blocks of 50 verses the tenth is kept for validation: 5 % of the
# text, passages of 50 verses on end, taken evenly from all books, so that every style of the
# text is in both parts and no validated verse was trained on.
split_corpus() {
  bible -f gen1:1-rev22:21 > "$run/bible.txt"
  local verses
  verses=$(wc -l < "$run/bible.txt")
  if ((verses != 31102)); then
    echo "bible printed $verses verses instead of 31,102; is the Debian package bible-kjv whole?" >&2
    return 1
  fi
  awk -v train="$run/train.txt" -v validation="$run/validation.txt" \
    '{ print > (int((NR - 1) / 50) % 20 == 9 ? validation : train) }' "$run/bible.txt"
}

echo "== set-up"
scripts/setup.sh

# Always asked: ninja knows best what is newer, and says so at once if nothing is.
current="build"
echo "== $current"
[[ -f build/release/build.ninja ]] || cmake --preset release
build_start=$SECONDS
cmake --build --preset release
echo "== $current: $((SECONDS - build_start)) s"

mkdir -p "$done_folder"

stage corpus \
  --in \
  --out "$run/train.txt" "$run/validation.txt" \
  --run split_corpus

stage tokenizer \
  --in "$done_folder/corpus" "$run/train.txt" \
  --out "$run/bible.model" \
  --run "$rookery" tokenizer train \
  --input "$run/train.txt" --output "$run/bible.model" --vocab-size 2048

stage tokenize-train \
  --in "$done_folder/tokenizer" "$run/bible.model" "$run/train.txt" \
  --out "$run/train.bin" "$run/train.idx" \
  --run "$rookery" tokenize \
  --tokenizer "sentencepiece:$run/bible.model" --output "$run/train" "$run/train.txt"

stage tokenize-validation \
  --in "$done_folder/tokenizer" "$run/bible.model" "$run/validation.txt" \
  --out "$run/validation.bin" "$run/validation.idx" \
  --run "$rookery" tokenize \
  --tokenizer "sentencepiece:$run/bible.model" --output "$run/validation" "$run/validation.txt"

stage train \
  --in "$config" "$done_folder/tokenize-train" "$done_folder/tokenize-validation" \
  "$run/train.bin" "$run/validation.bin" \
  --out "$run/model" \
  --run "$rookery" train --config "$config" \
  --set "train.run_dir=$run/model" \
  --set "data.train=$run/train" --set "data.validation=$run/validation" \
  --set "data.tokenizer=sentencepiece:$run/bible.model"

# Beside two baselines counted from the training part: a model that has learnt from context is
# better than both.
stage eval \
  --in "$done_folder/train" \
  --out "$run/eval.txt" \
  --run keep_output "$run/eval.txt" "$rookery" eval \
  --model "$run/model" --data "$run/validation" --baseline "$run/train"

stage generate \
  --in "$done_folder/train" \
  --out "$run/sample.txt" \
  --run keep_output "$run/sample.txt" "$rookery" generate \
  --model "$run/model" --tokenizer "sentencepiece:$run/bible.model" \
  --prompt "$prompt" --length 200 --temperature 0.8 --top-p 0.9 --seed 1

stage report \
  --in "$done_folder/train" \
  --out "$run/report.html" \
  --run "$rookery" report "$run/model" --output "$run/report.html"

stage convert-pth \
  --in "$done_folder/train" \
  --out "$run/bible.pth" \
  --run "$rookery" convert "$run/model" "$run/bible.pth"

stage convert-safetensors \
  --in "$done_folder/train" \
  --out "$run/bible.safetensors" \
  --run "$rookery" convert "$run/model" "$run/bible.safetensors"

current="summary"
cat << END

All done in $((SECONDS / 60)) min $((SECONDS % 60)) s. What is where:

  $run/train.txt, validation.txt    the text, 95 % and 5 % of it
  $run/bible.model                  tokenizer (SentencePiece)
  $run/train.bin, .idx              tokens; the same for validation
  $run/model                        the run: checkpoints, configuration, metrics
  $run/eval.txt                     loss and perplexity beside unigram and bigram
  $run/sample.txt                   the text it wrote
  $run/bible.pth, bible.safetensors the model, for other programs
  $run/report.html                  the run in pictures: curves, samples, configuration

More text:

  $rookery generate --model $run/model --tokenizer sentencepiece:$run/bible.model --prompt "And the king said"

Look at the run: open $run/report.html in a browser
END
