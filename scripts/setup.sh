#!/usr/bin/env bash
# Puts on a Debian 12 machine what Rookery is built from: Debian packages, LibTorch out of the
# PyPI wheel, and the World vocabulary. No GPU and no CUDA toolkit needed. Run again, it does only
# what is still missing, and takes a moment when nothing is.
#
#   scripts/setup.sh            to build and run the program
#   scripts/setup.sh --cuda     also to train on an NVIDIA GPU: nvcc and the libraries of CUDA 13
#   scripts/setup.sh --tests    also what its tests and golden files need; --cuda is part of it
#
# Everything outside Debian's packages goes to .deps below the repository; delete it to start over.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly build_packages=(
  g++ cmake ninja-build ccache pkg-config python3-venv
  libcxxopts-dev libtomlplusplus-dev libsimdjson-dev libsentencepiece-dev libprotobuf-dev
  libutf8proc-dev libspdlog-dev libfmt-dev nlohmann-json3-dev libpcre2-dev libzstd-dev zlib1g-dev
  libxxhash-dev libgloo-dev
)
# The text of scripts/quickstart.sh: 31,102 verses in the public domain.
readonly corpus_packages=(bible-kjv)
# clang comes with libFuzzer and the sanitizers: it builds what scripts/fuzz.sh runs. chromium shows
# the report's page to its tests. iproute2 joins two network namespaces, libfaketime sets clocks wrong.
readonly test_packages=(
  libgtest-dev libgmock-dev clang-format clang libclang-rt-14-dev chromium iproute2
  libfaketime
)

readonly venv=.deps/venv
readonly vocab=.deps/share/rwkv_vocab_v20230424.txt
readonly vocab_wheel=rwkv==0.8.32
readonly vocab_sha256=e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Installs the Debian packages of the list that dpkg does not know as installed.
install_debian_packages() {
  local installed missing=() package
  command -v dpkg-query > /dev/null \
    || fail "no dpkg-query here: this script is for Debian 12; elsewhere install the counterparts of: $*"
  # dpkg-query fails for a package it has never heard of, which is no error here.
  installed=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' "$@" 2> /dev/null || true)"
  for package in "$@"; do
    [[ $installed == *" $package:installed "* ]] || missing+=("$package")
  done
  ((${#missing[@]} > 0)) || return 0

  local as_root=()
  if ((EUID != 0)); then
    command -v sudo > /dev/null \
      || fail "not root and no sudo; as root run: apt-get install ${missing[*]}; then this again"
    as_root=(sudo)
  fi
  say "installing Debian packages: ${missing[*]}"
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y)
  local log
  log=$(mktemp)
  if ! { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends "${missing[@]}"; } \
    > "$log" 2>&1; then
    tail -n 30 "$log" >&2
    rm -f "$log"
    fail "apt-get failed, its last lines are above; is the network there, and is this Debian 12?"
  fi
  rm -f "$log"
}

# Debian's own python3, not whichever comes first in PATH: that one may lack venv or be of a
# version that torch has no wheel for. A venv that is there already and works is kept.
make_venv() {
  if [[ -x $venv/bin/python ]] && "$venv/bin/python" -c 'import pip' 2> /dev/null; then
    return
  fi
  say "making $venv"
  /usr/bin/python3 -m venv --clear "$venv" \
    || fail "/usr/bin/python3 -m venv failed; is the Debian package python3-venv installed?"
}

# Installs a requirements file into the venv, unless this very content was installed before.
install_requirements() {
  local list=$1 what=$2 stamp
  stamp=$venv/installed-$(basename "$list")
  if cmp -s "$list" "$stamp"; then
    return
  fi
  say "installing $what into $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$list" \
    || fail "pip failed, see above; is pypi.org within reach, and are 5 GB of disk free? Run this again to go on"
  cp "$list" "$stamp"
}

vocab_is_right() {
  [[ -f $vocab ]] && sha256sum --check --status <<< "$vocab_sha256  $vocab"
}

# The World vocabulary is a data file of its author's wheel; the rest of the wheel is not kept.
# There its lines end in CR LF; the author's repositories, and the sum above, have LF alone.
install_vocab() {
  if vocab_is_right; then
    return
  fi
  say "taking $(basename "$vocab") out of $vocab_wheel"
  local folder
  folder=$(mktemp -d .deps/vocab.XXXXXX)
  if ! "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary :all: --dest "$folder" "$vocab_wheel"; then
    rm -rf "$folder"
    fail "pip could not download $vocab_wheel, see above; is pypi.org within reach?"
  fi
  "$venv/bin/python" -c 'import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, open(sys.argv[3], "wb") as out:
    out.write(wheel.read(sys.argv[2]).replace(b"\r\n", b"\n"))' \
    "$folder"/rwkv-*.whl "rwkv/$(basename "$vocab")" "$folder/vocab.txt"
  mkdir -p "$(dirname "$vocab")"
  mv "$folder/vocab.txt" "$vocab"
  rm -rf "$folder"
  vocab_is_right || fail "$vocab: sha256 is $(sha256sum < "$vocab" | cut -d' ' -f1), expected \
$vocab_sha256; has the wheel changed?"
}

packages=("${build_packages[@]}" "${corpus_packages[@]}")
with_tests=no
with_cuda=no
case "${1-}" in
  "") ;;
  --cuda) with_cuda=yes ;;
  --tests)
    with_tests=yes
    with_cuda=yes
    packages+=("${test_packages[@]}")
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/setup.sh >&2
    exit 2
    ;;
esac

SECONDS=0
install_debian_packages "${packages[@]}"
mkdir -p .deps
make_venv
install_requirements scripts/requirements-build.txt "LibTorch (1.3 GB on disk)"
if [[ $with_cuda == yes ]]; then
  install_requirements scripts/requirements-cuda.txt "nvcc and the libraries of CUDA (3 GB on disk)"
fi
if [[ $with_tests == yes ]]; then
  install_requirements scripts/requirements-tests.txt \
    "the Python packages of the tests"
fi
install_vocab
say "all there (${SECONDS} s)"
