"""Kills runs with SIGKILL at random instants, again and again, and holds what is left against runs that
nobody disturbed.

Run by scripts/torture.sh, which says what is checked, as: torture.py PATH_OF_ROOKERY [options].
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import support

# Linux ends what has lost its launcher at once; it only takes the machine's time to do so.
LAST_BREATH_S = 10
TOKEN = "ROOKERY_TORTURE"
STEPS = 240
STEPS_OF_RESTARTS = 4000
# So often that nearly every kill comes in a save, and so seldom that most do not: by turns.
SAVE_EVERY = (4, 30)
# Small steps: what one number of processes rounds otherwise than another does not grow.
LR_INIT = 1e-4
STAGES = (0, 1, 2)
# A case's numbers of processes, and how many stages of ZeRO its starts choose from: of one of each it
# ends bit for bit as if undisturbed. Stages add up the gradient's norm in different orders.
CASES = (((1,), 1), ((2,), 1), ((1, 2, 4), 3), ((4,), 1), ((4,), 3))
SHORT_CASES = CASES[:3]
TOLERANCE = 1e-5


class Failed(Exception):
    """What a run did that it must not do."""


def expect(right, *words):
    if not right:
        raise Failed(" ".join(map(str, words)))


def wait_for(condition, what, seconds=support.DEADLINE_S, pause_s=0.001):
    end = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < end, f"{what} did not come within {seconds} s")
        time.sleep(pause_s)


def processes_with(token):
    """Those that have the token in their environment; the dead have none."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and token in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def listening_sockets():
    """Inodes of the sockets of this machine that somebody listens at."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add(fields[9])
    return found


def sockets_of(processes):
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for file in pathlib.Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(file)):
                        found.add(match[1])
    return found


class Folder:
    """A run's folder, as it is at this moment."""

    def __init__(self, path):
        self.path = path

    def _names(self, prefix):
        with contextlib.suppress(OSError):
            return {name for name in os.listdir(self.path / "run/checkpoints")
                    if name.startswith(prefix)}
        return set()

    def saves(self):
        """Steps of the checkpoints that have their names."""
        return {int(name.removeprefix("step_")) for name in self._names("step_")}

    def newest(self):
        return max(self.saves(), default=0)

    def is_saving(self):
        return bool(self._names("partial_step_"))

    def losses(self):
        """By step."""
        with contextlib.suppress(OSError):
            text = (self.path / "run/metrics.jsonl").read_text(encoding="utf-8")
            # The last line may be in the middle of being written.
            rows = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
            return {row["step"]: row["loss"] for row in rows}
        return {}

    def last_start(self):
        """What the run wrote of its last start; no two are equal, for they have the time."""
        with contextlib.suppress(OSError):
            lines = (self.path / "run/starts.jsonl").read_text(encoding="utf-8").splitlines(True)
            if lines and lines[-1].endswith("\n"):
                return json.loads(lines[-1])
        return None

    def tensor_files(self, step):
        folder = self.path / f"run/checkpoints/step_{step:08}"
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    def check_newest_is_whole(self):
        step = self.newest()
        if step == 0:
            return
        folder = self.path / f"run/checkpoints/step_{step:08}"
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for file in manifest["files"]:
            size = (folder / file["name"]).stat().st_size
            expect(size == file["bytes"], f"{folder / file['name']}: {size} bytes, its manifest says",
                   file["bytes"])


