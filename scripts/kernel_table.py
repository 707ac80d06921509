#!/usr/bin/env python3
"""The table of what nvcc made of each kernel, in cuda/README.md: registers for every architecture, and
the warps that registers allow on a multiprocessor.

    scripts/kernel_table.py BUILD            says where README and build differ, and fails
    scripts/kernel_table.py BUILD --write    writes the table into README

BUILD is a build folder with CUDA in it; its .ptxas files (scripts/keep_ptxas.sh) are read. Fails, too,
if a kernel spills on any architecture.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "cuda" / "README.md"
BEGIN, END = "<!-- kernel table: begin -->", "<!-- kernel table: end -->"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100")
# Registers of a multiprocessor are the same on all of them: 65,536, given out by 256 a warp.
REGISTERS = 65536
WARP_UNIT = 256


def demangled(names):
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def short(name):
    """rwkv::(anonymous namespace)::f<float, true>(...) as f<float, true>."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|rwkv::|wkv4::|wkv7::|layer_norm_shift_mix::", "", name)
    name = name.replace("void ", "").replace("__nv_bfloat16", "bf16").replace("(bool)", "")
    name = re.sub(r"\(Task\)(\d)", lambda m: ("sums", "results")[int(m[1])], name)
    name = re.sub(r"\((?:\w|::)+\)(-?\d+)", r"\1", name)
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place].strip()
    return name.strip()


def read(build):
    """{(file, kernel): {architecture: (registers, spilled bytes)}}"""
    rows = {}
    for path in sorted(pathlib.Path(build).glob("cuda/CMakeFiles/rwkv_kernels.dir/*.ptxas")):
        file = path.name.split(".cu.")[0] + ".cu"
        entry = spills = None
        for line in path.read_text().splitlines():
            if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                entry, spills = found.groups(), 0
            elif entry and (found := re.search(r"(\d+) bytes spill stores", line)):
                spills += int(found[1])
            elif entry and (found := re.search(r"Used (\d+) registers", line)):
                rows.setdefault((file, entry[0]), {})[entry[1]] = (int(found[1]), spills)
                entry = None
    if not rows:
        sys.exit(f"{build}: has no .ptxas files below cuda/CMakeFiles/rwkv_kernels.dir; build it with "
                 "CUDA first")
    names = demangled([kernel for _, kernel in rows])
    return {(file, short(name)): by_architecture
            for ((file, _), by_architecture), name in zip(rows.items(), names)}


def table(rows):
    lines = ["| kernel | " + " | ".join(ARCHITECTURES) + " |",
             "| --- |" + " --- |" * len(ARCHITECTURES)]
    last_file = None
    for (file, kernel), by_architecture in sorted(rows.items()):
        if file != last_file:
            lines.append(f"| **{file}** |" + " |" * len(ARCHITECTURES))
            last_file = file
        cells = []
        for architecture in ARCHITECTURES:
            if architecture not in by_architecture:
                cells.append("")
                continue
            registers, _ = by_architecture[architecture]
            warps = REGISTERS // (-(-registers * 32 // WARP_UNIT) * WARP_UNIT)
            cells.append(f"{registers}, {warps}")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--write"]):
        sys.exit(__doc__)
    rows = read(sys.argv[1])
    spills = [f"{file}: {kernel} spills {spilled} bytes on {architecture}"
              for (file, kernel), by_architecture in sorted(rows.items())
              for architecture, (_, spilled) in by_architecture.items() if spilled]
    if spills:
        sys.exit("\n".join(spills))
    text = README.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{README}: lacks the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    present, after = rest.split(END)
    now = table(rows)
    if sys.argv[2:] == ["--write"]:
        README.write_text(f"{before}{BEGIN}\n{now}\n{END}{after}")
        return
    missing = {architecture for by in rows.values() for architecture in ARCHITECTURES
               if architecture not in by}
    if missing:
        sys.exit(f"{sys.argv[1]}: kernels are not built for {', '.join(sorted(missing))}; the table is of "
                 "a build for all")
    if present.strip() != now:
        old, new = present.strip().splitlines(), now.splitlines()
        for line in sorted(set(old) - set(new)):
            print(f"README  {line}")
        for line in sorted(set(new) - set(old)):
            print(f"build   {line}")
        sys.exit(f"{README}: its table is of another build; if the change is wanted, run "
                 "scripts/kernel_table.py BUILD --write")
    print(f"{len(rows)} kernels as in {README.name}")


if __name__ == "__main__":
    main()
