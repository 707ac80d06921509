"""`rookery plan`: its bytes beside those that steps on this CPU take, and what it refuses."""

import json
import os
import subprocess

import support


class Plan(support.Folder):
    def config(self, **changes):
        sections = support.small_run({"train": "corpus"}, total_steps=2)
        sections["model"].update({"vocab_size": 256, **changes})
        return support.write_config(self.folder / "run.toml", **sections)

    def plan(self, *arguments):
        return json.loads(support.rookery("plan", "--config", self.folder / "run.toml", *arguments,
                                          "--json", "-"))

    # Version, layers, width, vocabulary, sequences, tokens each, dtype, recompute, micro-batches.
    STEPS = (
        ("rwkv4", 6, 384, 256, 4, 256, "fp32", "none", 1),
        ("rwkv4", 8, 256, 2048, 8, 256, "bf16", "none", 1),
        ("rwkv4", 4, 256, 8192, 16, 128, "fp32", "mixes", 1),
        ("rwkv4", 12, 256, 1024, 8, 128, "bf16", "blocks", 1),
        ("rwkv4", 3, 512, 4096, 4, 256, "bf16", "mixes", 3),
        ("rwkv4", 2, 448, 20000, 3, 96, "fp32", "none", 2),
        # Logits that are larger than the holes that a block's forward leaves.
        ("rwkv4", 8, 192, 5000, 16, 256, "bf16", "blocks", 1),
        ("rwkv7", 6, 384, 256, 4, 256, "fp32", "none", 1),
        ("rwkv7", 8, 256, 2048, 8, 256, "bf16", "none", 1),
        ("rwkv7", 3, 512, 4096, 4, 256, "bf16", "mixes", 3),
        ("rwkv7", 8, 192, 5000, 16, 256, "bf16", "blocks", 1),
        ("rwkv5", 6, 384, 256, 4, 256, "fp32", "none", 1),
        ("rwkv5", 3, 512, 4096, 4, 256, "bf16", "mixes", 3),
        ("rwkv6", 6, 384, 256, 4, 256, "fp32", "none", 1),
        ("rwkv6", 3, 512, 4096, 4, 256, "bf16", "mixes", 3),
        ("rwkv6", 8, 192, 2000, 16, 256, "bf16", "blocks", 1),
    )

    def test_has_the_bytes_that_steps_on_this_cpu_take(self):
        self.config()
        for step in self.STEPS:
            version, layers, width, vocab, batch, ctx_len, dtype, recompute, micro_batches = step
            with self.subTest(step):
                plan = self.plan(
                    "--set", f"model.version={version}",
                    "--set", f"model.n_layer={layers}", "--set", f"model.n_embd={width}",
                    "--set", f"model.vocab_size={vocab}", "--set", f"model.ctx_len={ctx_len}",
                    "--set", f"train.batch_size={batch * micro_batches}",
                    "--set", f"train.micro_batch_size={batch}",
                    "--set", f"train.dtype={dtype}", "--set", f"train.recompute={recompute}",
                    "--gpus", 0)["configured"]
                (row,) = json.loads(support.rookery(
                    "bench", "step", "--shape", "S", "--version", version, "--n-layer", layers,
                    "--n-embd", width, "--vocab", vocab, "--batch", batch, "--ctx-len", ctx_len,
                    "--dtype", dtype, "--recompute", recompute, "--micro-batches", micro_batches,
                    "--repeats", 1, "--threads", 1, "--json", "-"))
                self.assertEqual(plan["micro_batches"], micro_batches)
                self.assertAlmostEqual(row["tokens_per_s"] * row["median_ms"] / 1000,
                                       batch * ctx_len * micro_batches, delta=1e-3)
                self.assertAlmostEqual(plan["total_bytes"] / 1e6, row["formula_mb"], delta=0.01)
                self.assertAlmostEqual(plan["total_bytes"] / 1e6 / row["peak_mb"], 1, delta=0.05)

    def test_loads_no_torch(self):
        path = self.config()
        done = subprocess.run(
            support.command_line("plan", "--config", path, "--gpus", 2),
            env={**os.environ, "LD_DEBUG": "files"}, capture_output=True, check=True)
        self.assertIn(b"libstdc++", done.stderr)
        self.assertNotIn(b"torch", done.stderr)

    def test_follows_the_device_unless_gpus_are_given(self):
        self.config()
        self.assertEqual(self.plan()["device"], "cpu")
        self.assertNotIn("tokens_per_s", self.plan()["configured"])
        on_gpu = self.plan("--set", "train.device=cuda")
        self.assertEqual((on_gpu["device"], on_gpu["processes"]), ("h100", 1))
        self.assertEqual(on_gpu["memory_bytes"], 80e9)
        self.assertGreater(on_gpu["configured"]["tokens_per_s"], 0)
        self.assertEqual(self.plan("--gpus", 4, "--gpu", "h200")["memory_bytes"], 141e9)

    def test_of_rwkv7_says_what_its_recurrence_takes(self):
        config = self.config(version="rwkv7", head_size=32)
        plan = self.plan("--gpus", 2)["configured"]
        self.assertGreater(plan["walk_ms"], 0)
        self.assertGreater(plan["compute_ms"], plan["walk_ms"])
        text = support.rookery("plan", "--config", config, "--gpus", 2).decode()
        self.assertRegex(text, rf"(?m)tokens/s, {plan['walk_ms']:.1f} ms of it in the recurrence")
        self.assertRegex(text, r"(?m)^recurrence: .* cycles a token .*fitted")
        self.config()
        self.assertEqual(self.plan("--gpus", 2)["configured"]["walk_ms"], 0)
        self.assertNotIn("recurrence", support.rookery("plan", "--config", config, "--gpus", 2)
                         .decode())

    def test_takes_sizes_of_memory_in_every_way_to_write_them(self):
        self.config()
        for text, size in (("80GB", 80e9), ("80 GB", 80e9), ("80GiB", 80 * 2**30),
                           ("80 GiB", 80 * 2**30), ("80e9", 80e9), ("512MB", 512e6),
                           ("1.5TB", 1.5e12)):
            self.assertEqual(self.plan("--memory", text)["memory_bytes"], size, text)

    def test_is_of_the_stage_that_is_configured_beside_all_that_fit(self):
        self.config()
        stages = {}
        for stage in (0, 1, 2):
            plan = self.plan("--gpus", 2, "--set", f"distributed.zero={stage}")
            stages[stage] = plan["configured"]["bytes"]
            self.assertEqual(plan["configured"]["zero_stage"], stage)
            self.assertEqual({row["zero_stage"] for row in plan["fitting"]}, {0, 1, 2})
        self.assertAlmostEqual(stages[1]["moments"], stages[0]["moments"] / 2, delta=1)
        self.assertEqual(stages[1]["gradients"], stages[0]["gradients"])
        # Of a model this small all gradients are one bucket.
        self.assertAlmostEqual(stages[2]["gradients"], 1.5 * stages[0]["gradients"], delta=1)
        # One process has nothing to share.
        alone = self.plan("--gpus", 1, "--set", "distributed.zero=2")
        self.assertEqual(alone["configured"]["zero_stage"], 0)

    def test_prints_a_table_and_the_constants(self):
        text = support.rookery("plan", "--config", self.config(), "--gpus", 2,
                               "--json", self.folder / "plan.json").decode()
        plan = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        self.assertEqual(sum(plan["configured"]["bytes"].values()) // 1000,
                         plan["configured"]["total_bytes"] // 1000)
        for kind, count in plan["configured"]["bytes"].items():
            self.assertRegex(text, rf"(?m)^{kind} +{count / 1e9:.3f}$")
        self.assertRegex(text, r"(?m)^roofline: .*TFLOP/s .*measured on one H100")
        self.assertRegex(text, r"(?m)^none +0 +4 +\d.*best$")

    def test_takes_the_vocabulary_of_the_corpus_and_the_sizes_of_weights(self):
        support.write_text(self.folder / "text.txt", support.text_lines(100))
        support.rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", "text.txt",
                        cwd=self.folder)
        sections = support.small_run({"train": str(self.folder / "corpus")}, total_steps=1)
        sections["train"]["run_dir"] = str(self.folder / "run")
        path = support.write_config(self.folder / "run.toml", **sections)
        support.rookery("train", "--config", path)
        tuned = {**sections, "model": {"ctx_len": 32},
                 "init": {"from": str(self.folder / "run")}}
        of_sizes = self.plan()
        support.write_config(path, **tuned)
        of_weights = self.plan()
        self.assertEqual(of_sizes, of_weights)
        with (self.folder / "run" / "parameters.txt").open(encoding="utf-8") as file:
            last = file.readlines()[-1]
        self.assertTrue(last.startswith(f"{of_sizes['parameters']} of "), last)

    def test_is_printed_when_a_run_starts(self):
        support.write_text(self.folder / "text.txt", support.text_lines(100))
        support.rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", "text.txt",
                        cwd=self.folder)
        self.config()
        for zero, processes, words in (
            (1, 1, r"memory, planned: weights [\d.]+ .B, gradients [^(]* in all\n"),
            (1, 2, r"memory of each of 2 processes, planned for distributed.zero = 1: weights .*"
                   r"gradients [\d.]+ .B, moments [\d.]+ .B \(1 of 2 parts\), .* in all\n"),
        ):
            done = support.run("train", "--config", "run.toml", "--set", f"distributed.zero={zero}",
                               "--set", f"train.run_dir=run{processes}", "--nproc", processes,
                               cwd=self.folder)
            self.assertEqual(done.returncode, 0, done.stderr.decode())
            self.assertRegex(done.stderr.decode(), words)

    def refuses(self, *arguments, words):
        with self.subTest(arguments):
            done = support.run("plan", *arguments, cwd=self.folder)
            message = support.error_message(done.stderr)
            self.assertEqual((done.returncode, done.stdout), (2, b""), message)
            self.assertEqual(len(message.splitlines()), 1, message)
            for word in words:
                self.assertIn(word, message)

    def test_refuses_what_cannot_be_meant(self):
        self.config()
        config = ("--config", "run.toml")
        self.refuses(words=["--config is not given"])
        self.refuses(*config, "--gpu", "h10", words=["--gpu h10", "h100, h200, a100"])
        for memory in ("80", "80 XB", "GB", "-80GB", "80GB or so", "nan", "infGB", "1e30GB", ""):
            self.refuses(*config, f"--memory={memory}", words=["--memory", "such as 80GB"])
        self.refuses(*config, "--gpus=-1", words=["--gpus -1: must be 0 or more"])
        self.refuses(*config, "--gpus", 9, words=["train.batch_size = 8 for --gpus 9"])
        self.refuses(*config, "--gpus", 2, "--set", "distributed.zero=3",
                     words=["distributed.zero = 3"])
        self.refuses(*config, "--set", "model.n_embd=-3", words=["model.n_embd = -3"])
        self.refuses(*config, "--set", "model.n_embed=3", words=["n_embed", "n_embd"])
        for large in ("model.n_layer=2000000000", "model.n_embd=500000000"):
            self.refuses(*config, "--set", large, words=["00000000", "too large to plan"])
        self.refuses(*config, "--gpus", 1, "--set", "model.version=rwkv6", "--set",
                     "model.head_size=8", words=["--gpus 1", "no CUDA kernels for rwkv6"])
        self.refuses(*config, "--gpus", 1, "--set", "model.version=rwkv7", "--set",
                     "model.head_size=16", words=["--gpus 1", "no CUDA kernels", "32, 64, 128"])
        self.refuses(*config, "--set", "model.vocab_size=0", words=["model.vocab_size"])
        self.refuses(*config, "--set", 'optimizer.freeze=["emb"]', words=["optimizer.freeze"])


if __name__ == "__main__":
    support.main()
