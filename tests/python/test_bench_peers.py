"""scripts/bench_peers.py at a tiny size: every contender that is installed has a row."""

import importlib.metadata
import json
import pathlib
import random
import subprocess
import sys

import support

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "bench_peers.py"
# Contenders by table, with the package that each needs. Compiling takes too long for a test.
STEP = {"rookery RWKV-4": None, "GPT, eager PyTorch": "torch",
        "RWKV-4, Hugging Face": "transformers"}
STEP_RWKV7 = {"rookery RWKV-7": None, "GPT, eager PyTorch": "torch",
              "RWKV-7, `rwkv7-hf`, B1": "rwkv7-hf"}
DECODE = {"rookery": None, "`rwkv` package": "rwkv"}
WORLD = {"rookery": None, "`rwkv-tokenizer`": "rwkv-tokenizer",
         "`pyrwkv-tokenizer`": "pyrwkv-tokenizer"}
SENTENCEPIECE = {"rookery": None, "`sentencepiece`": "sentencepiece"}


def is_installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class BenchPeers(support.Folder):
    def write_words(self):
        """A text with enough different words for a vocabulary of 8000."""
        generator = random.Random(1)
        words = ["".join(generator.choices("etaoinshrdlu", k=7)) for _ in range(12000)]
        return support.write_text(self.folder / "a.txt",
                                  [" ".join(words[i:i + 10]) for i in range(0, len(words), 10)])

    def test_has_a_row_for_every_contender_that_is_installed(self):
        for package in ("torch", "rwkv", "sentencepiece"):
            if not is_installed(package):
                support.missing(package)
        done = subprocess.run(
            [sys.executable, SCRIPT, "--program", support.command_line()[0], "--skip-missing",
             "--tables", "step,decode,tokenizer", "--without", "compiled", "--shapes", "tiny",
             "--decode-shape", "tiny", "--dtypes", "fp32", "--rounds", "1", "--repeats", "1",
             "--prompt-len", "4", "--threads", "1", "--text", self.write_words(),
             "--json", self.folder / "out.json"],
            env=support.environment(), capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        tables = json.loads((self.folder / "out.json").read_text())["tables"]
        expected = [STEP, DECODE, DECODE, WORLD, SENTENCEPIECE]
        self.assertEqual(len(tables), len(expected))
        for table, contenders in zip(tables, expected, strict=True):
            with self.subTest(table["title"]):
                present = [name for name, package in contenders.items()
                           if not package or is_installed(package)]
                self.assertEqual([row["what"] for row in table["rows"]], present)
                self.assertGreater(min(row["min_ms"] for row in table["rows"]), 0)
                self.assertIn(f"### {table['title']}\n", done.stdout)
                for name in contenders.keys() - set(present):
                    self.assertIn(f"{table['title']}: {name} is skipped", done.stderr)

    def test_times_rwkv7_beside_its_peers(self):
        for package in ("torch", "rwkv"):
            if not is_installed(package):
                support.missing(package)
        done = subprocess.run(
            [sys.executable, SCRIPT, "--program", support.command_line()[0], "--skip-missing",
             "--version", "rwkv7", "--tables", "step,decode", "--without", "compiled",
             "--shapes", "tiny", "--decode-shape", "tiny", "--dtypes", "fp32", "--rounds", "1",
             "--repeats", "1", "--prompt-len", "4", "--threads", "1",
             "--json", self.folder / "out.json"],
            env=support.environment(), capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        tables = json.loads((self.folder / "out.json").read_text())["tables"]
        step = [name for name, package in STEP_RWKV7.items()
                if not package or is_installed(package)]
        self.assertEqual([[row["what"] for row in table["rows"]] for table in tables],
                         [step, [*DECODE], [*DECODE]])
        self.assertIn("RWKV-7 L2 D64", tables[1]["title"])


if __name__ == "__main__":
    support.main()
