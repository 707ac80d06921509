"""A model with the World vocabulary: LAMBADA as the author counts it, and ids that are no tokens.

Run by ctest as: test_lambada.py PATH_OF_ROOKERY. The reference is RWKV-LM's own procedure
(RWKV-v7/rwkv_v7_demo.py) written out here over the `rwkv` package, model and tokenizer both.
"""

import importlib.resources
import json
import math
import os
import pathlib
import tempfile
import unittest

import support
from support import rookery

PASSAGES = 40
# Of a training text.
LIKELY_WORDS = 30


class WorldModel(unittest.TestCase):
    """A small World model, trained for a few steps on texts that end in few different words."""

    @classmethod
    def setUpClass(cls):
        os.environ["RWKV_JIT_ON"] = "0"
        cls.torch = support.package("torch")
        upstream = support.package("rwkv.model")
        vocabulary = importlib.resources.files("rwkv") / "rwkv_vocab_v20230424.txt"
        cls.tokenizer = support.package("rwkv.rwkv_tokenizer").TRIE_TOKENIZER(str(vocabulary))
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        cls.write_passages()
        rookery("tokenize", "--tokenizer", "world", "--output", "text", "text.jsonl",
                cwd=cls.folder)
        support.write_config(cls.folder / "run.toml", **support.small_run(
            {"train": "text", "tokenizer": "world"}, model={"n_embd": 64},
            batch_size=2, total_steps=6))
        rookery("train", "--config", "run.toml", cwd=cls.folder)
        rookery("convert", "run", "model.pth", cwd=cls.folder)
        cls.model = upstream.RWKV(model=str(cls.folder / "model.pth"), strategy="cpu fp32",
                                  verbose=False)

    @classmethod
    def write_passages(cls):
        lines = support.test_data("corpora/lambada/lambada_test.jsonl").read_text().splitlines()
        cls.passages = [json.loads(line)["text"] for line in lines[:PASSAGES]]
        # Half of them end in the word that the short training teaches, "the".
        for i in range(0, PASSAGES, 2):
            cls.passages[i] = cls.passages[i].rsplit(" ", 1)[0] + " the"
        rows = [json.dumps({"text": text}) for text in cls.passages]
        support.write_text(cls.folder / "passages.jsonl", rows)
        training = [json.dumps({"text": " the" * LIKELY_WORDS}) for _ in range(20)]
        support.write_text(cls.folder / "text.jsonl", training)

    def reference(self):
        """Perplexity and accuracy, a passage at a time."""
        log_prob_sum, right = 0.0, 0
        for passage in self.passages:
            prefix, word = passage.rsplit(" ", 1)
            context = [0] + self.tokenizer.encode(prefix)
            target = self.tokenizer.encode(" " + word)
            logits, _ = self.model.forward(context + target, None, full_output=True)
            log_probs = self.torch.log_softmax(logits.double(), dim=-1)
            guesses = range(len(context) - 1, len(context) + len(target) - 1)
            log_prob_sum += sum(log_probs[i, token].item()
                                for i, token in zip(guesses, target, strict=True))
            right += all(log_probs[i].argmax().item() == token
                         for i, token in zip(guesses, target, strict=True))
        return math.exp(-log_prob_sum / PASSAGES), right / PASSAGES

    def ours(self, *options):
        return json.loads(rookery("eval", "--lambada", "passages.jsonl", "--json", *options,
                                  cwd=self.folder))

    def test_is_counted_as_upstream_does(self):
        perplexity, accuracy = self.reference()
        # A reference that is always or never right would agree with much that is wrong.
        self.assertGreater(accuracy, 0.1)
        self.assertLess(accuracy, 0.9)
        for options in (("--model", "run"), ("--model", "run", "--batch-size", 1),
                        ("--model", "model.pth", "--tokenizer", "world", "--batch-size", 40)):
            with self.subTest(options):
                result = self.ours(*options)
                self.assertEqual(result["passages"], PASSAGES)
                self.assertEqual(result["accuracy"], accuracy)
                self.assertLess(abs(result["perplexity"] / perplexity - 1), 1e-4)

    def test_prints_the_same_for_people(self):
        result = self.ours("--model", "run")
        text = rookery("eval", "--model", "run", "--lambada", "passages.jsonl",
                       cwd=self.folder).decode()
        self.assertIn(f"{PASSAGES} passages predicted, {result['target_tokens']} tokens\n", text)
        self.assertIn(f"accuracy {result['accuracy']:.4f}  perplexity", text)

    def test_that_is_no_number_fails(self):
        weights = self.torch.load(self.folder / "model.pth")
        weights["head.weight"][7] = math.nan
        self.torch.save(weights, self.folder / "nan.pth")
        done = support.run("eval", "--lambada", "passages.jsonl", "--json", "--model", "nan.pth",
                           "--tokenizer", "world", cwd=self.folder)
        self.assertEqual(done.returncode, 1)
        self.assertIn("perplexity is not a number", support.error_message(done.stderr))
        self.assertIsNone(json.loads(done.stdout)["perplexity"])

    def test_ids_without_a_token_are_never_written(self):
        # Whatever the state, the six ids past the last token now have by far the largest logits.
        weights = self.torch.load(self.folder / "model.pth")
        weights["ln_out.bias"][:] = 1
        weights["ln_out.weight"][:] = 0.1
        weights["head.weight"][65530:65536] = 1
        self.torch.save(weights, self.folder / "greedy.pth")
        for temperature in (0, 1):
            with self.subTest(temperature):
                done = support.run("generate", "--model", "greedy.pth", "--tokenizer", "world",
                                   "--prompt", "Once", "--length", 20,
                                   "--temperature", temperature, cwd=self.folder)
                self.assertEqual((done.returncode, done.stderr), (0, b""))
                self.assertTrue(done.stdout.startswith(b"Once"))


if __name__ == "__main__":
    support.main()
