"""Proves and times a build on a machine with a GPU, and writes down what it found.

Checks come first: every kernel against float64 arithmetic, ten steps of training against the
CPU's, CUDA graph against eager bit for bit, a run that is killed and goes on against one that is
not, the timeline of warm steps, in which nothing may allocate or wait. Where there are two GPUs,
two processes against one, and what lies between them. What failed is not timed. Then times: each op
and each step beside its floor, decoding, and a step of two GPUs beside that of one.

FOLDER/gpu_check.json holds everything, FOLDER/gpu_check.md the same to read. The exit status is 0
if all checks passed and all timings were taken, 1 if not, 2 for a wrong command line.

With --device cpu all of it runs on the CPU, but for what only a GPU has; a core is then to a process
what a GPU is otherwise.
"""

import argparse
import dataclasses
import datetime
import glob
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

import step_trace

# Of all there is to do; what does not fit any more is left out, and named.
BUDGET_S = 460
# Relative, of the worst of ten losses.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
# Between two processes and one, in fp32.
PROCESSES_TOLERANCE = 1e-5
# Of twice the tokens a second of one GPU, what two should reach at L24.
TARGET_PERCENT = 97


class Failure(Exception):
    """What a check found wrong, in one line."""


class Skipped(Exception):
    """Why a check or a timing was not made."""


class OutOfTime(Exception):
    """The time for everything is over."""


@dataclasses.dataclass
class Sizes:
    """What training checks train, and what is timed: (name, arguments of rookery bench)."""

    model: dict
    batch_size: int
    warm_steps: int  # that make the weights all checks start from
    resumed_steps: int
    save_every_steps: int
    ops: list
    steps: list
    other_versions: list  # steps of versions other than RWKV-4
    decode: list
    links: list  # more arguments of rookery doctor --distributed
    processes: list  # timed on two and on one, without their number of micro-batches
    threads: int | None = None  # of the CPU; none: one a core


TINY_SHAPE = ["--shape", "S", "--n-layer", "2", "--n-embd", "32"]


def sizes_of(device, quick):
    if quick:
        tiny = [*TINY_SHAPE, "--repeats", "1"]
        return Sizes(
            # Small work is slower on several threads, by far where others use the cores, too.
            threads=1, model={"n_layer": 2, "n_embd": 64, "ctx_len": 32}, batch_size=4,
            warm_steps=4, resumed_steps=200, save_every_steps=10,
            ops=[("bf16", [*tiny, "--batch", "2", "--ctx-len", "16"])],
            steps=[(dtype, [*tiny, "--batch", batch, "--ctx-len", ctx_len])
                   for dtype in ("fp32", "bf16") for batch, ctx_len in (("4", "16"), ("1", "64"))],
            other_versions=[("rwkv7", "bf16", ["--shape", "S", "--n-layer", "2", "--n-embd", "64",
                                               "--repeats", "1", "--batch", "2", "--ctx-len",
                                               "16"])],
            decode=[("bf16", [*tiny, "--prompt-len", "8"])],
            links=["--max-megabytes", "1"],
            processes=[("bf16", [*tiny, "--batch", "2", "--ctx-len", "16"])])
    # Enough channels that every kernel has more than one block of them.
    training = {"model": {"n_layer": 4, "n_embd": 256, "ctx_len": 128}, "batch_size": 8,
                "warm_steps": 10, "resumed_steps": 200, "save_every_steps": 20}
    if device == "cpu":
        return Sizes(**training,
                     ops=[("bf16", ["--shape", "S"])],
                     steps=[(dtype, ["--shape", shape])
                            for shape in ("S", "M") for dtype in ("fp32", "bf16")],
                     other_versions=[("rwkv7", dtype, ["--shape", "M"])
                                     for dtype in ("fp32", "bf16")],
                     decode=[("bf16", ["--shape", "M"])],
                     links=[], processes=[("fp32", ["--shape", "M"])])
    return Sizes(
        **training,
        # Each op is timed in the step, and the kernels of wkv4 and wkv7 by themselves.
        ops=[],
        steps=[("bf16", ["--shape", "L12"]),
               ("bf16", ["--shape", "L24", "--recompute", "mixes"]),
               ("bf16", ["--shape", "S"]), ("bf16", ["--shape", "M"]),
               ("fp32", ["--shape", "L12", "--recompute", "mixes"]),
               ("bf16", ["--shape", "L12", "--recompute", "blocks"]),
               # As many tokens a step at every length.
               *[("bf16", ["--shape", "L12", "--batch", batch, "--ctx-len", ctx_len,
                           "--recompute", "mixes"])
                 for batch, ctx_len in (("64", "1024"), ("16", "4096"), ("1", "65536"))]],
        other_versions=[("rwkv7", "bf16", ["--shape", "L12"]),
                        ("rwkv7", "bf16", ["--shape", "L12", "--batch", "4", "--ctx-len", "4096"]),
                        ("rwkv7", "bf16", ["--shape", "L24", "--recompute", "mixes"])],
        decode=[("bf16", ["--shape", "L12"]), ("bf16", ["--shape", "L24"])],
        links=[],
        processes=[("bf16", ["--shape", "L24", "--recompute", "mixes", "--repeats", "3"])])


