"""Several processes that train together: the run that one makes alone, and what they say when one of
them is gone.

Run by ctest as: test_distributed.py PATH_OF_ROOKERY.
"""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import time

import safetensors.numpy

import support
from support import rookery


def saved_tensors(checkpoint):
    """What a checkpoint's files hold, bit for bit: {file: {tensor: bytes}}."""
    return {path.name: {name: tensor.tobytes()
                        for name, tensor in safetensors.numpy.load_file(path).items()}
            for path in checkpoint.glob("*.safetensors")}


class Run(support.Folder):
    """A corpus and a configuration."""

    def setUp(self):
        super().setUp()
        support.write_text(self.folder / "text.txt", support.text_lines())
        rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", "text.txt",
                cwd=self.folder)
        support.write_config(self.folder / "run.toml", **support.run_of_several(
            "corpus", lr_init=3e-3, total_steps=8, save_every_steps=4, keep_checkpoints=9))


class SameRun(Run):
    def train(self, count, run_dir, *options, **how):
        ranks = support.Ranks(self.folder, count, f"train.run_dir={run_dir}", *options, **how)
        codes = ranks.wait()
        self.assertEqual(codes, [0] * count, "\n".join(map(ranks.text, range(count))))
        return self.losses(run_dir)

    def losses(self, run_dir):
        lines = (self.folder / run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def saved(self, run_dir, step=8):
        return saved_tensors(self.folder / run_dir / "checkpoints" / f"step_{step:08}")

    def test_any_number_of_processes_makes_the_same_run(self):
        alone = self.train(1, "one")
        for count in (2, 3, 7):
            with self.subTest(count=count):
                together = self.train(count, f"of_{count}")
                self.assertEqual(len(together), 8)
                for loss, expected in zip(together, alone, strict=True):
                    self.assertAlmostEqual(loss, expected, delta=1e-5)

    def test_two_runs_of_as_many_processes_are_equal_bit_for_bit(self):
        self.assertEqual(self.train(2, "first"), self.train(2, "second"))
        self.assertEqual(self.saved("first"), self.saved("second"))

    def test_goes_on_with_as_many_processes_bit_for_bit_and_with_others(self):
        whole = self.train(2, "whole")
        for count in (2, 1, 3):
            with self.subTest(count=count):
                run = f"then_{count}"
                self.train(2, run, "train.total_steps=4")
                resumed = self.train(count, run)
                if count == 2:
                    self.assertEqual(resumed, whole)
                    self.assertEqual(self.saved(run), self.saved("whole"))
                for loss, expected in zip(resumed, whole, strict=True):
                    self.assertAlmostEqual(loss, expected, delta=1e-5)

    def test_every_stage_of_zero_makes_the_same_run(self):
        # Two micro-batches on one process, one on the others; frozen tensors; bf16 with masters.
        for options, delta in ((("train.batch_size=8", "train.micro_batch_size=2",
                                 'optimizer.freeze=["emb.*", "blocks.0.*"]'), 1e-5),
                               (("train.batch_size=9", "train.dtype=bf16"), 5e-3)):
            name = f"of_{len(options)}"
            alone = self.train(1, f"{name}_alone", *options)
            for count, zero in ((3, 0), (3, 1), (3, 2), (2, 2)):
                with self.subTest(options=options, count=count, zero=zero):
                    together = self.train(count, f"{name}_{count}_{zero}", *options,
                                          f"distributed.zero={zero}")
                    for loss, expected in zip(together, alone, strict=True):
                        self.assertAlmostEqual(loss, expected, delta=delta)

    def test_goes_on_with_another_stage_and_another_number_of_processes(self):
        whole = self.train(2, "whole")
        for before, after in (((3, 2), (2, 1)), ((2, 1), (1, 0)), ((1, 0), (3, 2)), ((2, 2), (2, 2))):
            with self.subTest(before=before, after=after):
                run = f"run_{before}_{after}"
                for (count, zero), steps in ((before, 4), (after, 8)):
                    losses = self.train(count, run, f"distributed.zero={zero}",
                                        f"train.total_steps={steps}")
                for loss, expected in zip(losses, whole, strict=True):
                    self.assertAlmostEqual(loss, expected, delta=1e-5)
                if before == after:
                    self.train(*before[:1], "undisturbed", f"distributed.zero={before[1]}")
                    self.assertEqual(self.saved(run), self.saved("undisturbed"))

    def test_each_process_saves_its_share_and_all_read_it_as_one_model(self):
        self.train(1, "one")
        self.train(3, "three", "distributed.zero=1")
        sizes = {name: sum(map(len, tensors.values())) for name, tensors in self.saved("three").items()}
        self.assertEqual(len(sizes), 6)
        for stem in ("model", "optimizer"):
            shares = [size for name, size in sizes.items() if name.startswith(stem)]
            self.assertLess(max(shares) - min(shares), 1000)
        for run in ("one", "three"):
            rookery("convert", run, f"{run}.safetensors", cwd=self.folder)
            rookery("inspect", f"{run}/checkpoints/step_00000008", cwd=self.folder)
        one, three = (safetensors.numpy.load_file(self.folder / f"{run}.safetensors")
                      for run in ("one", "three"))
        self.assertEqual(one.keys(), three.keys())
        for name, tensor in one.items():
            self.assertLess(abs(tensor - three[name]).max(), 1e-3, name)

    def damage(self, run, what):
        """To the checkpoint of step 8."""
        checkpoint = self.folder / run / "checkpoints/step_00000008"
        shard = sorted(checkpoint.glob("optimizer*.safetensors"))[-1]
        if what == "a flipped bit":
            support.flip_bit(shard)
        elif what == "a missing shard":
            shard.unlink()
        else:
            self.train(2, "other", "train.seed=2")
            shutil.copy(self.folder / "other/checkpoints/step_00000008/manifest.json", checkpoint)

    def test_a_checkpoint_that_is_not_whole_is_passed_over_by_all(self):
        whole = self.train(2, "whole")
        for number, (what, words) in enumerate((
                ("a flipped bit", "its contents have changed"),
                ("a missing shard", "is missing"),
                ("the manifest of another run", "its contents have changed"))):
            with self.subTest(what):
                run = f"damaged_{number}"
                self.train(2, run)
                self.damage(run, what)
                ranks = support.Ranks(self.folder, 2, f"train.run_dir={run}")
                self.assertEqual(ranks.wait(), [0, 0], ranks.text(0))
                self.assertRegex(ranks.text(0), f"step_00000008/.*{words}.*an older one is taken")
                self.assertIn(f"going on from {run}/checkpoints/step_00000004", ranks.text(0))
                self.assertEqual(self.losses(run), whole)
                self.assertEqual(self.saved(run), self.saved("whole"))

    def test_clocks_that_differ_and_go_back_change_nothing(self):
        whole = self.train(2, "whole")
        self.train(2, "run", "train.total_steps=6", clocks=(None, "+400d"))
        # The older the checkpoint, the newer its files, and all are of days to come.
        for age, name in enumerate(support.checkpoints(self.folder / "run")):
            checkpoint = self.folder / "run/checkpoints" / name
            future = time.time() + 1e7 / (1 + age)
            for path in (*checkpoint.iterdir(), checkpoint):
                os.utime(path, (future, future))
        resumed = self.train(2, "run", clocks=("-30d", "+1h"))
        starts = [json.loads(line) for line in
                  (self.folder / "run/starts.jsonl").read_text(encoding="utf-8").splitlines()]
        self.assertEqual([start["step"] for start in starts], [0, 6])
        # That the clock did go back.
        self.assertLess(starts[1]["time"], starts[0]["time"] - 20 * 86400)
        self.assertEqual(resumed, whole)
        self.assertEqual(self.saved("run"), self.saved("whole"))

    def test_validation_and_mfu_are_of_the_whole_run(self):
        for count, run in ((1, "one"), (2, "two")):
            self.train(count, run, "data.validation=corpus", "train.validation_tokens=400")
        rows = [[json.loads(line) for line in (self.folder / run / "metrics.jsonl")
                 .read_text(encoding="utf-8").splitlines()] for run in ("one", "two")]
        self.assertAlmostEqual(*(each[-1]["validation_loss"] for each in rows), delta=1e-5)
        # Tokens of all processes over the products of all.
        starts = [json.loads((self.folder / run / "starts.jsonl").read_text(encoding="utf-8"))
                  for run in ("one", "two")]
        self.assertEqual([start["processes"] for start in starts], [1, 2])

    def test_bf16_and_micro_batches_agree_too(self):
        bf16 = ("train.dtype=bf16", "train.batch_size=9")
        alone = self.train(1, "one", *bf16)
        # Four and five sequences, three at most at once.
        together = self.train(2, "two", *bf16, "train.micro_batch_size=3")
        for loss, expected in zip(together, alone, strict=True):
            self.assertAlmostEqual(loss, expected, delta=2e-2)

    def test_more_processes_than_sequences_are_refused(self):
        ranks = support.Ranks(self.folder, 2, "train.batch_size=1")
        self.assertEqual(ranks.wait(), [2, 2])
        self.assertIn("train.batch_size = 1: fewer sequences a step than the 2 processes",
                      ranks.text(0))

    def test_a_process_alone_says_who_did_not_come(self):
        ranks = support.Ranks(self.folder, 2)
        ranks.processes[1].kill()
        ranks.processes[1].wait()
        self.assertEqual(ranks.wait()[0], 1)
        self.assertRegex(ranks.text(0), "rank 1 of 2 did not come within 5 s")


class Faults(Run):
    """Of three processes that train for longer than the test takes."""

    LONG = ("train.total_steps=1000000", "train.save_every_steps=1000000")

    def started(self):
        ranks = support.Ranks(self.folder, 3, *self.LONG)
        self.addCleanup(ranks.kill)
        end = time.monotonic() + support.DEADLINE_S
        metrics = self.folder / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
            self.assertLess(time.monotonic(), end, "the run does not start:\n" + ranks.text(0))
            self.assertIsNone(ranks.processes[0].poll(), ranks.text(0))
            time.sleep(0.02)
        return ranks

    def test_a_killed_process_is_named_by_the_others(self):
        ranks = self.started()
        ranks.processes[1].kill()
        codes = ranks.wait()
        self.assertEqual(codes, [1, -signal.SIGKILL, 1])
        for rank in (0, 2):
            self.assertRegex(ranks.text(rank), r"step \d+: (.* )?rank 1 has not been heard of for")

    def test_the_first_process_killed_is_named_too(self):
        ranks = self.started()
        ranks.processes[0].kill()
        self.assertEqual(ranks.wait(), [-signal.SIGKILL, 1, 1])
        for rank in (1, 2):
            self.assertRegex(ranks.text(rank), r"rank 0(, which holds the store at \S+,)? has not been")

    def test_a_stopped_process_is_named_within_the_timeout(self):
        ranks = self.started()
        ranks.processes[2].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        for rank in (0, 1):
            self.assertEqual(ranks.processes[rank].wait(timeout=support.DEADLINE_S), 1)
            self.assertRegex(ranks.text(rank), r"step \d+: (.* )?rank 2 has not been heard of for")
        self.assertLess(time.monotonic() - begin, support.TIMEOUT_S + 5)

    def test_a_signal_to_one_saves_on_all(self):
        ranks = self.started()
        ranks.processes[2].send_signal(signal.SIGTERM)
        self.assertEqual(ranks.wait(), [128 + signal.SIGTERM] * 3)
        self.assertEqual(len(support.checkpoints(self.folder / "run")), 1)
        self.assertIn("SIGTERM asked to stop", ranks.text(0))

    def test_a_loss_that_is_not_finite_on_one_is_named_by_all(self):
        # The embedding of a byte that stands in one place of the corpus.
        support.write_text(self.folder / "text.txt", support.text_lines(300) + ["\x01"] + support.text_lines(300))
        rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", "text.txt",
                cwd=self.folder)
        ranks = support.Ranks(self.folder, 1, "train.run_dir=first", "train.total_steps=1")
        self.assertEqual(ranks.wait(), [0])
        rookery("convert", "first", "first.safetensors", cwd=self.folder)
        weights = safetensors.numpy.load_file(self.folder / "first.safetensors")
        weights["emb.weight"][1] = float("nan")
        safetensors.numpy.save_file(weights, self.folder / "first.safetensors")

        ranks = support.Ranks(self.folder, 3, *self.LONG, "init.from=first.safetensors",
                              "train.log_every_steps=1000")
        self.assertEqual(ranks.wait(), [1, 1, 1])
        said = {re.search(r"step (\d+): loss nan.*, for emb.weight was not finite before it, on rank "
                          r"(\d)'s samples (\d+) to (\d+);", ranks.text(rank)).groups()
                for rank in range(3)}
        self.assertEqual(len(said), 1, said)
        step, rank, *samples = map(int, said.pop())
        share = ((0, 1), (2, 3), (4, 6))[rank]
        self.assertEqual(tuple(sample - 7 * (step - 1) for sample in samples), share)

    def test_a_save_that_fails_on_one_fails_on_all_and_leaves_nothing(self):
        ranks = support.Ranks(self.folder, 3, *self.LONG[:1], "train.save_every_steps=3",
                              "model.n_embd=64", limits={1: [(resource.RLIMIT_FSIZE, 64 << 10)]})
        self.assertEqual(ranks.wait(), [1, 1, 1])
        for rank in range(3):
            self.assertRegex(ranks.text(rank), "rank 1 cannot write its share of the checkpoint: .*"
                             "partial_step_00000003/.*File too large")
        self.assertEqual(support.checkpoints(self.folder / "run"), [])

    def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(self):
        whole = self.folder / "run/checkpoints"
        ranks = support.Ranks(self.folder, 2, "train.total_steps=1000000", "train.save_every_steps=1")
        self.addCleanup(ranks.kill)
        end = time.monotonic() + support.DEADLINE_S
        while not (len(list(whole.glob("step_*"))) > 2 and list(whole.glob("partial_*"))):
            self.assertLess(time.monotonic(), end, ranks.text(0))
        ranks.processes[1].kill()
        self.assertEqual(ranks.wait(), [1, -signal.SIGKILL])
        newest = max(int(path.name[5:]) for path in whole.glob("step_*"))
        ranks = support.Ranks(self.folder, 2, f"train.total_steps={newest + 2}")
        self.assertEqual(ranks.wait(), [0, 0], ranks.text(0))
        self.assertIn(f"going on from run/checkpoints/step_{newest:08}", ranks.text(0))
        self.assertEqual(list(whole.glob("partial_*")), [])


