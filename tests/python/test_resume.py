"""A run that was killed and started again is the run that was not: same losses, same files.

Run by ctest as: test_resume.py PATH_OF_ROOKERY.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time
import unittest

import support
from support import rookery

# Beyond the time any wait takes, by far; a program that hangs must not hang the tests.
DEADLINE_S = 120


def is_saving(run_dir):
    return any(name.startswith("partial_") for name in support.checkpoints(run_dir))


def lines_written(run_dir):
    try:
        return pathlib.Path(run_dir, "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


class Process:
    """`rookery train`, under way."""

    def __init__(self, folder):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            support.command_line("train", "--config", "run.toml"), cwd=folder,
            env=support.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self.log)

    def wait_until(self, condition):
        """Waits for `condition` and stops the process while it holds (SIGSTOP)."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if condition():
                self.process.send_signal(signal.SIGSTOP)
                # It may have gone on before the signal came.
                if condition():
                    return
                self.process.send_signal(signal.SIGCONT)
        raise AssertionError("the moment to kill the run never came:\n" + self.kill())

    def kill(self):
        """Kills it and returns its log."""
        self.process.kill()
        self.process.wait()
        with self.log:
            self.log.seek(0)
            return self.log.read().decode()


class Resume(unittest.TestCase):
    def make_run(self, data=None, **train):
        """Two folders with the same corpus and configuration."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        whole, killed = pathlib.Path(folder.name, "whole"), pathlib.Path(folder.name, "killed")
        for where in (whole, killed):
            where.mkdir()
            support.write_text(where / "text.txt", support.text_lines(400))
            rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt", cwd=where)
            # The same relative run_dir: the configuration, too, lies in the checkpoints.
            support.write_config(where / "run.toml", **support.small_run(
                {"train": "text", **(data or {})}, log_every_steps=1, **train))
        rookery("train", "--config", "run.toml", cwd=whole)
        return whole, killed

    def assert_same_run(self, whole, killed):
        keys = ("step", "tokens", "loss", "grad_norm", "lr", "validation_loss")
        runs = [[{key: row.get(key) for key in keys} for row in support.metrics(where / "run")]
                for where in (whole, killed)]
        self.assertEqual(runs[0], runs[1])
        names = support.checkpoints(whole / "run")
        self.assertEqual(support.checkpoints(killed / "run"), names)
        for name in names:
            for file in ("model.safetensors", "optimizer.safetensors", "config.toml"):
                contents = [(where / "run/checkpoints" / name / file).read_bytes()
                            for where in (whole, killed)]
                self.assertEqual(contents[0] == contents[1], True, f"{name}/{file} differs")
            # The time that it took is another.
            progress = [json.loads((where / "run/checkpoints" / name / "trainer.json").read_text())
                        for where in (whole, killed)]
            self.assertGreater(min(row.pop("elapsed_s") for row in progress), 0)
            self.assertEqual(progress[0], progress[1])

    def assert_whole(self, run):
        """Every checkpoint that has its name has its files."""
        for name in support.checkpoints(run):
            if name.startswith("step_"):
                folder = run / "checkpoints" / name
                files = json.loads((folder / "manifest.json").read_text())["files"]
                self.assertEqual({file["name"]: file["bytes"] for file in files},
                                 {path.name: path.stat().st_size for path in folder.iterdir()
                                  if path.name != "manifest.json"})

    def kill_at(self, folder, condition):
        process = Process(folder)
        process.wait_until(condition)
        process.kill()

    def test_killed_three_times_it_ends_bit_for_bit_as_without(self):
        whole, killed = self.make_run(total_steps=200, save_every_steps=15)
        self.assertEqual(len(support.metrics(whole / "run")), 200)
        run = killed / "run"
        generator = random.Random(5)
        # Before the first save; within a save; anywhere after that.
        early, late = generator.randrange(2, 14), generator.randrange(100, 150)
        self.kill_at(killed, lambda: lines_written(run) >= early)
        self.assertEqual(support.checkpoints(run), [])
        self.kill_at(killed, lambda: is_saving(run) and lines_written(run) >= 40)
        self.assertTrue(is_saving(run))
        self.kill_at(killed, lambda: lines_written(run) >= late)
        left = support.checkpoints(run)
        self.assertTrue(left and left[-1] < "step_00000200", left)
        done = support.run("train", "--config", "run.toml", cwd=killed)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertIn(f"going on from run/checkpoints/{left[-1]}", done.stderr.decode())
        self.assert_same_run(whole, killed)
        # One event file a start; their names hold the time.
        left = [{name for name in support.listing(where) if "tfevents" not in name}
                for where in (whole, killed)]
        self.assertEqual(left[1], left[0], "killed runs leave nothing behind")

    def test_killed_while_saving_again_and_again_it_still_ends_the_same(self):
        whole, killed = self.make_run(total_steps=24, save_every_steps=4, keep_checkpoints=1)
        run = killed / "run"
        for step in (4, 8, 8, 12):
            self.kill_at(killed, lambda s=step: is_saving(run) and lines_written(run) >= s)
            self.assert_whole(run)
        rookery("train", "--config", "run.toml", cwd=killed)
        self.assert_same_run(whole, killed)

    def test_in_bf16_with_micro_batches_and_a_validation_it_ends_the_same(self):
        whole, killed = self.make_run({"validation": "text"}, total_steps=60,
                                      save_every_steps=9, dtype="bf16", micro_batch_size=4,
                                      validate_every_steps=5, validation_tokens=320)
        run = killed / "run"
        self.kill_at(killed, lambda: lines_written(run) >= 23)
        rookery("train", "--config", "run.toml", cwd=killed)
        self.assert_same_run(whole, killed)

    def test_a_run_that_is_done_says_so_and_changes_nothing(self):
        whole, _ = self.make_run(total_steps=5)
        before = support.listing(whole)
        done = support.run("train", "--config", "run.toml", cwd=whole)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertIn("run: nothing to do after step 5: train.total_steps = 5 is reached", done.stderr.decode())
        self.assertEqual(support.listing(whole), before)

    def test_a_damaged_checkpoint_is_passed_over_and_it_ends_the_same(self):
        whole, killed = self.make_run(total_steps=60, save_every_steps=10)
        run = killed / "run"
        self.kill_at(killed, lambda: "step_00000030" in support.checkpoints(run) and
                     "step_00000020" in support.checkpoints(run))
        left = [name for name in support.checkpoints(run) if name.startswith("step_")]
        for file in ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.toml"):
            with self.subTest(file):
                support.flip_bit(run / "checkpoints" / left[-1] / file, 20)
                done = support.run("train", "--config", "run.toml", "--set",
                                   f"train.total_steps={1 + int(left[-1][5:])}", cwd=killed)
                self.assertEqual(done.returncode, 2, "another total is refused, but only then")
                log = done.stderr.decode()
                self.assertRegex(log, rf"{left[-1]}/{file}: checksum \w{{32}}, but manifest.json "
                                      r"lists \w{32}.*an older one is taken")
                support.flip_bit(run / "checkpoints" / left[-1] / file, 20)
        support.flip_bit(run / "checkpoints" / left[-1] / "model.safetensors")
        done = support.run("train", "--config", "run.toml", cwd=killed)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual(done.stderr.decode().count("an older one is taken"), 1)
        self.assertIn(f"going on from run/checkpoints/{left[-2]}", done.stderr.decode())
        self.assert_same_run(whole, killed)

    def test_a_checkpoint_that_was_touched_gives_another_run(self):
        # That the comparisons above can fail: one bit of one moment.
        whole, killed = self.make_run(total_steps=60, save_every_steps=30)
        run = killed / "run"
        self.kill_at(killed, lambda: "step_00000030" in support.checkpoints(run))
        support.flip_bit(run / "checkpoints/step_00000030/optimizer.safetensors")
        support.forget_manifest(run / "checkpoints/step_00000030")
        rookery("train", "--config", "run.toml", cwd=killed)
        with self.assertRaises(AssertionError):
            self.assert_same_run(whole, killed)


if __name__ == "__main__":
    support.main()