class Launch:
    """`rookery train --nproc` under way in a folder."""

    counter = itertools.count(1)

    def __init__(self, folder, count, stage, *options):
        number = next(self.counter)
        self.lock_path = folder / "run/lock"
        self.token = f"{TOKEN}={os.getpid()}.{number}".encode() + b"\0"
        self.log_path = folder / f"launch_{number:03}.log"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                support.command_line("train", "--config", "run.toml", "--nproc", count,
                                     "--set", f"distributed.zero={stage}", *options),
                cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                env={**support.environment(), TOKEN: self.token[len(TOKEN) + 1:-1].decode()})
        self.sockets = set()

    def log(self):
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def ended(self):
        return self.process.poll() is not None

    def ranks(self):
        with contextlib.suppress(OSError):
            children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            return list(map(int, children.read_text().split()))
        return []

    def resumes(self):
        return len(re.findall(r"going on from \S*/step_\d+", self.log()))

    def restarts(self):
        return len(re.findall(r"restart \d+ of \d+ from", self.log()))

    def note_sockets(self):
        self.sockets |= sockets_of(self.ranks())

    def kill_launcher(self):
        self.process.kill()
        self.process.wait()

    def kill_all(self):
        # A launcher that is stopped does not start anew what dies under it.
        self.process.send_signal(signal.SIGSTOP)
        for rank in self.ranks():
            os.kill(rank, signal.SIGKILL)
        self.kill_launcher()

    def is_unlocked(self):
        with contextlib.suppress(FileNotFoundError), open(self.lock_path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def check_nothing_is_left(self):
        expect(self.ended(), "the launcher runs")
        wait_for(lambda: not processes_with(self.token),
                 f"the end of the processes {processes_with(self.token)}, without their launcher",
                 LAST_BREATH_S, 0.01)
        # One that is dying has no environment any more, but its files still.
        wait_for(self.is_unlocked, "the end of who holds the run's lock", LAST_BREATH_S, 0.01)
        wait_for(lambda: not self.sockets & listening_sockets(),
                 "the end of the sockets that were listened at", LAST_BREATH_S, 0.01)


class Tally:
    """What the summary counts."""

    def __init__(self):
        self.kills = self.in_saves = self.restarts = 0
        self.resumes = self.equal = 0  # those that made a step


class Torture:
    def __init__(self, folder, seed):
        self.folder = folder
        self.seed = seed
        self.tally = Tally()
        self.undisturbed = {}
        support.write_text(folder / "text.txt", support.text_lines())
        support.rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", "text.txt",
                        cwd=folder)

    def make_folder(self, name, steps, save_every):
        path = self.folder / name
        path.mkdir()
        support.write_config(path / "run.toml", **support.run_of_several(
            self.folder / "corpus", LR_INIT, total_steps=steps, save_every_steps=save_every,
            keep_checkpoints=3))
        return Folder(path)

    def run_undisturbed(self, count, stage, **sizes):
        """The run of as many processes at this stage that nobody disturbs; made once."""
        key = (count, stage, *sizes.values())
        if key not in self.undisturbed:
            run = self.make_folder("undisturbed_" + "_".join(map(str, key)), **sizes)
            launch = Launch(run.path, count, stage)
            code = launch.process.wait(support.DEADLINE_S)
            expect(code == 0, f"the undisturbed run of {count} at stage {stage} ended with {code}:\n"
                   + launch.log())
            launch.check_nothing_is_left()
            self.undisturbed[key] = run
        return self.undisturbed[key]

    def case(self, number, counts, num_stages, kills):
        """One run from its beginning to its end, with so many kills between."""
        name = f"case_{number:02}"
        generator = random.Random(f"{self.seed}/{number}")
        stages = generator.sample(STAGES, num_stages)
        what = (f"--nproc {' or '.join(map(str, counts))}, distributed.zero = "
                + " or ".join(map(str, stages)))
        sizes = {"steps": STEPS, "save_every": SAVE_EVERY[number // len(CASES) % 2]}
        run = self.make_folder(name, **sizes)
        expected = self.run_undisturbed(counts[0], stages[0], **sizes)
        killer = Killer(self, run, expected, exact=len(counts) == len(stages) == 1,
                        generator=generator)
        try:
            killer.run(counts, stages, kills)
        finally:
            killer.end()
        print(f"{name}: {what}, a save every {sizes['save_every']} steps, {killer.kills} kills: "
              + "; ".join(killer.deeds), flush=True)
        shutil.rmtree(run.path)

    def restarts_in_a_row(self, count):
        """One launcher whose only rank is killed after its first save, again and again."""
        sizes = {"steps": STEPS_OF_RESTARTS, "save_every": STEPS_OF_RESTARTS}
        expected = self.run_undisturbed(1, 0, **sizes)
        run = self.make_folder("restarts", steps=STEPS_OF_RESTARTS, save_every=1)
        launch = Launch(run.path, 1, 0, "--max-restarts", count)
        begin = time.monotonic()
        try:
            for restart in range(1, count + 1):
                before = run.newest()
                wait_for(lambda: launch.ended() or (run.newest() > before and launch.ranks()),
                         "a newer checkpoint")
                expect(not launch.ended(), f"the launcher ended:\n{launch.log()}")
                os.kill(launch.ranks()[0], signal.SIGKILL)
                wait_for(lambda: launch.ended() or launch.restarts() == restart,
                         f"restart {restart}")
                self.tally.kills += 1
            before = run.newest()
            wait_for(lambda: launch.ended() or run.newest() > before, "a newer checkpoint")
            launch.process.terminate()
            code = launch.process.wait(support.DEADLINE_S)
            expect(code == 128 + signal.SIGTERM, f"the launcher ended with {code}:\n{launch.log()}")
            expect(launch.resumes() == count, f"of {count} starts went on", launch.resumes())
            launch.check_nothing_is_left()
            losses, whole = run.losses(), expected.losses()
            expect(losses == {step: whole[step] for step in losses}, "the losses are others")
            expect(sorted(losses) == list(range(1, len(losses) + 1)), "a step is missing")
            self.tally.restarts += count
            self.tally.resumes += count
            self.tally.equal += count
        finally:
            launch.kill_all()
        print(f"restarts: {count} in a row by one launcher, {len(losses)} steps, "
              f"{time.monotonic() - begin:.0f} s", flush=True)
        shutil.rmtree(run.path)


class Killer:
    """Brings a run to its end against its own doing."""

    def __init__(self, torture, run, expected, exact, generator):
        self.tally = torture.tally
        self.run_folder = run
        self.expected = expected.losses()
        self.expected_files = expected.tensor_files(STEPS)
        self.exact = exact
        self.random = generator
        self.launch = None
        self.launch_kills = 0   # of ranks of this launcher
        self.seen_start = None  # that check_steps() has looked at
        self.floor = 0          # the step that the next start may not go back behind
        self.kills = 0
        self.deeds = []

    def end(self):
        if self.launch is not None:
            self.launch.kill_all()

    def run(self, counts, stages, kills):
        count = None
        while self.kills < kills and not self.is_done():
            if self.launch is None or self.launch.ended():
                # Another number, if there is another.
                count = self.random.choice([n for n in counts if n != count] or counts)
                self.start(count, self.random.choice(stages))
            who = self.random.choice(("rank", "launcher", "all"))
            when = self.random.choice(("start", "step", "step", "save", "save", "rename"))
            if self.wait_until(when):
                self.kill(who, when, count)
        if self.launch.ended() and not self.is_done():
            self.start(count, self.random.choice(stages))
        self.launch.process.wait(support.DEADLINE_S)
        expect(self.is_done(), f"the launcher ended with {self.launch.process.returncode}")
        self.launch.check_nothing_is_left()
        self.check_steps()
        expect(len(self.run_folder.losses()) == STEPS, "steps are missing in metrics.jsonl")
        expect(not self.run_folder.is_saving(), "a partial checkpoint is left")
        if self.exact:
            expect(self.run_folder.tensor_files(STEPS) == self.expected_files,
                   "the files of the last checkpoint are not those of the undisturbed run")

    def is_done(self):
        return self.launch is not None and self.launch.process.poll() == 0

    def start(self, count, stage):
        if self.launch is not None:
            self.tally.restarts += 1
        self.launch = Launch(self.run_folder.path, count, stage, "--max-restarts", 1000)
        self.launch_kills = 0

    def wait_until(self, when):
        """The moment to kill in; False if the run has come to its end before."""
        run, launch = self.run_folder, self.launch
        if when == "start":
            moment = time.monotonic() + self.random.uniform(0, 1.5)
            wait_for(lambda: launch.ended() or time.monotonic() > moment, "the moment")
        elif when == "step":
            more = self.random.randrange(1, 20)
            wait_for(lambda: launch.ended() or self.has_made(more), f"{more} steps")
            launch.note_sockets()
            time.sleep(self.random.uniform(0, 0.03))
        else:
            for _ in range(self.random.randrange(1, 4)):
                before = run.saves()
                wait_for(lambda b=before: launch.ended() or run.saves() - b, "a checkpoint", pause_s=0)
            if when == "save":
                wait_for(lambda: launch.ended() or run.is_saving(), "a save", pause_s=0)
                time.sleep(self.random.uniform(0, 0.01))
        expect(not launch.ended() or self.is_done(),
               f"the launcher ended with {launch.process.returncode} of itself")
        return not self.is_done()

    def has_made(self, more):
        """Whether the start under way has made so many steps."""
        start = self.run_folder.last_start()
        return (start is not None and start != self.seen_start
                and max(self.run_folder.losses(), default=0) >= start["step"] + more)

    def kill(self, who, when, count):
        launch, run = self.launch, self.run_folder
        ranks = launch.ranks()
        # Looked at before: what is saved in between only adds to it.
        floor, saving = run.newest(), run.is_saving()
        if who == "rank" and ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(ranks), signal.SIGKILL)
            self.launch_kills += 1
            wait_for(lambda: launch.ended() or launch.restarts() == self.launch_kills,
                     "a restart, or the end of the launcher")
            if not launch.ended():
                self.tally.restarts += 1
            elif not self.is_done():
                expect("given up: 2 restarts in a row" in launch.log(),
                       f"the launcher ended with {launch.process.returncode}")
        else:
            if who == "launcher":
                launch.kill_launcher()
            else:
                who = "all"
                launch.kill_all()
            launch.check_nothing_is_left()
            run.check_newest_is_whole()
            saving = saving or run.is_saving()
        self.kills += 1
        self.tally.kills += 1
        self.tally.in_saves += saving
        self.deeds.append(f"{who} of {count} at {'save' if saving else when}")
        expect(run.newest() >= floor, f"step {floor} was saved, the newest is now {run.newest()}")
        self.check_steps()
        self.floor = floor

    def check_steps(self):
        """Holds what the last start did against the undisturbed run."""
        start, losses = self.run_folder.last_start(), self.run_folder.losses()
        expect("is not whole" not in self.launch.log(), "a checkpoint was refused")
        for step, loss in losses.items():
            expected = self.expected[step]
            expect(loss == expected if self.exact else abs(loss - expected) <= TOLERANCE,
                   f"step {step}: loss {loss!r}, of the undisturbed run {expected!r}")
        expect(sorted(losses) == list(range(1, len(losses) + 1)), "steps are missing:", sorted(losses))
        if start is None or start == self.seen_start:
            return
        self.seen_start = start
        expect(start["step"] >= self.floor,
               f"step {self.floor} was saved, the next start began after {start['step']}")
        if 0 < start["step"] < len(losses):
            self.tally.resumes += 1
            self.tally.equal += self.exact


def main():
    parser = argparse.ArgumentParser(prog="scripts/torture.sh")
    parser.add_argument("program")
    parser.add_argument("--short", action="store_true", help="under a minute: 9 kills, 3 restarts")
    parser.add_argument("--kills", type=int, help="how often a run is killed, default 200")
    parser.add_argument("--restarts", type=int, help="of one launcher, in a row, default 100")
    parser.add_argument("--seed", type=int, help="repeats what a seed did, as far as time lets")
    options = parser.parse_args()
    kills = options.kills if options.kills is not None else 9 if options.short else 200
    restarts = options.restarts if options.restarts is not None else 3 if options.short else 100
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    cases = SHORT_CASES if options.short else CASES
    support.use_program(options.program)
    print(f"torture: seed {seed}", flush=True)
    begin = time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="rookery_torture_"))
    torture = Torture(folder, seed)
    tally = torture.tally
    try:
        for number in itertools.count():
            if tally.kills >= kills:
                break
            torture.case(number, *cases[number % len(cases)],
                         min(kills - tally.kills, 3 if options.short else 10))
        if restarts > 0:
            torture.restarts_in_a_row(restarts)
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"torture: FAILED: {error}\n--seed {seed} begins the same; what it left is in {folder}",
              file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"torture: {tally.kills} kills, {tally.in_saves} of them in a save; {tally.restarts} "
          f"restarts; {tally.resumes} resumes made steps, {tally.equal} bit for bit, the others of "
          f"another number of processes or stage to {TOLERANCE}; nothing lost but steps since a save, nothing "
          f"left running; {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
