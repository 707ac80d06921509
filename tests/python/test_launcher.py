"""The launcher of the program whole, `rookery train --nproc`, with one rank: what it starts, stops and
starts again. What it does with several is in tests/train/distributed/test_launcher.cpp.

Run by ctest as: test_launcher.py PATH_OF_ROOKERY.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import time
import unittest

import support
from support import rookery

DEADLINE_S = 120
LONG = {"total_steps": 1_000_000, "log_every_steps": 1, "save_every_steps": 20}


class Launcher(support.Folder):
    def setUp(self):
        super().setUp()
        support.write_text(self.folder / "text.txt", support.text_lines())
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=self.folder)

    def configure(self, **train):
        support.write_config(self.folder / "run.toml", **support.small_run(
            {"train": "text", "tokenizer": "bytes"}, **train))

    def train(self, *options):
        return support.run("train", "--config", "run.toml", *options, cwd=self.folder)

    def start(self, *options):
        process = subprocess.Popen(
            support.command_line("train", "--config", "run.toml", "--nproc", "1", *options),
            cwd=self.folder, env=support.environment(), stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def wait_for(self, condition):
        end = time.monotonic() + DEADLINE_S
        while not condition():
            self.assertLess(time.monotonic(), end, "it never came to that")
            time.sleep(0.01)

    def wait_for_steps(self, count):
        path = self.folder / "run/metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)

    def starts(self):
        lines = (self.folder / "run/starts.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def rank_of(self, launcher):
        """Process number of the one child that a launcher has."""
        path = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        self.wait_for(lambda: path.read_text().split())
        return int(path.read_text().split()[0])

    def has_ended(self, process):
        stat = pathlib.Path(f"/proc/{process}/stat")
        return not stat.exists() or ") Z " in stat.read_text()

    def newest_step(self):
        return max((int(name[5:]) for name in support.checkpoints(self.folder / "run")
                    if name.startswith("step_")), default=0)

    def test_a_launched_run_has_the_bits_of_one_that_is_not(self):
        self.configure(total_steps=20)
        plain = self.train("--set", "train.run_dir=plain")
        launched = self.train("--nproc=1", "--set", "train.run_dir=launched")
        self.assertEqual((plain.returncode, launched.returncode), (0, 0), launched.stderr.decode())
        self.assertEqual(launched.stdout, plain.stdout)
        contents = [support.read_safetensors(
            self.folder / name / "checkpoints/step_00000020/model.safetensors")
            for name in ("plain", "launched")]
        self.assertTrue(contents[0] == contents[1])
        for line in launched.stderr.decode().splitlines():
            self.assertTrue(line.startswith("[0] "), line)

    def test_the_launcher_has_no_libtorch_in_it(self):
        self.configure(**LONG)
        launcher = self.start()
        self.wait_for_steps(1)
        maps = {process: pathlib.Path(f"/proc/{process}/maps").read_text()
                for process in (launcher.pid, self.rank_of(launcher))}
        self.assertNotIn("torch", maps.pop(launcher.pid))
        self.assertIn("libtorch_cpu", maps.popitem()[1])

    def test_sigterm_saves_and_ends_with_143(self):
        self.configure(**LONG)
        launcher = self.start()
        self.wait_for_steps(3)
        launcher.terminate()
        log = launcher.communicate(timeout=DEADLINE_S)[1].decode()
        self.assertEqual(launcher.returncode, 143, log)
        self.assertIn("SIGTERM asked to stop", log)
        last = support.checkpoints(self.folder / "run")[-1]
        self.assertEqual(int(last.removeprefix("step_")),
                         support.metrics(self.folder / "run")[-1]["step"])

    def test_sigterm_to_the_rank_ends_all_with_143(self):
        self.configure(**LONG)
        launcher = self.start()
        self.wait_for_steps(3)
        os.kill(self.rank_of(launcher), signal.SIGTERM)
        log = launcher.communicate(timeout=DEADLINE_S)[1].decode()
        self.assertEqual(launcher.returncode, 143, log)
        self.assertIn("rank 0 was asked to stop by SIGTERM", log)
        self.assertEqual(len(self.starts()), 1)

    def test_a_killed_rank_is_started_again_from_its_newest_checkpoint(self):
        self.configure(**LONG)
        launcher = self.start()
        # Saves are finished in the background.
        self.wait_for(lambda: self.newest_step() >= 20)
        saved = self.newest_step()
        os.kill(self.rank_of(launcher), signal.SIGKILL)
        self.wait_for(lambda: len(self.starts()) == 2)
        count = len(support.metrics(self.folder / "run"))
        self.wait_for_steps(count + 3)
        launcher.terminate()
        log = launcher.communicate(timeout=DEADLINE_S)[1].decode()
        self.assertEqual(launcher.returncode, 143, log)
        self.assertRegex(log, r"rank 0 \(process \d+\) was killed by SIGKILL")
        restart = re.search(r"restart 1 of 3 from the newest checkpoint, run/checkpoints/step_(\d+)",
                            log)
        self.assertIsNotNone(restart, log)
        first, again = self.starts()
        self.assertEqual((first, again), (0, int(restart[1])))
        self.assertGreaterEqual(again, saved)

    def test_a_rank_does_not_outlive_a_killed_launcher(self):
        self.configure(**LONG)
        launcher = self.start()
        self.wait_for_steps(1)
        rank = self.rank_of(launcher)
        launcher.kill()
        self.wait_for(lambda: self.has_ended(rank))
        # Nobody holds its folder.
        self.configure(total_steps=25)
        done = self.train()
        self.assertEqual(done.returncode, 0, done.stderr.decode())

    def test_a_second_launcher_in_the_folder_is_refused(self):
        self.configure(**LONG)
        launcher = self.start()
        self.wait_for_steps(1)
        second = self.train("--nproc", "1")
        message = second.stderr.decode()
        self.assertEqual(second.returncode, 1, message)
        self.assertIn(f"process {self.rank_of(launcher)} on ", message)
        self.assertIn("trains in this folder", message)
        self.assertNotIn("restart", message)
        self.assertIsNone(launcher.poll())

    def test_it_gives_up_when_restarts_come_to_nothing(self):
        self.configure(total_steps=20)
        (self.folder / "text.bin").unlink()
        done = self.train("--nproc", "1", "--max-restarts", "7")
        log = done.stderr.decode()
        self.assertEqual(done.returncode, 1, log)
        self.assertEqual(log.count("ended with exit code 1"), 3, log)
        self.assertIn("; its last line on stderr: rookery: text.bin", log)
        self.assertIn("given up: 2 restarts in a row left no newer checkpoint", log)

    def test_what_only_a_rank_finds_wrong_is_not_started_again(self):
        self.configure(total_steps=20)
        self.assertEqual(self.train().returncode, 0)
        done = self.train("--nproc", "1", "--set", "train.seed=7", "--set", "train.total_steps=30")
        log = done.stderr.decode()
        self.assertEqual(done.returncode, 2, log)
        self.assertEqual(log.count("ended with exit code 2"), 1, log)
        self.assertNotIn("restart 1", log)

    def test_wrong_options_are_said_once_and_start_nothing(self):
        self.configure(total_steps=20)
        two = ("--nproc", "2")
        nodes = (*two, "--nnodes", "2")
        for options, words in (
            ((*two, "--set", "train.sed=1"), "unknown key train.sed"),
            (("--nproc", "0"), "--nproc 0: expected a number from 1 to"),
            (("--nproc", "many"), "many"),
            (("--max-restarts", "1"), "neither --nproc nor --nnodes"),
            ((*two, "--max-restarts", "-1"), "--max-restarts -1: expected a number from 0"),
            ((*two, "--node-rank", "1"), "--node-rank 1: expected a number from 0 to 0"),
            ((*nodes, "--master", "a:1"), "--node-rank is not"),
            ((*nodes, "--node-rank", "0"), "--master is not"),
            ((*nodes, "--node-rank", "2", "--master", "a:1"), "--node-rank 2: expected a number "
                                                              "from 0 to 1"),
            ((*two, "--replay", "1"), "--replay is of one process"),
            ((*two, "--print-config"), "--print-config is of one process"),
            *(((*two, "--master", bad), f"--master {bad}: expected HOST:PORT")
              for bad in ("a", "a:", ":1", "a:0", "a:65536", "a:b", "fe80::1:2", "a:1:2")),
        ):
            with self.subTest(options):
                done = self.train(*options)
                message = done.stderr.decode()
                self.assertEqual(done.returncode, 2, message)
                self.assertIn(words, message)
                self.assertEqual(message.count("rookery: "), 1, message)
                self.assertFalse((self.folder / "run").exists())

    def test_a_rank_of_torchrun_starts_no_others(self):
        self.configure(total_steps=20)
        done = subprocess.run(support.command_line("train", "--config", "run.toml", "--nproc", "2"),
                              cwd=self.folder, env={**support.environment(), "RANK": "3"},
                              capture_output=True, timeout=DEADLINE_S, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn(b'RANK = "3": torchrun or another launcher started this', done.stderr)

    def test_a_configuration_that_can_be_read_once_is_refused(self):
        self.configure(total_steps=20)
        done = subprocess.run(
            support.command_line("train", "--config", "/dev/stdin", "--nproc", "1"),
            cwd=self.folder, env=support.environment(), stderr=subprocess.PIPE,
            input=(self.folder / "run.toml").read_bytes(), timeout=DEADLINE_S, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"--config /dev/stdin is no file that several ranks could read", done.stderr)


if __name__ == "__main__":
    support.main()