def environment(build):
    """Where programs find the libraries carried along, and those of torch and CUDA."""
    folders = [str(build / "lib")]
    torch = importlib.util.find_spec("torch")
    if torch:
        package = pathlib.Path(torch.origin).parent
        folders += [str(package / "lib"), *sorted(glob.glob(f"{package.parent}/nvidia/*/lib"))]
    folders += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}


class Runner:
    """Runs the build's programs, until the time is over."""

    def __init__(self, build, device, threads, folder):
        self.build = build
        self.device = device
        self.threads = threads
        self.folder = folder
        self.environment = environment(build)
        self.end = time.monotonic() + BUDGET_S

    def program(self, name):
        return str(self.build / "bin" / name)

    def run(self, name, *arguments):
        """Runs a program to its end and returns it; OutOfTime if that does not come."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        try:
            return subprocess.run(
                [self.program(name), *map(str, arguments)], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            raise OutOfTime from None

    def rookery(self, *arguments):
        """Runs the program, which must succeed; returns what it printed."""
        done = self.run("rookery", *arguments)
        if done.returncode != 0:
            raise Failure(f"rookery {' '.join(map(str, arguments))} ended with {done.returncode}: "
                          + last_line(done.stderr))
        return done.stdout

    def device_option(self):
        # The CPU is the default, also where the program knows no other device.
        return [] if self.device == "cpu" else ["--device", self.device]

    def bench(self, what, *arguments):
        # Of several processes each has one.
        threads = ["--threads", self.threads] if self.threads and what != "distributed" else []
        return json.loads(self.rookery("bench", what, *arguments, *self.device_option(), *threads,
                                       "--json", "-"))


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


# ---- Facts --------------------------------------------------------------------------------------


def output_of(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def torch_version():
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def facts_of(runner):
    facts = {"device": runner.device,
             "rookery": last_line(runner.rookery("--version")),
             "torch": torch_version(),
             "system": f"{platform.system()} {platform.release()}",
             "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores"}
    if runner.device != "cpu":
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        gpus = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        facts["gpu"] = "; ".join(gpus.splitlines())
    return facts


# ---- Training -----------------------------------------------------------------------------------


def sentences(count):
    """Text that a small model learns something of at once; the same at every call."""
    generator = random.Random(1)
    words = ["the", "rook", "sat", "on", "a", "wall", "and", "saw", "river", "hill", "of", "stone"]
    return [" ".join(generator.choices(words, k=generator.randrange(4, 12))) + "."
            for _ in range(count)]


class Training:
    """Runs of `rookery train` with one version on one corpus, from the same weights."""

    def __init__(self, runner, sizes, version):
        self.runner = runner
        self.sizes = sizes
        self.version = version
        # Of its runs and files.
        self.prefix = "" if version == "rwkv4" else f"{version}_"
        text = runner.folder / "text.txt"
        text.write_text("\n".join(sentences(4000)) + "\n", encoding="utf-8")
        runner.rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", text)
        # Initial weights leave much at zero, which hides what a kernel makes of it.
        self.initial = None
        self.run("warm", "cpu", "fp32", sizes.warm_steps)
        self.initial = self.newest_checkpoint("warm") / "model.safetensors"

    def command(self, name, device, dtype, steps, settings):
        """The command line of a run in the folder `name`, which goes on if it is there."""
        config = self.runner.folder / f"{self.prefix}{name}.toml"
        lines = ["[model]", f'version = "{self.version}"',
                 *[f"{key} = {value}" for key, value in self.sizes.model.items()],
                 "[data]", 'train = "corpus"', 'tokenizer = "bytes"',
                 "[train]", f'run_dir = "{self.prefix}{name}"', f"batch_size = {self.sizes.batch_size}",
                 f"total_steps = {steps}", "log_every_steps = 1", f'dtype = "{dtype}"',
                 "[schedule]", "lr_init = 1e-3", "lr_final = 1e-3"]
        if self.runner.threads:
            settings = {"train.threads": self.runner.threads, **settings}
        if self.initial:
            lines += ["[init]", f'from = "{self.initial}"']
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if device != "cpu":
            settings = {"train.device": device, **settings}
        options = [f"--set={key}={value}" for key, value in settings.items()]
        return ["train", "--config", str(config), *options]

    def run(self, name, device, dtype, steps, processes=1, **settings):
        """Trains; the losses of all steps."""
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        launcher = ["--nproc", processes, "--max-restarts", 0] if processes > 1 else []
        self.runner.rookery(*self.command(name, device, dtype, steps, settings), *launcher)
        metrics = self.runner.folder / f"{self.prefix}{name}" / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8")
        return [json.loads(line)["loss"] for line in lines.splitlines()]

    def checkpoints(self, name):
        return sorted((self.runner.folder / f"{self.prefix}{name}" / "checkpoints").glob("step_*"))

    def newest_checkpoint(self, name):
        return self.checkpoints(name)[-1]

    def killed_run(self, name, device, dtype, steps, settings):
        """Kills the run once its first checkpoint is there; the name of the newest."""
        with subprocess.Popen(
                [self.runner.program("rookery"),
                 *self.command(name, device, dtype, steps, settings)],
                cwd=self.runner.folder, env=self.runner.environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not self.checkpoints(name) and process.poll() is None:
                if time.monotonic() > self.runner.end:
                    process.kill()
                    raise OutOfTime
                time.sleep(0.002)
            process.kill()
        if process.returncode != -signal.SIGKILL:
            raise Failure(f"the run to be killed ended by itself with {process.returncode}")
        return self.newest_checkpoint(name).name


def tensors_of(path):
    """What a .safetensors file says of its tensors, and their bytes; its metadata left out."""
    content = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8:8 + header_bytes])
    header.pop("__metadata__", None)
    return header, content[8 + header_bytes:]


def require_same_bits(training, names):
    """Weights and optimizer state of the runs' newest checkpoints."""
    checkpoints = [training.newest_checkpoint(name) for name in names]
    if checkpoints[0].name != checkpoints[1].name:
        raise Failure(f"{names[0]} ended at {checkpoints[0].name}, "
                      f"{names[1]} at {checkpoints[1].name}")
    # Of several processes each writes its share.
    files, other_files = [sorted(path.name for path in folder.glob("*.safetensors"))
                          for folder in checkpoints]
    if not files or files != other_files:
        raise Failure(f"{names[0]} saved {', '.join(files) or 'nothing'}, "
                      f"{names[1]} {', '.join(other_files) or 'nothing'}")
    for file in files:
        (header, first), (other_header, second) = [tensors_of(folder / file)
                                                   for folder in checkpoints]
        if header != other_header:
            raise Failure(f"{file}: {names[0]} and {names[1]} hold different tensors")
        differing = [name for name, entry in header.items()
                     if first[slice(*entry["data_offsets"])]
                     != second[slice(*entry["data_offsets"])]]
        if differing:
            raise Failure(f"{file}: {len(differing)} of {len(header)} tensors differ between "
                          f"{names[0]} and {names[1]}, first {differing[0]}")
    return f"weights and optimizer equal bit for bit at {checkpoints[0].name}"


