"""A run's life: what ends it, what it keeps, what it begins with, and what it says when numbers go wrong.

Run by ctest as: test_life.py PATH_OF_ROOKERY.
"""

import json
import os
import pathlib
import pty
import random
import re
import shutil
import signal
import subprocess
import termios
import time
import unittest

import support
from support import rookery

# Beyond the time any wait takes, by far; a program that hangs must not hang the tests.
DEADLINE_S = 120
LONG = {"total_steps": 1_000_000, "log_every_steps": 1}


def cpu_seconds(pid):
    """What a process has used, of all cores together."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Life(support.Folder):
    def setUp(self):
        super().setUp()
        support.write_text(self.folder / "text.txt", support.text_lines())
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=self.folder)

    def configure(self, name="run", data=None, init=None, optimizer=None, sample=None,
                  schedule=None, **train):
        sections = support.small_run({"train": "text", "tokenizer": "bytes", **(data or {})},
                                     schedule=schedule, run_dir=name, **train)
        for section, keys in (("init", init), ("optimizer", optimizer), ("sample", sample)):
            if keys:
                sections[section] = keys
        if init:
            # The weights say them.
            for key in ("version", "n_layer", "n_embd"):
                del sections["model"][key]
        support.write_config(self.folder / f"{name}.toml", **sections)
        return self.folder / name

    def train(self, name="run", *options):
        return support.run("train", "--config", f"{name}.toml", *options, cwd=self.folder)

    def start(self, name="run"):
        process = subprocess.Popen(support.command_line("train", "--config", f"{name}.toml"),
                                   cwd=self.folder, env=support.environment(),
                                   stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        self.wait_for(lambda: len(self.lines(name)) >= 3, process)
        return process

    def lines(self, name="run"):
        path = self.folder / name / "metrics.jsonl"
        return path.read_bytes().splitlines() if path.exists() else []

    def wait_for(self, condition, process):
        end = time.monotonic() + DEADLINE_S
        while not condition():
            if process.poll() is not None or time.monotonic() > end:
                self.fail("it never came to that: " + process.stderr.read().decode())
            time.sleep(0.01)

    def last_step(self, name="run"):
        names = support.checkpoints(self.folder / name)
        return int(names[-1].removeprefix("step_")) if names else None


class Stops(Life):
    def test_sigterm_and_sigint_save_and_end_with_128_and_the_signal(self):
        for number, name in ((signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")):
            with self.subTest(name):
                self.configure(name, **LONG)
                process = self.start(name)
                process.send_signal(number)
                log = process.communicate(timeout=DEADLINE_S)[1].decode()
                self.assertEqual(process.returncode, 128 + number, log)
                self.assertIn(f"{number.name} asked to stop", log)
                self.assertEqual(self.last_step(name), json.loads(self.lines(name)[-1])["step"])

    def test_a_lost_terminal_saves_too(self):
        self.configure(**LONG)
        process = self.start()
        process.send_signal(signal.SIGHUP)
        log = process.communicate(timeout=DEADLINE_S)[1].decode()
        self.assertEqual(process.returncode, 128 + signal.SIGHUP, log)
        self.assertEqual(self.last_step(), json.loads(self.lines()[-1])["step"])

    def test_one_sigint_after_a_sigterm_still_saves(self):
        self.configure(**LONG)
        process = self.start()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
        self.assertIn(process.returncode, (128 + signal.SIGTERM, 128 + signal.SIGINT))
        self.assertIsNotNone(self.last_step())

    def test_a_sample_does_not_hold_up_a_signal(self):
        self.configure(sample={"every_steps": 5, "length": 100_000_000, "temperature": 0}, **LONG)
        process = self.start()
        self.wait_for(lambda: len(self.lines()) >= 5, process)
        time.sleep(0.3)
        process.terminate()
        self.assertEqual(process.wait(timeout=DEADLINE_S), 128 + signal.SIGTERM)
        self.assertEqual(self.last_step(), 5)

    def test_it_goes_on_bit_for_bit_after_a_signal(self):
        whole = self.configure("whole", total_steps=2000, log_every_steps=1)
        self.assertEqual(self.train("whole").returncode, 0)
        stopped = self.configure("stopped", total_steps=2000, log_every_steps=1)
        process = self.start("stopped")
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
        self.assertLess(self.last_step("stopped"), 2000, "stopped too late to prove anything")
        done = self.train("stopped")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        contents = [support.read_safetensors(run / "checkpoints/step_00002000/model.safetensors")
                    for run in (whole, stopped)]
        self.assertTrue(contents[0] == contents[1])
        smoothed = [[row["smoothed_loss"] for row in support.metrics(run)]
                    for run in (whole, stopped)]
        self.assertEqual(len(smoothed[1]), 2000)
        self.assertLess(max(abs(x - y) for x, y in zip(*smoothed)), 1e-9)

    def test_a_second_sigint_ends_it_at_once(self):
        # One step takes a minute: the first signal waits for the end of a micro-batch.
        self.configure(batch_size=1024, micro_batch_size=1024, total_steps=10)
        path = self.folder / "run.toml"
        path.write_text(path.read_text().replace("n_embd = 32", "n_embd = 512")
                        .replace("ctx_len = 32", "ctx_len = 128"))
        process = subprocess.Popen(support.command_line("train", "--config", "run.toml"),
                                   cwd=self.folder, env=support.environment(),
                                   stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        self.wait_for(lambda: (self.folder / "run/starts.jsonl").exists(), process)
        # It computes: a machine that is busy otherwise may take long to come to that.
        begun = cpu_seconds(process.pid)
        self.wait_for(lambda: cpu_seconds(process.pid) > begun + 1, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(timeout=10), -signal.SIGINT)

    def test_of_several_ends_the_first_counts_and_is_named(self):
        # 8 x 32 tokens a step, about 46 steps an epoch.
        for lengths, steps, said in (
            ({"total_tokens": 256 * 7, "total_steps": 9}, 7, "train.total_tokens = 1792 is reached"),
            ({"total_epochs": 2, "total_steps": 5}, 5, "train.total_steps = 5 is reached"),
        ):
            with self.subTest(said):
                name = f"run{steps}"
                self.configure(name, **lengths)
                log = self.train(name).stderr.decode()
                self.assertIn(f"{name}: ended at step {steps}: {said}", log)
                self.assertEqual(self.last_step(name), steps)

    def test_minutes_end_it_and_count_over_restarts(self):
        self.configure(total_minutes=0.05, **LONG)
        begin = time.monotonic()
        log = self.train().stderr.decode()
        self.assertIn("train.total_minutes = 0.05 are over", log)
        self.assertGreaterEqual(time.monotonic() - begin, 3)
        first = self.last_step()
        self.assertIn("nothing to do after step", self.train().stderr.decode())
        self.assertEqual(self.last_step(), first)
        self.assertEqual(support.metrics(self.folder / "run")[-1]["step"], first)
        self.train("run", "--set", "train.total_minutes=0.06")
        rows = support.metrics(self.folder / "run")
        self.assertGreater(self.last_step(), first)
        self.assertGreaterEqual(rows[-1]["elapsed_s"], 3.5)
        self.assertLess(rows[-1]["elapsed_s"], 30)

    def test_minutes_end_it_with_a_validation_and_a_sample(self):
        run = self.configure(total_minutes=0.01, total_steps=1_000_000, log_every_steps=1_000_000,
                             data={"validation": "text"}, sample={"every_steps": 1_000_000})
        self.assertEqual(self.train().returncode, 0)
        last = support.metrics(run)[-1]
        self.assertEqual(last["step"], self.last_step())
        self.assertIn("validation_loss", last)
        sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
        self.assertEqual(sample["step"], self.last_step())

    def test_a_second_run_in_the_folder_is_refused_by_name(self):
        self.configure(**LONG)
        process = self.start()
        second = self.train()
        self.assertEqual(second.returncode, 1)
        message = support.error_message(second.stderr)
        self.assertIn(f"run: process {process.pid} on {os.uname().nodename} trains in this folder",
                      message)
        process.kill()
        process.wait()
        self.configure(total_steps=5)
        self.assertEqual(self.train().returncode, 0, "a dead run holds no lock")


WEIGHTS = ("model.safetensors", "optimizer.safetensors")


class Keeps(Life):
    def test_the_newest_checkpoints_and_every_so_many_for_good(self):
        run = self.configure(total_steps=23, save_every_steps=2, keep_checkpoints=2,
                             keep_every_steps=8)
        self.assertEqual(self.train().returncode, 0)
        self.assertEqual(support.checkpoints(run),
                         [f"step_{step:08d}" for step in (8, 16, 22, 23)])

    def test_what_is_kept_for_good_is_saved(self):
        run = self.configure(total_steps=23, keep_checkpoints=1, keep_every_steps=10)
        self.assertEqual(self.train().returncode, 0)
        self.assertEqual(support.checkpoints(run),
                         [f"step_{step:08d}" for step in (10, 20, 23)])

    def test_what_it_saved_beside_a_folder_of_a_later_step(self):
        run = self.configure(total_steps=12, save_every_steps=3, keep_checkpoints=1)
        self.assertEqual(self.train().returncode, 0)
        stray = run / "checkpoints/step_00999999"
        stray.mkdir()
        done = self.train("run", "--set", "train.total_minutes=5")
        self.assertEqual(done.returncode, 0)
        self.assertIn("step_00999999/config.toml: is missing; this checkpoint is not whole",
                      done.stderr.decode())
        stray.rmdir()

        longer = self.configure("longer", keep_checkpoints=1, **LONG)
        process = self.start("longer")
        (longer / "checkpoints/step_00999999").mkdir()
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
        self.assertEqual(len(support.checkpoints(longer)), 2, "the stray one and the one just saved")

    def test_a_checkpoint_that_lost_a_file_is_named_and_made_again(self):
        run = self.configure(total_steps=6, save_every_steps=3)
        self.assertEqual(self.train().returncode, 0)
        newest = run / "checkpoints/step_00000006"
        before = {name: (newest / name).read_bytes() for name in WEIGHTS}
        for name in (*WEIGHTS, "trainer.json", "config.toml", "manifest.json"):
            (newest / name).unlink()
            done = self.train()
            self.assertEqual(done.returncode, 0)
            self.assertIn(f"step_00000006/{name}: is missing", done.stderr.decode())
            self.assertIn("going on from run/checkpoints/step_00000003", done.stderr.decode())
            self.assertEqual({name: (newest / name).read_bytes() for name in WEIGHTS}, before)

    def test_without_a_whole_checkpoint_it_does_not_begin_anew(self):
        run = self.configure(total_steps=6, save_every_steps=3)
        self.assertEqual(self.train().returncode, 0)
        for step in (3, 6):
            support.flip_bit(run / f"checkpoints/step_0000000{step}/model.safetensors")
        before = support.listing(run)
        done = self.train()
        self.assertEqual(done.returncode, 1)
        self.assertRegex(support.error_message(done.stderr),
                         "step_00000006/model.safetensors: checksum .*none of the 2 checkpoints is "
                         "whole in run/checkpoints.*or delete that folder")
        self.assertEqual(support.listing(run), before)

    def test_a_renamed_checkpoint_is_named(self):
        run = self.configure(total_steps=6, save_every_steps=3)
        self.assertEqual(self.train().returncode, 0)
        (run / "checkpoints/step_00000003").rename(run / "checkpoints/step_00000008")
        done = self.train()
        self.assertEqual(done.returncode, 1)
        self.assertIn("step_00000008: holds step 3, so it should be called step_00000003",
                      support.error_message(done.stderr))

    def test_a_corpus_that_was_moved_but_not_another(self):
        run = self.configure(total_steps=5, schedule={"kind": "constant"})
        self.assertEqual(self.train().returncode, 0)
        for ending in ("bin", "idx", "tokenizer.json"):
            (self.folder / f"text.{ending}").rename(self.folder / f"moved.{ending}")
        done = self.train("run", "--set", "data.train=moved", "--set", "train.total_steps=6")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual(self.last_step(), 6)
        support.write_text(self.folder / "text.txt", support.text_lines(seed=2))
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=self.folder)
        done = self.train("run", "--set", "train.total_steps=7")
        self.assertEqual(done.returncode, 2)
        self.assertRegex(support.error_message(done.stderr),
                         r'data.train = "text": holds [\d,]+ tokens \(\w+\), but .*step_00000006 '
                         r"was trained on [\d,]+ tokens \(\w+\)")

    def test_checkpoints_by_minutes(self):
        run = self.configure(total_minutes=0.06, save_every_minutes=0.015, keep_checkpoints=50,
                             **LONG)
        self.assertEqual(self.train().returncode, 0)
        self.assertIn(len(support.checkpoints(run)), range(3, 6))

    def test_a_line_for_every_start_and_the_environment(self):
        run = self.configure(total_steps=4)
        self.train()
        self.train("run", "--set", "schedule.kind=constant", "--set", "train.total_steps=4")
        starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
        self.assertEqual([start["step"] for start in starts], [0])
        self.assertEqual(starts[0]["threads"], 1)
        self.assertGreater(starts[0]["matrix_flops_per_s"], 1e8)
        row = support.metrics(run)[-1]
        self.assertGreater(row["memory_bytes"], 1e7)
        self.assertTrue(0 < row["mfu"] < 1.2, row)
        self.assertTrue(0 <= row["data_wait"] <= 1, row)
        self.assertAlmostEqual(row["time"], time.time(), delta=60)

    def test_event_files_that_tensorboard_reads(self):
        support.package("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        run = self.configure(total_steps=6, log_every_steps=1, data={"validation": "text"},
                             validate_every_steps=3, sample={"every_steps": 3, "length": 10},
                             telemetry_every_steps=2)
        self.assertEqual(self.train().returncode, 0)
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        rows = support.metrics(run)
        for tag, key in (("loss/train", "loss"), ("optimizer/grad_norm", "grad_norm"),
                         ("loss/validation", "validation_loss")):
            expected = [(row["step"], row[key]) for row in rows if key in row]
            read = [(event.step, event.value) for event in events.Scalars(tag)]
            self.assertEqual([step for step, _ in read], [step for step, _ in expected])
            for (_, x), (_, y) in zip(read, expected):
                self.assertAlmostEqual(x, y, places=5)
        self.assertEqual(len(events.Tensors("sample")), 2)
        expected = [(row["step"], row["telemetry"]["decay_slow"][1][0]) for row in rows
                    if "telemetry" in row]
        read = events.Scalars("telemetry/decay_slow_mean/layer_1")
        self.assertEqual([(event.step, event.value) for event in read], expected)
        self.assertEqual([step for step, _ in expected], [2, 4, 6])

    def test_samples_that_a_second_run_writes_again(self):
        texts = []
        for name in ("a", "b"):
            run = self.configure(name, total_steps=30,
                                 sample={"every_steps": 10, "prompt": "The little ", "length": 20})
            self.assertEqual(self.train(name).returncode, 0)
            texts.append((run / "samples.jsonl").read_text())
        rows = [json.loads(line) for line in texts[0].splitlines()]
        self.assertEqual([row["step"] for row in rows], [10, 20, 30])
        self.assertTrue(all(row["prompt"] == "The little " and row["text"] for row in rows))
        self.assertEqual(texts[0], texts[1])


class Begins(Life):
    """From weights that are there already."""

    def setUp(self):
        super().setUp()
        self.configure("first", total_steps=40)
        self.assertEqual(self.train("first").returncode, 0)
        rookery("convert", "first", "released.pth", cwd=self.folder)
        self.last_loss = support.metrics(self.folder / "first")[-1]["loss"]

    def weights(self, name):
        folder = self.folder / name / "checkpoints"
        return support.read_safetensors(folder / support.checkpoints(folder.parent)[-1] /
                                        "model.safetensors")

    def refused(self, code, *words, options=(), **configuration):
        self.configure("next", total_steps=1, **configuration)
        done = self.train("next", *options)
        message = support.error_message(done.stderr)
        self.assertEqual(done.returncode, code, message)
        for word in words:
            self.assertIn(word, message)

    def test_with_nothing_said_of_its_shape(self):
        run = self.configure("next", init={"from": "released.pth"}, total_steps=2)
        done = self.train("next")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertIn("rwkv4: 2 layers, 32 wide", done.stderr.decode())
        self.assertIn("beginning with the weights of released.pth", done.stderr.decode())
        self.assertRegex(done.stderr.decode(), r"blocks\.1\.att\.time_first .* rate x 3")
        self.assertAlmostEqual(support.metrics(run)[0]["loss"], self.last_loss, delta=0.5)
        # Once it has a checkpoint the file is not needed any more.
        (self.folder / "released.pth").unlink()
        done = self.train("next", "--set", "train.total_minutes=5")
        self.assertEqual(done.returncode, 0, done.stderr.decode())

    def test_with_the_configuration_for_fine_tuning(self):
        config = pathlib.Path(__file__).parents[2] / "configs/finetune_rwkv4.toml"
        settings = ("init.from=released.pth", "data.train=text", "data.tokenizer=bytes",
                    "train.run_dir=tuned", "train.total_steps=2", "model.ctx_len=32",
                    "schedule.warmup_tokens=64", "train.threads=1")
        rookery("train", "--config", config, *(word for setting in settings
                                               for word in ("--set", setting)), cwd=self.folder)
        self.assertEqual(support.checkpoints(self.folder / "tuned"), ["step_00000002"])
        self.assertAlmostEqual(support.metrics(self.folder / "tuned")[0]["loss"], self.last_loss,
                               delta=0.5)

    def test_whose_shape_options_only_confirm(self):
        init = {"from": "released.pth"}
        for option, found in (("model.n_layer=3", "has 2"), ("model.n_embd=64", "has 32"),
                              ("model.vocab_size=100", "has 256")):
            self.refused(2, option.replace("=", " = "), "released.pth", found,
                         options=("--set", option), init=init)

    def test_that_lack_a_tensor_or_have_one_too_many(self):
        tensors = support.read_safetensors(
            self.folder / "first/checkpoints/step_00000040/model.safetensors")
        moved = tensors.pop("blocks.1.ffn.value.weight")
        support.write_safetensors(self.folder / "odd.safetensors", {**tensors, "more.weight": moved})
        init = {"from": "odd.safetensors"}
        self.refused(1, "odd.safetensors: blocks.1.ffn.value.weight is missing", init=init)
        init["allow_missing"] = ["blocks.*.ffn.value.*"]
        self.refused(1, "odd.safetensors: more.weight is unexpected", init=init)
        init["allow_unexpected"] = ["more.*", "others.*"]
        self.refused(2, 'init.allow_unexpected: no tensor that matches "others.*"', init=init)
        init["allow_unexpected"] = ["more.*"]
        self.configure("next", init=init, total_steps=1)
        done = self.train("next")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        log = done.stderr.decode()
        self.assertIn("with initial values: blocks.1.ffn.value.weight", log)
        self.assertIn("left out: more.weight", log)

    def test_of_another_tokenizer(self):
        for name, seed in (("a", 1), ("b", 2)):
            support.write_text(self.folder / f"{name}.txt", support.text_lines(seed=seed))
            rookery("tokenizer", "train", "--output", f"{name}.model", "--vocab-size", "300",
                    "--input", f"{name}.txt", cwd=self.folder)
            rookery("tokenize", "--tokenizer", f"sentencepiece:{name}.model", "--output", name,
                    f"{name}.txt", cwd=self.folder)
        data = {"train": "a", "tokenizer": "sentencepiece:a.model"}
        self.configure("begun", data=data, total_steps=2)
        self.assertEqual(self.train("begun").returncode, 0)
        self.refused(2, "b.bin", "sentencepiece:", init={"from": "begun"},
                     data={"train": "b", "tokenizer": "sentencepiece:b.model"})
        self.assertEqual(support.checkpoints(self.folder / "next"), [])

    def test_of_a_smaller_vocabulary(self):
        self.refused(2, "model.vocab_size = 300", "has 256 rows", "init.vocab_growth",
                     options=("--set", "model.vocab_size=300"), init={"from": "released.pth"})
        numpy = support.package("numpy")
        for growth in ("mean", "zero"):
            name = f"grown_{growth}"
            self.configure(name, init={"from": "released.pth", "vocab_growth": growth},
                           total_steps=1)
            # Nothing moves at this rate.
            done = self.train(name, "--set", "model.vocab_size=300", "--set",
                              "schedule.lr_init=0", "--set", "schedule.lr_final=0")
            self.assertEqual(done.returncode, 0, done.stderr.decode())
            for key in ("emb.weight", "head.weight"):
                _, shape, content = self.weights(name)[key]
                self.assertEqual(shape, [300, 32])
                grown = numpy.frombuffer(content, numpy.float32).reshape(shape)
                old = numpy.frombuffer(self.weights("first")[key][2], numpy.float32).reshape(256, 32)
                self.assertTrue((grown[:256] == old).all())
                expected = old.astype(float).mean(0) if growth == "mean" else numpy.zeros(32)
                self.assertLess(abs(grown[256:] - expected).max(), 1e-7)

    def test_of_which_some_are_frozen(self):
        freeze = ["emb.weight", "blocks.0.*"]
        for dtype in ("fp32", "bf16"):
            name = f"tuned_{dtype}"
            run = self.configure(name, init={"from": "released.pth"}, optimizer={"freeze": freeze},
                                 total_steps=3, dtype=dtype)
            done = self.train(name)
            self.assertEqual(done.returncode, 0, done.stderr.decode())
            before, after = self.weights("first"), self.weights(name)
            same = {key for key in before if before[key] == after[key]}
            frozen = {key for key in before if key == "emb.weight" or key.startswith("blocks.0.")}
            self.assertEqual(same, frozen)
            moments = support.read_safetensors(
                run / "checkpoints/step_00000003/optimizer.safetensors")
            self.assertEqual({key[2:] for key in moments}, set(before) - frozen)
            table = (run / "parameters.txt").read_text()
            self.assertRegex(table, r"blocks\.0\.att\.key\.weight .* frozen")
            self.assertRegex(table, r"blocks\.1\.att\.time_first .* rate x 3")
            trained = sum(len(before[key][2]) // 4 for key in set(before) - frozen)
            self.assertIn(f"{trained} of ", table)
            self.assertIn(f"{trained} of ", done.stderr.decode())
        self.refused(2, "optimizer.freeze", '"blocks.7.*"', init={"from": "released.pth"},
                     optimizer={"freeze": ["blocks.7.*"]})
        self.refused(2, "leaves no tensor to train", init={"from": "released.pth"},
                     optimizer={"freeze": ["*"]})


class GoesWrong(Life):
    def test_a_replay_of_a_healthy_step_finds_nothing(self):
        for dtype in ("fp32", "bf16"):
            self.configure(dtype, total_steps=4, save_every_steps=2, dtype=dtype)
            self.assertEqual(self.train(dtype).returncode, 0)
            for step in (1, 3, 4):
                report = self.train(dtype, "--replay", step).stdout.decode()
                self.assertRegex(report, r"the results of all \d{3,} ops are finite")

    def test_weights_that_are_not_finite_are_named_and_never_saved(self):
        run = self.configure(total_steps=2, save_every_steps=1, keep_checkpoints=1,
                             data={"validation": "text"})
        done = self.train("run", "--set", "schedule.kind=linear", "--set",
                          "schedule.lr_final=1e38", "--set",
                          "optimizer.weight_decay=10", "--set", "optimizer.clip_norm=0")
        message = support.error_message(done.stderr)
        self.assertEqual(done.returncode, 1, message)
        self.assertRegex(message, r"step \d: its update left \S+ not finite, so it is not saved")
        for name in support.checkpoints(run):
            if name.startswith("step_"):
                numpy = support.package("numpy")
                tensors = support.read_safetensors(run / "checkpoints" / name / "model.safetensors")
                self.assertTrue(all(numpy.isfinite(numpy.frombuffer(content, numpy.float32)).all()
                                    for _, _, content in tensors.values()))

    def test_the_weight_that_was_bad_is_named(self):
        self.configure("first", total_steps=1)
        self.assertEqual(self.train("first").returncode, 0)
        path = self.folder / "first/checkpoints/step_00000001/model.safetensors"
        tensors = support.read_safetensors(path)
        for name in ("blocks.1.ffn.value.weight", "head.weight"):
            dtype, shape, content = tensors[name]
            nan = {**tensors, name: (dtype, shape, b"\x00\x00\xc0\x7f" + content[4:])}
            support.write_safetensors(self.folder / "nan.safetensors", nan)
            self.configure("next", init={"from": "nan.safetensors"}, total_steps=3)
            done = self.train("next")
            self.assertEqual(done.returncode, 1)
            self.assertIn(f"step 1: loss nan, gradient norm nan, for {name} was not finite",
                          support.error_message(done.stderr).replace("-nan", "nan"))

    def test_stops_before_the_update_and_is_replayed(self):
        self.configure(total_steps=50, save_every_steps=4, batch_size=8, micro_batch_size=2)
        blown = ("--set", "schedule.kind=linear", "--set", "schedule.lr_final=1e30",
                 "--set", "optimizer.clip_norm=0", "--set", "train.save_every_steps=1")
        done = self.train("run", *blown)
        message = support.error_message(done.stderr)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(message, r"step \d+: loss .* gradient norm .*on samples \d+ to \d+; "
                                  r"the update was not made")
        step = int(message.split("step ")[1].split(":")[0])
        self.assertIn(f"--replay {step}", message)
        self.assertEqual(self.last_step(), step - 1)
        before = support.listing(self.folder)
        replayed = self.train("run", *blown, "--replay", step)
        report = replayed.stdout.decode()
        self.assertEqual(replayed.returncode, 0, replayed.stderr.decode())
        self.assertIn(f"step {step}, from samples {8 * (step - 1)} to {8 * step - 1}", report)
        self.assertRegex(report, r"the first result that is not finite: \w+::\w+, ")
        self.assertRegex(report, r"returns \[.*(NaN|infinite)")
        fine = self.train("run", *blown, "--replay", 1).stdout.decode()
        self.assertRegex(fine, r"the results of all \d{3,} ops are finite")
        self.assertEqual(support.listing(self.folder), before, "a replay changes nothing")


class Skips(Life):
    STEP_TOKENS = 8 * 32
    FIRST = 150  # step of the first noise

    def configure_with_noise(self, steps_of_noise, **train):
        """A text in order, with noise that `steps_of_noise` steps from FIRST on are made of."""
        generator = random.Random(1)
        noise = "".join(map(chr, (generator.randrange(32, 127)
                                  for _ in range(steps_of_noise * self.STEP_TOKENS))))
        lines = "\n".join(support.text_lines(2500))
        at = (self.FIRST - 1) * self.STEP_TOKENS
        support.write_text(self.folder / "text.txt", [lines[:at] + noise + lines[at:]])
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=self.folder)
        return self.configure(data={"order": "sequential"}, total_steps=165, save_every_steps=1,
                              keep_checkpoints=30, skip_outliers_z=5, **train)

    def skipped(self, run):
        lines = (run / "skipped.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "time"}
                for line in lines]

    def state(self, run, step):
        return [support.read_safetensors(run / f"checkpoints/step_{step:08d}" / name)
                for name in WEIGHTS]

    def test_outliers_and_writes_down_which(self):
        run = self.configure_with_noise(2)
        done = self.train()
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        skipped = self.skipped(run)
        self.assertEqual([row["step"] for row in skipped], [150, 151])
        for row in skipped:
            self.assertTrue(row["loss"] > row["loss_limit"] or
                            row["grad_norm"] > row["grad_norm_limit"], row)
            self.assertAlmostEqual(row["loss_limit"], row["loss_mean"] + 5 * row["loss_deviation"])
            self.assertEqual(row["first_sample"], 8 * (row["step"] - 1))
            self.assertEqual(row["last_sample"], 8 * row["step"] - 1)
            self.assertRegex(done.stderr.decode(), rf"step {row['step']}, of samples "
                             rf"{row['first_sample']} to {row['last_sample']}: .*: not applied")
        states = {step: self.state(run, step) for step in (148, 149, 150, 151, 152)}
        self.assertTrue(states[149] == states[150] == states[151])
        self.assertFalse(states[148] == states[149] or states[151] == states[152])
        self.assertEqual([row["tokens"] for row in support.metrics(run)][-1],
                         165 * self.STEP_TOKENS)

    def test_them_alike_when_it_goes_on(self):
        run = self.configure_with_noise(2)
        self.assertEqual(self.train().returncode, 0)
        skipped, state = self.skipped(run), self.state(run, 165)
        for last in (151, 150, 149, 145):
            for step in range(last + 1, 166):
                shutil.rmtree(run / f"checkpoints/step_{step:08d}", ignore_errors=True)
            done = self.train()
            self.assertIn(f"going on from run/checkpoints/step_{last:08d}", done.stderr.decode())
            self.assertEqual(self.skipped(run), skipped)
            self.assertTrue(self.state(run, 165) == state, last)

    def test_them_on_several_processes(self):
        run = self.configure_with_noise(2)
        done = self.train("run", "--nproc", 2, "--set", "distributed.zero=2")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual([row["step"] for row in self.skipped(run)], [150, 151])

    def test_no_more_than_ten_in_a_row(self):
        run = self.configure_with_noise(30)
        done = self.train()
        self.assertEqual(done.returncode, 1)
        self.assertRegex(support.error_message(done.stderr),
                         r"step 159, of samples 1264 to 1271: loss [\d.]+ and gradient norm .* are "
                         "the limits; it is the 10th in a row .* a larger train.skip_outliers_z")
        self.assertEqual([row["step"] for row in self.skipped(run)], list(range(150, 160)))
        self.assertEqual(self.last_step(), 158)
        done = self.train("run", "--set", "train.skip_outliers_z=1000")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual([row["step"] for row in self.skipped(run)], list(range(150, 159)))
        # Only updates count for AdamW: an own count of 9 too many would make another first step.
        self.assertFalse(self.state(run, 158) == self.state(run, 159))


class Terminal(Life):
    def watch(self, name, columns):
        """What a run writes on a terminal of so many columns."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        process = subprocess.Popen(support.command_line("train", "--config", f"{name}.toml"),
                                   cwd=self.folder, env=support.environment(),
                                   stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            seen += part
        self.assertEqual(process.wait(), 0)
        os.close(ours)
        return seen

    def test_redraws_one_line_for_the_steps_between(self):
        self.configure(total_steps=30, log_every_steps=10)
        seen = self.watch("run", 80)
        self.assertIn(b"\r\x1b[2Kstep  2/30 | ", seen)
        self.assertIn(b"\r\x1b[2Kstep 29/30 | ", seen)
        plain = support.run("train", "--config", "run.toml", "--set", "train.run_dir=again",
                            cwd=self.folder).stderr
        self.assertNotIn(b"\x1b[2K", plain)
        self.assertNotIn(b"step 29/30", plain)
        self.assertIn(b"step 30/30", plain)

    def test_draws_the_fields_that_the_terminal_has_columns_for(self):
        for columns, shown, left_out in ((200, (b"tokens", b"lr", b"left"), ()),
                                         (80, (b"loss", b"tok/s", b"left"), (b"tokens", b"lr")),
                                         (60, (b"loss", b"tok/s", b"left"), (b"tokens", b"mfu"))):
            with self.subTest(columns=columns):
                self.configure(f"wide{columns}", total_steps=30, log_every_steps=30)
                seen = self.watch(f"wide{columns}", columns)
                line = re.search(rb"\x1b\[2K(step 20/30[^\r]*)", seen)[1]
                self.assertLess(len(line), columns)
                for field in shown:
                    self.assertIn(field, line)
                for field in left_out:
                    self.assertNotIn(field, line)


if __name__ == "__main__":
    support.main()
