"""`rookery inspect` against what PyTorch says of the same tensors, and on every kind of file."""

import json
import math
import os
import pathlib

import support

DATA = pathlib.Path(os.environ.get("ROOKERY_TEST_DATA", "../shared/data"))


def inspect(path):
    return json.loads(support.rookery("inspect", path, "--json"))


class Inspect(support.Folder):
    def save(self, tensors, name="w.pth", **options):
        path = self.folder / name
        support.package("torch").save(tensors, path, **options)
        return path

    def test_statistics_are_those_of_pytorch(self):
        torch = support.package("torch")
        torch.manual_seed(1)
        tensors = {
            "a": torch.randn(300, 257),
            "b": torch.randn(1000).bfloat16(),
            "t": torch.randn(40, 30).t(),
            "i": torch.arange(-5, 20),
            "half": torch.randn(77).half(),
        }
        tensors["a"][3, :50] = 0
        found = {t["name"]: t for t in inspect(self.save(tensors))["tensors"]}
        for name, tensor in tensors.items():
            wide = tensor.double()
            self.assertEqual(found[name]["shape"], list(tensor.shape))
            self.assertEqual(found[name]["zeros"], int((tensor == 0).sum()))
            for key, value in (("mean", wide.mean()), ("std", wide.std(unbiased=False)),
                               ("min", wide.min()), ("max", wide.max()), ("norm", wide.norm())):
                self.assertTrue(math.isclose(found[name][key], value, rel_tol=1e-9, abs_tol=1e-12),
                                f"{name} {key}: {found[name][key]} {value}")

    def test_counts_what_is_not_finite(self):
        torch = support.package("torch")
        path = self.save({"x": torch.tensor([1, math.nan, math.inf, -math.inf, 0])})
        result = inspect(path)
        self.assertEqual(result["not_finite"], 3)
        self.assertEqual((result["tensors"][0]["nan"], result["tensors"][0]["infinite"]), (1, 2))
        row = support.rookery("inspect", path).decode().splitlines()[-1]
        self.assertEqual(row.split()[-1], "3")

    def test_without_a_finite_number_there_are_no_figures(self):
        torch = support.package("torch")
        path = self.save({"x": torch.full((3,), math.nan), "y": torch.full((2,), -math.inf)})
        for tensor in inspect(path)["tensors"]:
            self.assertEqual([tensor[key] for key in ("mean", "std", "min", "max", "norm")],
                             [None] * 5)
        for row in support.rookery("inspect", path).decode().splitlines()[-2:]:
            self.assertEqual(row.split()[3:8], ["-"] * 5)

    def test_states_are_named_as_such(self):
        torch = support.package("torch")
        states = {f"blocks.{i}.att.time_state": torch.zeros(2, 4, 4) for i in range(3)}
        self.assertIn("states", inspect(self.save(states))["kind"])

    def test_tells_a_model(self):
        path = DATA / "derived/pth_reader/tiny-rwkv-4v0-660K.fp32.pth"
        if not path.exists():
            support.missing(str(path))
        result = inspect(path)
        self.assertEqual([result[k] for k in ("kind", "version", "n_layer", "n_embd", "vocab_size")],
                         ["model", "rwkv4", 4, 128, 256])
        self.assertEqual(result["parameters"], sum(t["elements"] for t in result["tensors"]))

    def test_tells_a_corpus_and_its_tokenizer(self):
        text = support.write_text(self.folder / "a.txt", ["ab", "c"])
        support.rookery("tokenize", "--tokenizer", "bytes", "--output", self.folder / "c", text)
        for name in ("c", "c.idx", "c.bin"):
            result = inspect(self.folder / name)
            self.assertEqual((result["tokens"], result["documents"]), (6, 1))
            self.assertEqual((result["least_id"], result["greatest_id"]), (0, ord("c")))
            self.assertEqual(result["tokenizer"]["identity"], "bytes")

    def train(self, **model):
        """A run of three steps."""
        text = support.write_text(self.folder / "a.txt", support.text_lines())
        support.rookery("tokenize", "--tokenizer", "bytes", "--output", self.folder / "c", text)
        config = support.write_config(
            self.folder / "run.toml", **support.small_run({"train": "c"}, model, total_steps=3))
        support.rookery("train", "--config", config, cwd=self.folder)

    def test_tells_a_run_and_its_checkpoint(self):
        self.train()
        run = inspect(self.folder / "run")
        self.assertEqual(run["run"]["last_step"], 3)
        checkpoint = inspect(self.folder / "run" / "checkpoints" / "step_00000003")
        for result in (run, checkpoint):
            self.assertEqual((result["version"], result["n_embd"], result["trainer"]["step"]),
                             ("rwkv4", 32, 3))
            self.assertEqual(result["metadata"]["rookery.config"]["model.n_layer"], "2")
            self.assertIsNone(result["damage"])

    def test_tells_what_a_checkpoint_lacks(self):
        # So large that its weights are not looked at wherever it is listed.
        self.train(n_embd=192)
        checkpoint = self.folder / "run" / "checkpoints" / "step_00000003"
        support.flip_bit(checkpoint / "model.safetensors")
        self.assertRegex(inspect(checkpoint)["damage"],
                         r"step_00000003/model\.safetensors: checksum .*contents have changed")
        support.flip_bit(checkpoint / "model.safetensors")
        (checkpoint / "optimizer.safetensors").unlink()
        self.assertRegex(inspect(checkpoint)["damage"],
                         r"step_00000003/optimizer\.safetensors: is missing")

    def test_tells_tokenizers(self):
        self.assertEqual(inspect("bytes")["vocab_size"], 256)
        for name, kind in (("rwkv_vocab_v20230424.txt", "world:"), ("20B_tokenizer.json", "neox:")):
            path = DATA / "tokenizers" / name
            if not path.exists():
                support.missing(str(path))
            self.assertTrue(inspect(path)["identity"].startswith(kind))

    def test_tells_a_tokenizer_by_its_content(self):
        text = support.write_text(self.folder / "a.txt", support.text_lines())
        support.rookery("tokenizer", "train", "--input", text, "--output",
                        self.folder / "a.model", "--vocab-size", 300)
        (self.folder / "a.model").rename(self.folder / "renamed")
        self.assertTrue(inspect(self.folder / "renamed")["identity"].startswith("sentencepiece:"))

    def test_takes_no_other_json_for_a_tokenizer(self):
        index = support.write_text(self.folder / "model.safetensors.index.json",
                                   ['{"weight_map": {"emb.weight": "model-1.safetensors"}}'])
        done = support.run("inspect", index)
        self.assertEqual(done.returncode, 1)
        self.assertIn("is JSON text", support.error_message(done.stderr))
        self.assertIn("an index of shards", support.error_message(done.stderr))

    def test_tells_event_files(self):
        support.package("torch")
        writer = support.package("torch.utils.tensorboard").SummaryWriter(str(self.folder / "t"))
        for step in range(3):
            writer.add_scalar("loss", step / 2, step)
        writer.close()
        (path,) = (self.folder / "t").iterdir()
        tag = inspect(path)["tags"]["loss"]
        self.assertEqual((tag["kind"], tag["points"], tag["last_step"], tag["last_value"]),
                         ("scalar", 3, 2, 1))
        self.assertIn(b"kind scalar, points 3", support.rookery("inspect", path))

    def test_does_not_hand_commands_to_the_terminal(self):
        torch = support.package("torch")
        path = self.save({"a\x1b[31m\tb\x9b31m\u202e\u2066Größe": torch.zeros(1)})
        printed = support.rookery("inspect", path).decode()
        self.assertIn("a?[31m?b??31m??????Größe", printed)
        # Nor do texts of errors.
        done = support.run("inspect", self.folder / "no\x9b\u202eGröße")
        self.assertIn("no\\xc2\\x9b\\xe2\\x80\\xaeGröße", done.stderr.decode())

    def test_refuses_what_it_cannot_read(self):
        (self.folder / "text").write_text("some text\n")
        (self.folder / "cut.idx").write_bytes(b"MMIDIDX\0\0")
        (self.folder / "empty").write_bytes(b"")
        for name in ("text", "cut.idx", "empty", "none", "."):
            done = support.run("inspect", self.folder / name)
            self.assertEqual(done.returncode, 1, name)
            self.assertIn(str(self.folder), support.error_message(done.stderr))


if __name__ == "__main__":
    support.main()