# ---- Checks -------------------------------------------------------------------------------------


def check_kernels(runner):
    if runner.device == "cpu":
        raise Skipped("the CPU has no device kernels; test_kernels runs them without a GPU")
    if not pathlib.Path(runner.program("test_kernels_gpu")).exists():
        raise Failure(f"{runner.program('test_kernels_gpu')} is not there; build it with nvcc and "
                      "package it again")
    report = runner.folder / "kernels.json"
    done = runner.run("test_kernels_gpu", f"--gtest_output=json:{report}")
    if not report.exists():
        raise Failure(f"test_kernels_gpu ended with {done.returncode}: "
                      + last_line(done.stderr or done.stdout))
    tests = [(f"{suite['name']}.{test['name']}", test)
             for suite in json.loads(report.read_text(encoding="utf-8"))["testsuites"]
             for test in suite["testsuite"]]
    ran = [name for name, test in tests if test["result"] == "COMPLETED"]
    failed = {name: test["failures"][0]["failure"] for name, test in tests if test.get("failures")}
    if failed:
        raise Failure(f"{len(failed)} of {len(ran)} tests failed: "
                      + "; ".join(f"{name}: {' '.join(text.split())[:200]}"
                                  for name, text in failed.items()))
    if done.returncode != 0 or not ran:
        raise Failure(f"test_kernels_gpu ran {len(ran)} of {len(tests)} tests and ended with "
                      f"{done.returncode}: {last_line(done.stdout)}")
    return f"{len(ran)} tests passed, {len(tests) - len(ran)} skipped"


