"""What the tests of the whole program share: running it, a corpus, a small run.

A test file ends with `support.main()`; ctest runs it as: FILE PATH_OF_ROOKERY [unittest's options].
"""

import importlib
import json
import os
import pathlib
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

# Beyond the time that any wait of a test takes, by far.
DEADLINE_S = 120
# The least that distributed.timeout_s may be.
TIMEOUT_S = 5
FAKE_TIME = pathlib.Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")

_program = ""

# How a line of the log begins. What else is on stderr is the message of an error.
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


def main():
    """Runs the tests of the script that calls."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} PATH_OF_ROOKERY")
    use_program(sys.argv.pop(1))
    unittest.main(module="__main__")


def use_program(path):
    """Names the program that all functions here run."""
    global _program
    _program = os.path.abspath(path)


def missing(what):
    """Skips what asks for something that is not installed; in CI it must be there."""
    if os.environ.get("CI"):
        raise AssertionError(f"missing, and CI must have it: {what}")
    raise unittest.SkipTest(f"missing: {what}")


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"Python package {name} ({error}); scripts/setup.sh --tests installs it")


def test_data(name):
    """A file under ROOKERY_TEST_DATA, by default ../shared/data beside the repository."""
    default = pathlib.Path(__file__).parents[3] / "shared" / "data"
    path = pathlib.Path(os.environ.get("ROOKERY_TEST_DATA", default)) / name
    if not path.exists():
        missing(f"{path}; set ROOKERY_TEST_DATA")
    return path


def command_line(*arguments):
    return [_program, *map(str, arguments)]


def environment():
    # One thread also where the command has no option for it: tests run beside other tests.
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments, cwd=None, stdout=subprocess.PIPE):
    """Runs the program to its end, whatever that is. Outputs are bytes."""
    return subprocess.run(
        command_line(*arguments),
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )


def rookery(*arguments, cwd=None):
    """Runs the program, which must succeed; returns what it printed on stdout."""
    done = run(*arguments, cwd=cwd)
    if done.returncode != 0:
        raise AssertionError(
            f"rookery {' '.join(map(str, arguments))} ended with {done.returncode}:\n"
            + done.stderr.decode(errors="replace")
        )
    return done.stdout


def error_message(stderr):
    """What the program wrote to stderr, without the lines of the log."""
    lines = stderr.decode().splitlines()
    return "\n".join(line for line in lines if not _LOG_LINE.match(line))


class Folder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


def listing(folder):
    """Every file and folder under `folder`, with the files' contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(pathlib.Path(folder).rglob("*"))
    }


def text_lines(count=600, seed=1):
    """Sentences that a small model learns in seconds: few words, fixed frames, sums that are right.

    The seed decides over the words, so two seeds give texts of one kind that are not the same.
    """
    generator = random.Random(seed)
    animals = ["cat", "dog", "goose", "mouse", "sheep", "rook", "donkey", "piglet", "squirrel"]
    places = ["hill", "stile", "river", "garden wall", "moon", "chimney", "haystack", "bridge"]
    deeds = ["went", "ran", "jumped", "looked", "rolled", "sang softly"]
    lines = []
    for _ in range(count):
        if generator.random() < 0.5:
            a, b = generator.randrange(10), generator.randrange(10)
            lines.append(f"{a} and {b} make {a + b}.")
        else:
            animal, deed, place = map(generator.choice, (animals, deeds, places))
            lines.append(f"The little {animal} {deed} over the {place}.")
    return lines


def write_text(path, lines):
    pathlib.Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_config(path, **sections):
    """A run's TOML file: write_config(path, model={"n_layer": 2}, ...)."""
    lines = []
    for section, keys in sections.items():
        lines.append(f"[{section}]")
        # JSON's numbers, booleans and plain strings are TOML's, too.
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return write_text(path, lines)


# Two layers of 32 channels: a step of 8 x 32 tokens takes milliseconds.
SMALL_MODEL = {"version": "rwkv4", "n_layer": 2, "n_embd": 32, "ctx_len": 32}
SMALL_SCHEDULE = {"lr_init": 1e-2, "lr_final": 1e-3}


def small_run(data, model=None, schedule=None, **train):
    """Sections of a small run on the corpus `data` (a dict of [data]'s keys)."""
    return {
        "model": {**SMALL_MODEL, **(model or {})},
        "data": data,
        "train": {"run_dir": "run", "batch_size": 8, "threads": 1, **train},
        "schedule": {**SMALL_SCHEDULE, **(schedule or {})},
    }


def run_of_several(corpus, lr_init, **train):
    """Sections of a run of any number of processes: few numbers divide its seven sequences a step, and
    with a constant rate it may end sooner and go on."""
    return {
        "model": {**SMALL_MODEL, "ctx_len": 16},
        "data": {"train": str(corpus)},
        "train": {"run_dir": "run", "batch_size": 7, "threads": 1, "log_every_steps": 1, **train},
        "optimizer": {"clip_norm": 0.5},
        "schedule": {"kind": "constant", "lr_init": lr_init},
        "distributed": {"timeout_s": TIMEOUT_S},
    }


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def set_limits(limits):
    for which, bytes_ in limits:
        resource.setrlimit(which, (bytes_, bytes_))


def clock(offset):
    """Variables of a process whose wall clock is off; durations stay what they are."""
    if offset is None:
        return {}
    if not FAKE_TIME.exists():
        missing(f"{FAKE_TIME}; install Debian's libfaketime")
    return {"LD_PRELOAD": str(FAKE_TIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


class Ranks:
    """`rookery train` in several processes, under way. By rank, `limits` are their resource limits, and
    `clocks` how far their clocks are off, as "+1d"."""

    def __init__(self, folder, count, *options, limits=None, clocks=None):
        port = free_port()
        self.logs = [folder / f"rank_{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            with open(path, "wb") as log:
                self.processes.append(subprocess.Popen(
                    command_line("train", "--config", "run.toml",
                                 *(f"--set={option}" for option in options)),
                    cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                    preexec_fn=lambda rank=rank: set_limits((limits or {}).get(rank, ())),
                    env={**environment(), "RANK": str(rank), "WORLD_SIZE": str(count),
                         "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                         **clock(clocks[rank] if clocks else None)}))

    def wait(self):
        """Their exit codes."""
        end = time.monotonic() + DEADLINE_S
        try:
            return [process.wait(timeout=end - time.monotonic()) for process in self.processes]
        finally:
            self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, rank):
        return self.logs[rank].read_text(encoding="utf-8")


def read_safetensors(path):
    """{name: (dtype as written there, shape, bytes)}. Nobody's code but this, on purpose."""
    content = pathlib.Path(path).read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", content)
    data = content[8 + header_bytes :]
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()}


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def metrics(run_dir):
    lines = pathlib.Path(run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def checkpoints(run_dir):
    """Names in the folder of checkpoints, in order."""
    folder = pathlib.Path(run_dir, "checkpoints")
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def forget_manifest(checkpoint):
    """Makes a checkpoint one of a program that wrote no manifests: what is in it is believed."""
    checkpoint = pathlib.Path(checkpoint)
    (checkpoint / "manifest.json").unlink()
    trainer = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    del trainer["processes"]
    (checkpoint / "trainer.json").write_text(json.dumps(trainer), encoding="utf-8")


def flip_bit(path, at=-2):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
