#!/usr/bin/env bash
# Gathers what a machine with a GPU needs of a build, for scripts/gpu_check.sh to run there: the
# programs, the libraries that a system with Python and torch alone lacks, and data, stripped.
#
#   scripts/package_gpu.sh [--build FOLDER] [--out FOLDER]    default build/release, build/gpu
#
# The other machine must run the same processor architecture, with a C library no older than this
# one's. Torch, CUDA and the compilers' run-time libraries are left out: torch's wheel brings them.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/release
out=build/gpu
while (($# > 0)); do
  case $1 in
    --build) build=${2:?--build FOLDER} ;;
    --out) out=${2:?--out FOLDER} ;;
    *)
      echo "usage: scripts/package_gpu.sh [--build FOLDER] [--out FOLDER]" >&2
      exit 2
      ;;
  esac
  shift 2
done

# What can be carried at once, with room for the sources.
readonly max_mib=60
# Says that a folder may be made anew: it is nobody's build.
readonly mark=.package
readonly required=(bin/rookery lib/librookery_torch.so)
# Not in a build without nvcc; scripts/gpu_check.sh reports what it misses.
readonly optional=(lib/librookery_cuda.so bin/test_kernels_gpu bin/bench_wkv_kernels)
# Of the system everywhere, or torch's.
readonly left_out='^(ld-linux|linux-vdso|lib(c|m|dl|rt|pthread|util|resolv)\.so|libstdc\+\+|libgcc_s|libgomp|libtorch|libc10|libshm|libcu|libnv|libnccl|librookery_)'

for file in "${required[@]}"; do
  if [[ ! -f $build/$file ]]; then
    echo "$build/$file is not there; build first (cmake --build --preset release), or name another" \
      "folder with --build" >&2
    exit 1
  fi
done
if [[ -e $out && ! -f $out/$mark ]]; then
  echo "$out is there and is no package of an earlier call; name another folder with --out" >&2
  exit 1
fi
rm -rf "$out"
mkdir -p "$out/bin" "$out/lib"
touch "$out/$mark"

carried=()
for file in "${required[@]}" "${optional[@]}"; do
  if [[ -f $build/$file ]]; then
    strip -o "$out/$file" "$build/$file"
    carried+=("$build/$file")
  else
    echo "left out: $build/$file, which is not there"
  fi
done
# ldd names what the libraries need in their turn, too.
ldd "${carried[@]}" | awk '$2 == "=>" { print $1, $3 }' | sort -u | while read -r name path; do
  [[ $name =~ $left_out ]] && continue
  if [[ $path != /* ]]; then
    echo "$name is not found; is everything that the build needs installed?" >&2
    exit 1
  fi
  strip -o "$out/lib/$name" "$path"
done
if [[ -d $build/share/rookery ]]; then
  mkdir -p "$out/share"
  cp -r "$build/share/rookery" "$out/share/"
fi

bytes=$(find "$out" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum }')
(cd "$out" && find . -type f -printf '%10s  %P\n' | sort -k 2)
printf '%s: %.1f MiB\n' "$out" "$(awk "BEGIN { print $bytes / 1048576 }")"
if ((bytes > max_mib * 1048576)); then
  echo "$out: more than the $max_mib MiB that can be carried; fewer architectures in" \
    "CMAKE_CUDA_ARCHITECTURES make librookery_cuda.so smaller" >&2
  exit 1
fi