# Of the runs that are compared.
STEPS = 10


def require_same_losses(ours, expected, where, tolerance):
    """`where` says where the expected ones are from."""
    if not len(ours) == len(expected) == STEPS:
        raise Failure(f"{len(ours)} and {len(expected)} losses, expected {STEPS} of each")
    errors = [abs(x - y) / abs(y) for x, y in zip(ours, expected, strict=True)]
    worst = max(range(STEPS), key=lambda i: errors[i])
    found = (f"worst of {STEPS} losses is off by {errors[worst]:.1e} relative, at step {worst + 1} "
             f"({ours[worst]:.6f}, {where} {expected[worst]:.6f}); {tolerance:.0e} is allowed")
    # Not finite is not within the tolerance either.
    if not errors[worst] <= tolerance:
        raise Failure(found)
    return found


def check_steps(runner, training, dtype):
    ours = training.run(f"steps_{dtype}", runner.device, dtype, STEPS)
    expected = training.run(f"steps_{dtype}_cpu", "cpu", dtype, STEPS)
    return require_same_losses(ours, expected, "on the CPU", LOSS_TOLERANCE[dtype])


def graph_and_eager(runner):
    """Settings of a run with CUDA graphs and of one without. The CPU has none: there, two runs."""
    if runner.device == "cpu":
        return {}, {}
    return {"train__cuda_graph": "true"}, {"train__cuda_graph": "false"}


def check_graph(runner, training, dtype):
    names = [f"graph_{dtype}", f"eager_{dtype}"]
    for name, settings in zip(names, graph_and_eager(runner), strict=True):
        training.run(name, runner.device, dtype, STEPS, **settings)
    return require_same_bits(training, names)


def check_resume(runner, training, dtype):
    sizes = training.sizes
    settings = {"train__save_every_steps": sizes.save_every_steps}
    names = [f"whole_{dtype}", f"killed_{dtype}"]
    training.run(names[0], runner.device, dtype, sizes.resumed_steps, **settings)
    left = training.killed_run(names[1], runner.device, dtype, sizes.resumed_steps,
                               {"train.save_every_steps": sizes.save_every_steps})
    training.run(names[1], runner.device, dtype, sizes.resumed_steps, **settings)
    return f"killed after {left}; " + require_same_bits(training, names)


