"""What a machine does to a run: a full disk, a limit on files, a read-only folder, a file that shrinks,
no memory, a kill. Each time one message that names the file and says what to do, exit code 1, nothing
half-written under a final name, and all that was there before as it was.

Run by ctest as: test_faults.py PATH_OF_ROOKERY. What mounts asks for root, and skips without, but in CI.
"""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import support
from support import rookery

FAILED = 1
PAGE = 4096


def setUpModule():
    """A corpus, a model, and text: what the commands read."""
    global base
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    base = pathlib.Path(folder.name)
    support.write_text(base / "text.txt", support.text_lines(20000))
    rookery("tokenize", "--tokenizer", "bytes", "--output", "bytes", "text.txt", cwd=base)
    support.write_config(base / "run.toml", **support.small_run(
        {"train": str(base / "bytes")}, total_steps=6, save_every_steps=2, log_every_steps=1))
    rookery("train", "--config", "run.toml", "--set", "train.run_dir=model", cwd=base)
    rookery("convert", "model", "model.pth", cwd=base)


def start(*arguments, limits=(), **options):
    """The program, started with limits such as (resource.RLIMIT_FSIZE, bytes)."""
    def set_limits():
        for what, value in limits:
            resource.setrlimit(what, (value, value))
    return subprocess.Popen(support.command_line(*arguments), cwd=base, env=support.environment(),
                            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            preexec_fn=set_limits, **{"stdout": subprocess.PIPE, **options})


