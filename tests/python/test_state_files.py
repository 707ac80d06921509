"""States in files: written by one command, read by another, by RWKV-LM's tools, and from them.

Run by ctest as: test_state_files.py PATH_OF_ROOKERY.
"""

import json
import pathlib
import shutil
import tempfile
import unittest

import support
from support import rookery

MODELS = {"rwkv4": {"version": "rwkv4"},
          "rwkv7": {"version": "rwkv7", "n_embd": 64, "head_size": 32}}


class StateFiles(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        support.write_text(cls.folder / "text.txt", support.text_lines(300))
        support.write_text(cls.folder / "valid.txt", support.text_lines(20, seed=2))
        for name in ("text", "valid"):
            rookery("tokenize", "--tokenizer", "bytes", "--output", name, f"{name}.txt",
                    cwd=cls.folder)
        for version, model in MODELS.items():
            support.write_config(cls.folder / f"{version}.toml", **support.small_run(
                {"train": "text", "validation": "valid", "tokenizer": "bytes"},
                model=model, run_dir=version, total_steps=30))
            rookery("train", "--config", f"{version}.toml", cwd=cls.folder)
        cls.torch = support.package("torch")

    def rookery(self, *arguments):
        return rookery(*arguments, cwd=self.folder)

    def generate(self, version, prompt, *options):
        return self.rookery("generate", "--model", version, "--temperature", 0, "--prompt", prompt,
                            *options).decode()

    def refused(self, code, *arguments):
        """The message of a command that fails and leaves the folder as it was."""
        before = support.listing(self.folder)
        done = support.run(*arguments, cwd=self.folder)
        self.assertEqual(done.returncode, code, done.stderr.decode())
        self.assertEqual(done.stdout, b"")
        self.assertEqual(support.listing(self.folder), before)
        return support.error_message(done.stderr)

    def time_state(self, name, value=0.5, shape=(2, 32, 32), layers=2):
        generator = self.torch.Generator().manual_seed(3)
        tensors = {f"blocks.{i}.att.time_state":
                   value * self.torch.randn(shape, generator=generator) for i in range(layers)}
        self.torch.save(tensors, self.folder / name)
        return tensors

    def test_a_text_in_two_halves_is_the_text_in_one(self):
        for version in MODELS:
            whole = self.generate(version, "The little dog", "--length", 30)
            for half in ("half.safetensors", "half.bin"):
                self.generate(version, "The litt", "--length", 0, "--save-state", half)
                rest = self.generate(version, "le dog", "--length", 30, "--state", half)
                self.assertEqual("The litt" + rest, whole)
            # And where text was written in between: it has been read, too.
            first = self.generate(version, "The little dog", "--length", 10,
                                  "--save-state", "half.safetensors").removesuffix("\n")
            rest = self.generate(version, whole[len(first):][:1], "--length", 19,
                                 "--state", "half.safetensors")
            self.assertEqual(first + rest, whole)

    def test_inspect_says_what_it_is(self):
        self.generate("rwkv7", "The", "--length", 0, "--save-state", "s.safetensors")
        shown = json.loads(self.rookery("inspect", "s.safetensors", "--json"))
        self.assertEqual(shown["kind"], "RWKV state")
        self.assertEqual(shown["metadata"], {"version": "rwkv7", "n_layer": "2", "n_embd": "64",
                                             "head_size": "32"})
        self.time_state("t.pth")
        shown = json.loads(self.rookery("inspect", "t.pth", "--json"))
        self.assertEqual(shown["kind"], "RWKV states (att.time_state)")

    def test_convert_writes_what_torch_and_rwkv_lm_read(self):
        self.generate("rwkv7", "The little", "--length", 0, "--save-state", "s.safetensors")
        self.rookery("convert", "s.safetensors", "t.pth")
        tensors = self.torch.load(self.folder / "t.pth", weights_only=True)
        self.assertEqual(list(tensors), ["blocks.0.att.time_state", "blocks.1.att.time_state"])
        own = support.read_safetensors(self.folder / "s.safetensors")
        for layer in range(2):
            dtype, shape, content = own[f"blocks.{layer}.att.wkv"]
            self.assertEqual((dtype, shape), ("F32", [2, 32, 32]))
            expected = self.torch.frombuffer(bytearray(content), dtype=self.torch.float32)
            theirs = tensors[f"blocks.{layer}.att.time_state"]
            self.assertTrue(self.torch.equal(theirs, expected.view(shape).transpose(1, 2)))
        # As it is, where the format has a place for all of it.
        self.rookery("convert", "s.safetensors", "u.st")
        self.assertEqual(support.read_safetensors(self.folder / "u.st"), own)
        self.generate("rwkv4", "The", "--length", 0, "--save-state", "s4.safetensors")
        self.assertIn("expected [heads, N, N]",
                      self.refused(1, "convert", "s4.safetensors", "t4.pth"))

    def test_convert_writes_the_buffer_of_rwkv_cpp(self):
        for version in MODELS:
            for name in ("s.safetensors", "s.bin"):
                self.generate(version, "The little", "--length", 0, "--save-state", name)
            self.rookery("convert", "s.safetensors", "t.bin")
            self.assertEqual((self.folder / "t.bin").read_bytes(),
                             (self.folder / "s.bin").read_bytes())
        self.assertIn("fp32", self.refused(2, "convert", "s.safetensors", "u.bin",
                                           "--dtype", "bf16"))
        self.assertIn("holds no state by --save-state",
                      self.refused(2, "convert", "rwkv7", "u.bin"))

    def test_a_tuned_state_of_torch_changes_eval_as_it_should(self):
        plain = json.loads(self.rookery("eval", "--model", "rwkv7", "--data", "valid", "--json"))
        for value, differs in ((0, False), (0.5, True)):
            self.time_state("tuned.pth", value)
            tuned = json.loads(self.rookery("eval", "--model", "rwkv7", "--data", "valid",
                                            "--state", "tuned.pth", "--json"))
            self.assertEqual(tuned["loss"] != plain["loss"], differs)

    def train(self, *options):
        self.rookery("train", "--config", "rwkv7.toml", *(f"--set={option}" for option in options))

    def test_every_sequence_of_a_run_starts_from_init_state(self):
        self.time_state("start.pth")
        start = ("init.state=start.pth", "init.from=rwkv7", "train.run_dir=tuned",
                 "train.save_every_steps=10")
        self.train(*start, "train.total_steps=20")
        last = support.metrics(self.folder / "tuned")[-1]
        losses = [json.loads(self.rookery("eval", "--model", "tuned", "--data", "valid", "--json",
                                          *state))["loss"]
                  for state in ((), ("--state", "start.pth"), ("--state", "none"))]
        self.assertAlmostEqual(last["validation_loss"], losses[0], delta=1e-5)
        self.assertEqual(losses[1], losses[0])
        self.assertGreater(losses[2], losses[0] + 1e-3)
        # It goes on from the same state, wherever it lies, and from no other.
        (self.folder / "start.pth").rename(self.folder / "moved.pth")
        checkpoint = self.folder / "tuned" / "checkpoints" / "step_00000020"
        weights = support.read_safetensors(checkpoint / "model.safetensors")
        shutil.rmtree(checkpoint)
        self.train(*start, "train.total_steps=20", "init.state=moved.pth")
        self.assertTrue(support.read_safetensors(checkpoint / "model.safetensors") == weights)
        self.time_state("moved.pth", value=0.6)
        for option, text in ((["init.state=moved.pth"], "now it is one with the checksum"),
                             ([], "now it is none")):
            options = (*start[1:], "train.total_steps=20", *option)
            done = support.run("train", "--config", "rwkv7.toml",
                               *(f"--set={option}" for option in options), cwd=self.folder)
            self.assertEqual(done.returncode, 2)
            self.assertIn(text, support.error_message(done.stderr))

    def test_a_runs_model_starts_from_the_runs_state(self):
        self.time_state("own.pth", value=5)
        self.train("init.state=own.pth", "init.from=rwkv7", "train.run_dir=own",
                   "train.total_steps=5", "sample.every_steps=5", "sample.prompt=The",
                   "sample.length=20", "sample.temperature=0")
        sample = json.loads((self.folder / "own/samples.jsonl").read_text().splitlines()[-1])
        of_itself = self.generate("own", "The", "--length", 20)
        self.assertIn(sample["text"], of_itself)
        self.assertNotEqual(self.generate("own", "The", "--length", 20, "--state", "none"),
                            of_itself)
        self.rookery("convert", "own", "own.safetensors")
        self.assertEqual(self.generate("own.safetensors", "The", "--length", 20), of_itself)
        # One that is given goes first, whatever became of the run's.
        (self.folder / "own.pth").rename(self.folder / "kept.pth")
        self.time_state("own.pth", value=0.6)
        eval_own = ("eval", "--model", "own", "--data", "valid")
        self.assertIn("from the state in own.pth (init.state), then with the checksum",
                      self.refused(1, *eval_own))
        (self.folder / "own.pth").unlink()
        for model in ("own", "own.safetensors"):
            message = self.refused(1, "generate", "--model", model, "--prompt", "The")
            self.assertIn("from the state in own.pth (init.state), which is not there; name the "
                          "file with --state, or begin from nothing with --state none", message)
        self.rookery(*eval_own, "--state", "kept.pth")

    def test_a_run_from_weights_that_had_a_state_says_that_it_has_none(self):
        self.time_state("first.pth")
        self.train("init.state=first.pth", "init.from=rwkv7", "train.run_dir=first",
                   "train.total_steps=5")
        for options, warns in (((), True), (("init.state=first.pth",), False)):
            run = ("train", "--config", "rwkv7.toml", "--set=init.from=first",
                   f"--set=train.run_dir=second{warns}", "--set=train.total_steps=5")
            done = support.run(*run, *(f"--set={option}" for option in options), cwd=self.folder)
            self.assertEqual(done.returncode, 0, done.stderr.decode())
            self.assertEqual(b"beginning from the state in first.pth; here each begins from nothing"
                             in done.stdout + done.stderr, warns)

    def test_a_run_that_is_refused_for_its_state_leaves_nothing(self):
        self.generate("rwkv4", "The", "--length", 0, "--save-state", "s4.safetensors")
        for state in ("s4.safetensors", "none.pth"):
            self.assertIn(state, self.refused(1, "train", "--config", "rwkv7.toml", "--set",
                                              "train.run_dir=new", "--set", f"init.state={state}"))

    def test_what_does_not_fit_is_refused_and_nothing_is_written(self):
        self.generate("rwkv4", "The", "--length", 0, "--save-state", "s4.safetensors")
        self.time_state("deep.pth", layers=3)
        self.time_state("wide.pth", shape=(4, 32, 32))
        (self.folder / "cut.safetensors").write_bytes(
            (self.folder / "s4.safetensors").read_bytes()[:-8])
        self.generate("rwkv4", "The", "--length", 0, "--save-state", "s4.bin")
        for state, text in (
                ("s4.safetensors", 'is a state of "rwkv4", expected one of the model\'s version'),
                ("deep.pth", "holds 3 tensors of a state, expected 2"),
                ("wide.pth", "is [4, 32, 32], expected [2, 32, 32]"),
                ("cut.safetensors", "cut.safetensors: "),
                ("s4.bin", "but rwkv.cpp's state of rwkv7 with 2 layers of 64 channels has"),
                ("rwkv7/checkpoints/step_00000030", "holds no state"),
                ("none.pth", "none.pth")):
            command = ("generate", "--model", "rwkv7", "--prompt", "x", "--save-state",
                       "new.safetensors", "--state", state)
            self.assertIn(text, self.refused(1, *command))
        self.assertIn("name a .safetensors",
                      self.refused(2, "generate", "--model", "rwkv7", "--prompt", "x",
                                   "--save-state", "new.pth"))


if __name__ == "__main__":
    support.main()