def check_trace(runner, dtype, arguments):
    path = runner.folder / "trace.json"
    runner.bench("step", "--dtype", dtype, *arguments, "--repeats", "1", "--trace", path)
    events = step_trace.events_of(path)
    if runner.device == "cpu":
        names = {event.get("name") for event in events}
        if "rookery::wkv4" not in names:
            raise Failure("there is no op of ours in the timeline")
        return f"{len(events)} events; only a GPU has calls to look for"
    found = step_trace.findings_of(events)
    if found is None:
        raise Failure("there are fewer than two launches of graphs in the timeline")
    if found["allocates"] or found["waits"]:
        raise Failure("a warm step calls " + ", ".join(found["allocates"] + found["waits"])
                      + "; " + step_trace.sentence_of(found))
    return step_trace.sentence_of(found)


def check_two_places(runner):
    """Whether two processes can have a GPU each, or on the CPU a core."""
    if runner.device == "cpu":
        count, kind = len(os.sched_getaffinity(0)), "core"
    else:
        count, kind = len(json.loads(runner.rookery("doctor", "--json"))["gpus"]), "GPU"
    if count < 2:
        raise Skipped(f"{count} {kind} is visible, and two processes need one each")
    return f"{count} {kind}s are visible"


def check_links(runner, arguments):
    result = json.loads(runner.rookery("doctor", "--distributed", "--nproc", 2, "--json",
                                       *runner.device_option(), *arguments))
    # A few bytes have no bandwidth.
    operations = [one for one in result["operations"] if one["operation"] != "agreement"]
    most = max(one["bytes"] for one in operations)
    return (f"{result['backend']}; bus GB/s at {most / 2**20:.0f} MiB: "
            + ", ".join(f"{one['operation']} {format_number(one['bus_gb_per_s'])}"
                        for one in operations if one["bytes"] == most)
            + "; links: " + ", ".join(
                f"{one['from']} to {one['to']} {format_number(one['gb_per_s'])} GB/s, "
                f"{format_number(one['latency_us'])} us" for one in result["links"]))


def check_zero(runner, training, stage):
    """Two processes against one, against themselves, and graph against eager."""
    graph, eager = graph_and_eager(runner)
    settings = {"distributed__zero": stage}
    if stage == 2:
        # Gradients are scattered after each micro-batch.
        settings["train__micro_batch_size"] = 1
    alone = training.run(f"alone_zero{stage}", runner.device, "fp32", STEPS)
    names = [f"zero{stage}", f"again_zero{stage}", f"eager_zero{stage}"]
    losses = [training.run(name, runner.device, "fp32", STEPS, processes=2, **settings, **more)
              for name, more in zip(names, (graph, graph, eager), strict=True)]
    found = require_same_losses(losses[0], alone, "of one process", PROCESSES_TOLERANCE)
    require_same_bits(training, names[:2])
    return f"{found}; again, and eager: {require_same_bits(training, [names[0], names[2]])}"