class Launcher(Run):
    """`rookery train --nproc`."""

    def start(self, *options):
        with open(self.folder / "launcher.log", "wb") as log:
            launcher = subprocess.Popen(
                support.command_line("train", "--config", "run.toml", "--nproc", 2, *options),
                cwd=self.folder, env=support.environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=log)
        self.addCleanup(launcher.wait)
        self.addCleanup(launcher.kill)
        return launcher

    def log(self):
        return (self.folder / "launcher.log").read_text(encoding="utf-8")

    def ranks_of(self, launcher):
        """Their process numbers, by rank."""
        children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        found = {}
        for child in children.split():
            try:
                environment = pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in environment:
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(child)
        return found

    def wait_for(self, condition):
        end = time.monotonic() + support.DEADLINE_S
        while not condition():
            self.assertLess(time.monotonic(), end, self.log())
            time.sleep(0.01)

    def test_a_run_whose_processes_are_killed_is_the_run_that_was_not(self):
        options = ("--set", "train.total_steps=400", "--set", "train.save_every_steps=20")
        self.assertEqual(self.start(*options, "--set", "train.run_dir=whole").wait(support.DEADLINE_S), 0)
        launcher = self.start(*options)
        for kills in range(2):
            folder = self.folder / "run"
            self.wait_for(lambda: folder.exists() and len(support.checkpoints(folder)) > 2 * kills
                          and len(self.ranks_of(launcher)) == 2)
            os.kill(self.ranks_of(launcher)[kills], signal.SIGKILL)
            self.wait_for(lambda: f"restart {kills + 1} of 3" in self.log())
        self.assertEqual(launcher.wait(support.DEADLINE_S), 0, self.log())
        for run in ("whole", "run"):
            self.assertIn("step_00000400", support.checkpoints(self.folder / run))
        self.assertEqual(*(saved_tensors(self.folder / run / "checkpoints/step_00000400")
                           for run in ("whole", "run")))

    def test_a_signal_to_the_launcher_saves_and_ends(self):
        launcher = self.start("--set", "train.total_steps=1000000",
                              "--set", "train.save_every_steps=1000000")
        metrics = self.folder / "run" / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3)
        launcher.send_signal(signal.SIGTERM)
        self.assertEqual(launcher.wait(support.DEADLINE_S), 128 + signal.SIGTERM, self.log())
        self.assertEqual(len(support.checkpoints(self.folder / "run")), 1)
        self.assertIn("[0]", self.log())


if __name__ == "__main__":
    support.main()