class Faults(support.Folder):
    def fails(self, program, *words):
        """`program` ends with exit code 1 and one message with all of `words` in it."""
        try:
            stderr = program.communicate(timeout=300)[1]
        finally:
            program.kill()
        message = support.error_message(stderr)
        self.assertEqual(program.returncode, FAILED, stderr.decode(errors="replace"))
        self.assertEqual(message.count("rookery: "), 1, message)
        for word in words:
            self.assertIn(word, message)
        for trace in ("filesystem error", "Exception", "terminate", "a bug in", "basic_ios"):
            self.assertNotIn(trace, message)

    def wait_until(self, condition, program):
        """Waits for something that `program` does on its way."""
        deadline = time.monotonic() + 120
        while not condition():
            self.assertIsNone(program.poll(), "the program ended too soon")
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    @contextlib.contextmanager
    def disk(self, free_bytes):
        """A disk of its own with this much room."""
        folder = self.folder / "disk"
        folder.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={free_bytes // 1024}k", "tmpfs",
                               folder], capture_output=True, check=False)
        if made.returncode != 0:
            support.missing(f"the right to mount a tmpfs: {made.stderr.decode().strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)

    @staticmethod
    def remount(folder, options):
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


# What each command writes where: its arguments, with OUT for the folder, and the file it names.
WRITERS = {
    "tokenize": ("tokenize --tokenizer bytes --output OUT/a text.txt", "OUT/a.bin"),
    "tokenizer": ("tokenizer train --input text.txt --output OUT/a.model --vocab-size 320",
                  "OUT/a.model"),
    "convert to .pth": ("convert model OUT/a.pth", "OUT/a.pth"),
    "convert to .safetensors": ("convert model.pth OUT/a.safetensors", "OUT/a.safetensors"),
    "logits": ("logits --model model --tokens 1,2,3,4,5,6,7,8,9,10,11,12 --all --output "
               "OUT/a.safetensors", "OUT/a.safetensors"),
    "report": ("report model --output OUT/a.html", "OUT/a.html"),
    "train": ("train --config run.toml --set train.run_dir=OUT/run", "OUT/run/"),
}


def command_of(name, out):
    command, named = WRITERS[name]
    return command.replace("OUT", str(out)).split(), named.replace("OUT", str(out))


class FullDisk(Faults):
    def test_stops_every_command_and_leaves_nothing(self):
        for name in WRITERS:
            with self.subTest(name), self.disk(PAGE) as disk:
                arguments, named = command_of(name, disk)
                self.fails(start(*arguments), named, "disk", "full")
                files = [path for path in disk.rglob("*") if path.is_file()]
                for path in files:
                    self.assertNotRegex(path.name, r"partial|^a\.")
                self.assertEqual([path for path in files if path.parent.name.startswith("step_")], [])

    def test_leaves_an_older_corpus_as_it_was(self):
        support.write_text(base / "short.txt", ["A line."])
        with self.disk(64 * PAGE) as disk:
            rookery("tokenize", "--tokenizer", "bytes", "--output", disk / "a", base / "short.txt")
            before = support.listing(disk)
            self.fails(start(*command_of("tokenize", disk)[0]), "a.bin", "disk", "full")
            self.assertEqual(support.listing(disk), before)

    def test_names_whichever_file_of_a_run_met_it(self):
        named = set()
        for pages in (1, 2, 4, 5, 6, 7, 100, 150):
            with self.subTest(pages=pages), self.disk(pages * PAGE) as disk:
                program = start("train", "--config", "run.toml", "--set",
                                f"train.run_dir={disk}/run")
                stderr = program.communicate(timeout=300)[1]
                message = support.error_message(stderr)
                self.assertEqual(program.returncode, FAILED, message)
                self.assertRegex(message, "the disk( is)? full")
                named.add(message.split("/run/")[1].split(":")[0])
        self.assertLessEqual(
            {"config.toml", "metrics.jsonl", "starts.jsonl", "checkpoints"}, named)

    def test_ends_a_run_that_goes_on_once_there_is_room(self):
        rookery("train", "--config", "run.toml", "--set", f"train.run_dir={self.folder}/whole",
                cwd=base)
        checkpoint_bytes = sum(path.stat().st_size for path in
                               (self.folder / "whole/checkpoints/step_00000006").iterdir())
        # Room for one checkpoint and a half, and for the other files of the run.
        with self.disk(checkpoint_bytes * 3 // 2 + 48 * 1024) as disk:
            train = ["train", "--config", "run.toml", "--set", f"train.run_dir={disk}/run"]
            self.fails(start(*train), str(disk / "run/"), "disk", "full")
            self.assertEqual(support.checkpoints(disk / "run"), ["step_00000002"])
            self.remount(disk, "size=8m")
            rookery(*train, cwd=base)
            self.assertEqual(support.metrics(disk / "run")[-1]["step"], 6)
            for name in ("model", "optimizer"):
                part = f"checkpoints/step_00000006/{name}.safetensors"
                self.assertEqual(support.read_safetensors(disk / "run" / part),
                                 support.read_safetensors(self.folder / "whole" / part))

    def test_is_seen_on_standard_output(self):
        for command in ("--help", "--version", "train --help",
                        "train --config run.toml --print-config",
                        "eval --model model --data bytes --ctx-len 4096",
                        "generate --model model --tokenizer bytes --prompt a --length 5",
                        "logits --model model --tokens 1,2,3", "inspect model",
                        "inspect --json model.pth"):
            with self.subTest(command), open("/dev/full", "wb") as full:
                self.fails(start(*command.split(), stdout=full), "standard output", "disk full")


class FileLimit(Faults):
    def test_is_an_error_like_a_full_disk(self):
        for name in WRITERS:
            with self.subTest(name):
                out = self.folder / name.replace(" ", "_")
                out.mkdir()
                arguments, named = command_of(name, out)
                # Less for those whose file is small.
                limit = 1024 if name in ("tokenizer", "logits", "report") else 8 * PAGE
                self.fails(start(*arguments, limits=[(resource.RLIMIT_FSIZE, limit)]),
                           named, "File too large", "ulimit -f")
                for path in out.rglob("*"):
                    self.assertNotRegex(path.name, r"partial|^a\.|^step_")


    def test_in_a_save_ends_the_run_and_leaves_the_checkpoint_before(self):
        train = ["train", "--config", "run.toml", "--set", f"train.run_dir={self.folder}/run"]
        rookery(*train, "--set", "train.total_steps=2", "--set", "schedule.kind=constant", cwd=base)
        before = support.listing(self.folder / "run/checkpoints")
        sizes = {name: len(before[f"step_00000002/{name}.safetensors"])
                 for name in ("model", "optimizer")}
        for name, limit in (("model", sizes["model"] - PAGE), ("optimizer", sizes["model"] + PAGE)):
            with self.subTest(name):
                # The first save is written while the steps after it are made.
                program = start(*train, "--set", "schedule.kind=constant", "--set",
                                "train.total_steps=100000",
                                limits=[(resource.RLIMIT_FSIZE, limit)])
                self.fails(program, f"partial_step_00000004/{name}.safetensors: ", "File too large")
                self.assertEqual(support.listing(self.folder / "run/checkpoints"), before)


class ReadOnlyFolder(Faults):
    def test_is_named_with_the_reason(self):
        for name in WRITERS:
            with self.subTest(name), self.disk(1 << 20) as disk:
                self.remount(disk, "ro")
                arguments, named = command_of(name, disk)
                self.fails(start(*arguments), named.rstrip("/"), "Read-only file system")

    def test_ends_a_run_and_leaves_its_checkpoints(self):
        with self.disk(8 << 20) as disk:
            train = ["train", "--config", "run.toml", "--set", f"train.run_dir={disk}/run"]
            rookery(*train, "--set", "train.total_steps=2", cwd=base)
            before = support.listing(disk)
            self.remount(disk, "ro")
            self.fails(start(*train), str(disk / "run"), "Read-only file system")
            self.assertEqual(support.listing(disk), before)


class SeveralProcesses(Faults):
    """Two that train together, and have saved step 4."""

    def setUp(self):
        super().setUp()
        support.write_config(self.folder / "run.toml", **support.run_of_several(
            base / "bytes", lr_init=3e-3, total_steps=100_000, save_every_steps=4))

    def ranks(self, run, *options):
        ranks = support.Ranks(self.folder, 2, f"train.run_dir={run}", *options)
        return ranks.wait(), [ranks.text(rank) for rank in range(2)]

    def launch(self, run, *options):
        done = support.run("train", "--config", "run.toml", "--nproc", 2, "--set",
                           f"train.run_dir={run}", *options, cwd=self.folder)
        return done.returncode, done.stderr.decode()

    def save(self, run):
        codes, said = self.ranks(run, "train.total_steps=4")
        self.assertEqual(codes, [0, 0], said)
        return support.listing(run / "checkpoints")

    def test_end_where_the_disk_is_full_and_are_not_started_again(self):
        self.save(self.folder / "whole")
        checkpoint = self.folder / "whole/checkpoints/step_00000004"
        checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        # For one and a half, and for the other files of the run.
        with self.disk(checkpoint_bytes * 3 // 2 + 64 * 1024) as disk:
            saved = self.save(disk / "run")
            codes, said = self.ranks(disk / "run")
            self.assertEqual(codes, [FAILED] * 2, said)
            for text in said:
                self.assertRegex(text, f"{disk}/run/checkpoints: .*the disk is full")
            code, said = self.launch(disk / "run")
            self.assertEqual(code, FAILED, said)
            self.assertRegex(said, "not started again, for nothing could be saved: .*disk is full")
            self.assertNotIn("restart 1 of", said)
            self.assertEqual(support.listing(disk / "run/checkpoints"), saved)
            self.remount(disk, "size=8m")
            code, said = self.launch(disk / "run", "--set", "train.total_steps=8")
            self.assertEqual(code, 0, said)
            self.assertIn("step_00000008", support.checkpoints(disk / "run"))

    def test_leave_nothing_of_a_save_that_the_disk_has_no_room_for_after_all(self):
        with self.disk(8 << 20) as disk:
            saved = self.save(disk / "run")
            # Room for the bytes, but not for all of its files: they are written when that is found.
            status = os.statvfs(disk)
            self.remount(disk, f"nr_inodes={status.f_files - status.f_ffree + 4}")
            codes, said = self.ranks(disk / "run")
            self.assertEqual(codes, [FAILED] * 2, said)
            for text in said:
                self.assertRegex(text, r"partial_step_00000008/\S+: .*the disk is full")
            self.assertEqual(support.listing(disk / "run/checkpoints"), saved)

    def test_end_where_the_folder_is_read_only(self):
        with self.disk(8 << 20) as disk:
            self.save(disk / "run")
            before = support.listing(disk)
            self.remount(disk, "ro")
            codes, said = self.ranks(disk / "run")
            self.assertEqual(codes, [FAILED] * 2, said)
            # Before the first listens, and so the other can only say that it does not.
            self.assertIn("Read-only file system", said[0])
            self.assertIn("rank 1 of 2: the others cannot be reached", said[1])
            code, said = self.launch(disk / "run")
            self.assertEqual(code, FAILED, said)
            self.assertIn("Read-only file system", said)
            self.assertNotIn("restart 1 of", said)
            self.assertEqual(support.listing(disk), before)


class ShrinkingFile(Faults):
    def maps(self, program, name):
        with contextlib.suppress(OSError):
            return name in pathlib.Path(f"/proc/{program.pid}/maps").read_text(encoding="utf-8")
        return False

    def cut_while(self, program, ready):
        """Cuts the corpus to a page once `ready`; the program says so."""
        self.wait_until(lambda: ready(program), program)
        whole = (self.folder / "cut.bin").stat().st_size
        os.truncate(self.folder / "cut.bin", PAGE)
        self.fails(program, f"{self.folder}/cut.bin: became shorter while it was being read: "
                   f"{PAGE} bytes, but {whole} when it was opened", "start again")

    def setUp(self):
        super().setUp()
        for ending in ("bin", "idx", "tokenizer.json"):
            shutil.copy(base / f"bytes.{ending}", self.folder / f"cut.{ending}")

    def test_ends_a_training_with_a_message_and_keeps_its_checkpoints(self):
        run = self.folder / "run"
        train = ["train", "--config", "run.toml", "--set", f"data.train={self.folder}/cut",
                 "--set", f"train.run_dir={run}", "--set", "train.total_steps=100000"]
        self.cut_while(start(*train), lambda _: any(name.startswith("step_")
                                                    for name in support.checkpoints(run)))
        shutil.copy(base / "bytes.bin", self.folder / "cut.bin")
        kept = support.checkpoints(run)[-1]
        program = start(*train)
        self.wait_until(lambda: support.checkpoints(run)[-1] > kept, program)
        program.kill()
        program.communicate()

    def test_ends_an_evaluation_with_a_message(self):
        program = start("eval", "--model", "model", "--data", self.folder / "cut")
        self.cut_while(program, lambda p: self.maps(p, "cut.bin"))


class Memory(Faults):
    def test_that_is_not_there_gets_the_keys_that_save_it(self):
        # 40 GB of logits, where 8 GB of addresses are allowed (LibTorch itself takes 2).
        program = start("train", "--config", "run.toml", "--set", f"train.run_dir={self.folder}/run",
                        "--set", "model.ctx_len=4096", "--set", "train.batch_size=10000",
                        limits=[(resource.RLIMIT_AS, 8 << 30)])
        self.fails(program, "out of memory", "train.micro_batch_size", "model.ctx_len")
        self.assertEqual(support.checkpoints(self.folder / "run"), [])


class Kill(Faults):
    def test_leaves_what_the_next_writer_takes_over(self):
        # A text that does not end, as far as the program can see.
        support.write_text(self.folder / "long.txt", ["some text"] * 4_000_000)
        tokenize = ["tokenize", "--tokenizer", "bytes", "--output", self.folder / "a"]
        partial = self.folder / "a.bin.partial"
        program = start(*tokenize, self.folder / "long.txt")
        self.wait_until(lambda: partial.exists() and partial.stat().st_size > 0, program)
        second = start(*tokenize, "text.txt")
        self.fails(second, "a.bin: is being written by another program")
        program.send_signal(signal.SIGKILL)
        program.communicate()
        self.assertTrue(partial.exists())
        rookery(*tokenize, "text.txt", cwd=base)
        self.assertEqual(sorted(os.listdir(self.folder)),
                         ["a.bin", "a.idx", "a.tokenizer.json", "long.txt"])
        self.assertEqual((self.folder / "a.bin").read_bytes(), (base / "bytes.bin").read_bytes())


if __name__ == "__main__":
    support.main()