class Report:
    """Checks and timings as they come."""

    def __init__(self):
        self.checks = []
        self.timings = []

    def check(self, name, work, *arguments):
        begin = time.monotonic()
        try:
            result, detail = "passed", work(*arguments)
        except Failure as failure:
            result, detail = "failed", str(failure)
        except Skipped as skipped:
            result, detail = "skipped", str(skipped)
        except OutOfTime:
            result, detail = "failed", f"not done within {BUDGET_S} s for everything"
        self.checks.append({"name": name, "result": result, "detail": detail,
                            "seconds": round(time.monotonic() - begin, 1)})
        print(f"{name}: {result}: {detail}", flush=True)

    def passed(self, name):
        return any(check["name"] == name and check["result"] == "passed" for check in self.checks)

    def failed(self, names):
        return [check["name"] for check in self.checks
                if check["name"] in names and check["result"] == "failed"]

    def time(self, runner, arguments, needs):
        """Takes the rows of a benchmark, unless one of the checks it needs has failed."""
        command = " ".join(["rookery", "bench", *arguments])
        timing = {"command": command, "rows": []}
        failed = self.failed(needs)
        begin = time.monotonic()
        if failed:
            timing["left_out"] = f"{', '.join(failed)} failed"
        else:
            try:
                timing["rows"] = runner.bench(*arguments)
            except Failure as failure:
                timing["left_out"] = str(failure)
            except OutOfTime:
                timing["left_out"] = f"not done within {BUDGET_S} s for everything"
        timing["seconds"] = round(time.monotonic() - begin, 1)
        self.timings.append(timing)
        print(f"{command}: {timing.get('left_out', 'timed')}", flush=True)

    def time_processes(self, runner, arguments, needs):
        """A step of two processes and of one, beside the part of twice the speed to be reached."""
        self.time(runner, ["distributed", "--nproc", "2", *arguments], needs)
        for together in self.timings[-1]["rows"][:1]:
            together["target_percent"] = TARGET_PERCENT
            print(f"  {together['percent_of_linear']:.1f} % of linear, target {TARGET_PERCENT} %",
                  flush=True)

    def time_kernels(self, runner):
        """The kernels of wkv4 and wkv7 beside their bytes, which no benchmark of rookery tells apart."""
        timing = {"command": "bench_wkv_kernels", "rows": []}
        begin = time.monotonic()
        if self.failed(("kernels",)):
            timing["left_out"] = "kernels failed"
        elif not pathlib.Path(runner.program("bench_wkv_kernels")).exists():
            timing["left_out"] = "is not in the build"
        else:
            done = runner.run("bench_wkv_kernels")
            if done.returncode == 0:
                lines = [json.loads(line) for line in done.stdout.splitlines()]
                timing["copy_gb_per_s"] = lines[0]["copy_gb_per_s"]
                timing["kernels"] = lines[1:]
            else:
                timing["left_out"] = f"ended with {done.returncode}: {last_line(done.stderr)}"
        timing["seconds"] = round(time.monotonic() - begin, 1)
        self.timings.append(timing)
        print(f"bench_wkv_kernels: {timing.get('left_out', 'timed')}", flush=True)

    def all_well(self):
        return (all(check["result"] != "failed" for check in self.checks)
                and all("left_out" not in timing for timing in self.timings))


# ---- Both files ---------------------------------------------------------------------------------


def format_number(value):
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(rows):
    """A Markdown table of a benchmark's rows; parts follow in tables of their own."""
    own = ("what", "median_ms", "min_ms", "max_ms", "repeats", "conditions", "parts")
    figures = [key for key in rows[0] if key not in own]
    lines = [f"| | ms, median [min-max] |{''.join(f' {name} |' for name in figures)}",
             "| --- |" + " --- |" * (len(figures) + 1)]
    for row in rows:
        ms = [format_number(row[key]) for key in ("median_ms", "min_ms", "max_ms")]
        cells = [format_number(row[name]) if name in row else "" for name in figures]
        lines.append(f"| {row['what']} | {ms[0]} [{ms[1]}-{ms[2]}] |"
                     + "".join(f" {cell} |" for cell in cells))
    for row in rows:
        if row["parts"]:
            lines += ["", f"{row['what']}, part by part:", "", *table(row["parts"])]
    return lines


def to_markdown(report):
    lines = ["# Checks and times on a device", "",
             f"Made with `{report['command']}` at {report['time']}, in {report['seconds']} s.", ""]
    lines += [f"- {name}: {value}" for name, value in report["facts"].items()]
    lines += ["", "| check | result | found | s |", "| --- | --- | --- | --- |"]
    for check in report["checks"]:
        detail = check["detail"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {check['name']} | {check['result']} | {detail} | {check['seconds']} |")
    for timing in report["timings"]:
        lines += ["", f"## `{timing['command']}`", ""]
        if "left_out" in timing:
            lines.append(f"Left out: {timing['left_out']}")
            continue
        if "kernels" in timing:
            lines += [f"copy_gb_per_s {timing['copy_gb_per_s']}; microseconds, and times the floor", "",
                      "| kernel | shape | forward | | backward | |", "| --- |" + " --- |" * 5]
            lines += [f"| {row['kernel']} | {row['shape']} | {row['forward_us']} | "
                      f"{row['forward_over_floor']} | {row['backward_us']} | "
                      f"{row['backward_over_floor']} |" for row in timing["kernels"]]
            continue
        conditions = timing["rows"][0]["conditions"]
        lines += [", ".join(f"{name} {format_number(value)}" for name, value in conditions.items()),
                  "", *table(timing["rows"])]
    return "\n".join(lines) + "\n"


def write_report(folder, report):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "gpu_check.md").write_text(to_markdown(report), encoding="utf-8")


def make_report(runner, sizes):
    """All checks, then all timings."""
    found = Report()
    facts = facts_of(runner)
    found.check("kernels", check_kernels, runner)
    # In a list: nothing to train with is a failed check like any other.
    training, training7 = [], []
    found.check("training starts", lambda: training.append(Training(runner, sizes, "rwkv4")) or
                f"weights after {sizes.warm_steps} steps on the CPU")
    dtypes = ("fp32", "bf16")
    found.check("rwkv7 starts", lambda: training7.append(Training(runner, sizes, "rwkv7")) or
                f"weights after {sizes.warm_steps} steps on the CPU")
    if training7:
        for dtype in dtypes:
            found.check(f"rwkv7 steps {dtype}", check_steps, runner, training7[0], dtype)
        for dtype in dtypes:
            found.check(f"rwkv7 graph {dtype}", check_graph, runner, training7[0], dtype)
        found.check("rwkv7 resume bf16", check_resume, runner, training7[0], "bf16")
    if training:
        for dtype in dtypes:
            found.check(f"steps {dtype}", check_steps, runner, training[0], dtype)
        for dtype in dtypes:
            found.check(f"graph {dtype}", check_graph, runner, training[0], dtype)
        found.check("resume bf16", check_resume, runner, training[0], "bf16")
    found.check("trace", check_trace, runner, *sizes.steps[0])
    found.check("two processes", check_two_places, runner)
    has_two = found.passed("two processes")
    if has_two:
        found.check("links", check_links, runner, sizes.links)
    stages = (0, 1, 2) if has_two and training else ()
    for stage in stages:
        found.check(f"zero {stage}", check_zero, runner, training[0], stage)
    needed = ("kernels", "training starts")
    for dtype, arguments in sizes.steps:
        found.time(runner, ["step", "--explain", "--dtype", dtype, *arguments],
                   (*needed, f"steps {dtype}", f"graph {dtype}"))
    for version, dtype, arguments in sizes.other_versions:
        found.time(runner, ["step", "--explain", "--version", version, "--dtype", dtype,
                            *arguments],
                   ("kernels", f"{version} steps {dtype}", f"{version} graph {dtype}"))
    for dtype, arguments in sizes.decode:
        found.time(runner, ["decode", "--dtype", dtype, *arguments], (*needed, f"steps {dtype}"))
    for dtype, arguments in sizes.processes if has_two else ():
        # With two, gradients are reduced once for twice the work.
        for micro_batches in ("1", "2"):
            found.time_processes(
                runner, ["--zero", "1", "--micro-batches", micro_batches, "--dtype", dtype,
                         *arguments],
                (*needed, f"steps {dtype}", f"graph {dtype}", "links", "zero 1"))
    if runner.device != "cpu":
        found.time_kernels(runner)
    for dtype, arguments in sizes.ops:
        found.time(runner, ["ops", "--dtype", dtype, *arguments], ("kernels",))
    return facts, found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER",
                        help="where both files are written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true",
                        help="everything as small as can be: the figures say nothing")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/gpu"),
                        metavar="FOLDER", help="with bin and lib; default: build/gpu, which "
                        "scripts/package_gpu.sh makes")
    options = parser.parse_args()
    build = options.build.resolve()
    if not (build / "bin" / "rookery").exists():
        parser.error(f"{build}/bin/rookery is not there; make it with scripts/package_gpu.sh or "
                     "name a build with --build")

    begin = time.monotonic()
    started = datetime.datetime.now(datetime.timezone.utc)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        sizes = sizes_of(options.device, options.quick)
        facts, found = make_report(Runner(build, options.device, sizes.threads, folder), sizes)
    except Failure as failure:
        sys.exit(f"gpu_check: {failure}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_report(options.out, {
        "command": " ".join(["scripts/gpu_check.sh", *sys.argv[1:]]),
        "time": started.strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(time.monotonic() - begin),
        "facts": facts, "checks": found.checks, "timings": found.timings})
    print(f"{options.out}/gpu_check.json and gpu_check.md are written")
    sys.exit(0 if found.all_well() else 1)


if __name__ == "__main__":
    main()
