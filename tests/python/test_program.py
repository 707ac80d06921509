"""The path of a user through the program: text, tokens, training, checkpoint, text.

Run by ctest as: test_program.py PATH_OF_ROOKERY.
"""

import json
import math
import os
import pathlib
import re
import struct
import tempfile
import tomllib
import unittest
import unittest.mock

import support
from support import rookery

COMMANDS = ("tokenize", "train", "eval", "generate", "logits", "convert", "tokenizer train")


def losses(text):
    """{"model": 1.23, "unigram": 2.34, ...} of what `rookery eval` prints."""
    found = re.findall(r"^(\w+) +loss (\d+\.\d+)  perplexity +(\d+\.\d+)", text.decode(), re.M)
    for name, loss, perplexity in found:
        if abs(math.exp(float(loss)) / float(perplexity) - 1) > 1e-2:
            raise AssertionError(f"{name}: perplexity {perplexity} is not exp({loss})")
    return {name: float(loss) for name, loss, _ in found}


def read_logits(path):
    """Rows of the one tensor "logits"."""
    tensors = support.read_safetensors(path)
    dtype, (rows, columns), content = tensors.pop("logits")
    if tensors or dtype != "F32":
        raise AssertionError(f"{path}: {dtype} logits beside {list(tensors)}")
    flat = struct.unpack(f"<{rows * columns}f", content)
    return [flat[row * columns : (row + 1) * columns] for row in range(rows)]


def greatest_difference(a, b):
    return max(abs(x - y) for row_a, row_b in zip(a, b, strict=True)
               for x, y in zip(row_a, row_b, strict=True))


class Path:
    """The tests, for one tokenizer each in the classes below: everything is made once, from text to
    a trained model, and the tests look at it."""

    tokenizer = ""
    # Where the first token of the samples starts; 64 of them are the reference sequence below.
    prompt = "The little"

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        support.write_text(cls.folder / "train.txt", support.text_lines(900, seed=1))
        # As rows of JSON: the other kind of text.
        rows = [json.dumps({"id": i, "text": line + "\n"})
                for i, line in enumerate(support.text_lines(200, seed=2))]
        support.write_text(cls.folder / "validation.jsonl", rows)
        cls.make_tokenizer()
        for name in ("train.txt", "validation.jsonl"):
            rookery("tokenize", "--tokenizer", cls.tokenizer,
                    "--output", name.partition(".")[0], name, cwd=cls.folder)
        support.write_config(cls.folder / "run.toml", **support.small_run(
            {"train": "train", "validation": "validation", "tokenizer": cls.tokenizer},
            total_steps=60, log_every_steps=20))
        cls.trained = support.run("train", "--config", "run.toml", cwd=cls.folder)

    @classmethod
    def make_tokenizer(cls):
        pass

    def rookery(self, *arguments):
        return rookery(*arguments, cwd=self.folder)

    def ids(self, count=64):
        return ",".join(str(3 + 7 * i % 250) for i in range(count))

    def logits(self, model, *options):
        self.rookery("logits", "--model", model, "--tokens", self.ids(), "--all",
                     "--output", "logits.safetensors", *options)
        return read_logits(self.folder / "logits.safetensors")

    def test_training_ends_well_and_logs_to_stderr_alone(self):
        self.assertEqual(self.trained.returncode, 0, self.trained.stderr.decode())
        self.assertEqual(self.trained.stdout, b"")
        self.assertRegex(self.trained.stderr.decode(), r"step +60/60 .* \| val ")
        self.assertEqual([row["step"] for row in support.metrics(self.folder / "run")],
                         [1, 20, 40, 60])
        self.assertEqual(support.checkpoints(self.folder / "run"), ["step_00000060"])

    def test_the_model_is_much_better_than_counting_tokens(self):
        result = losses(self.rookery("eval", "--model", "run", "--data", "validation",
                                     "--baseline", "train"))
        self.assertEqual(set(result), {"model", "bigram", "unigram"})
        self.assertLess(result["bigram"], result["unigram"])
        self.assertLess(result["model"], 0.7 * result["unigram"])
        # What training measured at its end is what eval measures.
        last = support.metrics(self.folder / "run")[-1]["validation_loss"]
        self.assertAlmostEqual(last, result["model"], delta=2e-4)

    def test_eval_counts_every_token_but_the_first_and_knows_the_bytes_of_the_text(self):
        record = json.loads((self.folder / "validation.tokenizer.json").read_text())
        text = self.rookery("eval", "--model", "run", "--data", "validation").decode()
        self.assertIn(f"validation: {record['num_tokens'] - 1} tokens predicted, 32 at a time\n",
                      text)
        rows = (self.folder / "validation.jsonl").read_text().splitlines()
        text_bytes = sum(len(json.loads(row)["text"]) for row in rows)
        self.assertEqual(record["text_bytes"], text_bytes)
        loss, bits = map(float, re.search(r"loss (\S+) .* bits per byte (\S+)", text).groups())
        self.assertAlmostEqual(bits, loss / math.log(2) * record["num_tokens"] / text_bytes,
                               delta=1e-3)

    def evaluate(self, *options):
        return json.loads(self.rookery("eval", "--model", "run", "--json", *options))

    def test_eval_of_text_files_is_that_of_the_corpus_documents_each_by_itself(self):
        of_text = self.evaluate("--text", "validation.jsonl", "--by-document")
        of_corpus = self.evaluate("--data", "validation", "--by-document")
        lines = (self.folder / "validation.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"].encode() for line in lines]
        for row in of_text["documents"]["each"] + of_text["documents"]["worst"]:
            # Of a corpus' documents, the bytes are not known.
            self.assertAlmostEqual(row.pop("bits_per_byte"), row["loss"] / math.log(2)
                                   * row["tokens"] / len(texts[row["document"]]))
        for result in (of_text, of_corpus):
            del result["source"]
        self.assertEqual(of_text, of_corpus)
        self.assertEqual(of_text["documents"]["count"], 200)
        each = of_text["documents"]["each"]
        self.assertEqual([row["document"] for row in each], list(range(200)))
        self.assertEqual(sum(row["tokens"] for row in each), of_text["tokens"])
        self.assertAlmostEqual(sum(row["tokens"] * row["loss"] for row in each),
                               of_text["tokens"] * of_text["loss"], delta=1e-6 * of_text["tokens"])
        self.assertAlmostEqual(each[7]["perplexity"], math.exp(each[7]["loss"]))
        # The ends of the documents are not predicted.
        record = json.loads((self.folder / "validation.tokenizer.json").read_text())
        self.assertEqual(of_text["tokens"], record["num_tokens"] - 200)
        self.assertAlmostEqual(of_text["bits_per_byte"], of_text["loss"] / math.log(2)
                               * of_text["tokens"] / record["text_bytes"])
        quantiles = [row["loss"] for row in of_text["documents"]["quantiles"]]
        self.assertEqual(quantiles, sorted(quantiles))
        self.assertEqual(quantiles[-1], of_text["documents"]["worst"][0]["loss"])
        worst = of_text["documents"]["worst"][0]
        rows = (self.folder / "validation.jsonl").read_text().splitlines()
        self.assertEqual(worst["opening"], json.loads(rows[worst["document"]])["text"][:60]
                         .replace("\n", " "))

    def test_eval_falls_with_the_tokens_read_before(self):
        result = self.evaluate("--data", "validation", "--by-position")
        rows = result["positions"]
        self.assertEqual([(row["first"], row["last"]) for row in rows],
                         [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)])
        self.assertEqual(sum(row["tokens"] for row in rows), result["tokens"])
        mean = sum(row["tokens"] * row["loss"] for row in rows) / result["tokens"]
        self.assertAlmostEqual(mean, result["loss"])
        self.assertLess(rows[-1]["loss"], 0.9 * rows[0]["loss"])
        self.assertAlmostEqual(rows[3]["perplexity"], math.exp(rows[3]["loss"]))

    def test_eval_prints_for_people_what_it_prints_as_json(self):
        options = ("--data", "validation", "--baseline", "train")
        result = self.evaluate(*options)
        printed = losses(self.rookery("eval", "--model", "run", *options))
        self.assertEqual(printed["model"], round(result["loss"], 4))
        self.assertEqual(printed["bigram"], round(result["baselines"]["bigram"]["loss"], 4))
        text = self.rookery("eval", "--model", "run", "--data", "validation", "--by-document",
                            "--by-position").decode()
        result = self.evaluate("--data", "validation", "--by-document")
        self.assertIn(f"\ndocuments  mean {result['documents']['mean_loss']:.4f}  min ", text)
        worst = result["documents"]["worst"][0]
        self.assertIn(f"\nworst      loss {worst['loss']:.4f}  perplexity "
                      f"{worst['perplexity']:10.2f}  document {worst['document']}, "
                      f"{worst['tokens']} tokens: {worst['opening']}\n", text)
        self.assertRegex(text, r"\nposition   loss \S+  perplexity +\S+  after 3 to 4 tokens "
                         r"\(\d+ predictions\)\n")

    def test_the_same_seed_gives_the_same_text_and_another_seed_another(self):
        def sample(seed):
            return self.rookery("generate", "--model", "run", "--prompt", self.prompt,
                                "--length", 60, "--seed", seed)
        first = sample(1)
        self.assertEqual(first, sample(1))
        self.assertNotEqual(first, sample(2))

    def test_generated_text_goes_on_with_the_prompt_in_learnt_words(self):
        done = support.run("generate", "--model", "run", "--prompt", self.prompt,
                           "--length", 60, "--temperature", 0, cwd=self.folder)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout.startswith(self.prompt.encode()), done.stdout)
        self.assertRegex(done.stdout, rb"[a-z]+ over the [a-z]+")

    def test_recurrent_mode_gives_the_logits_of_parallel_mode(self):
        parallel = self.logits("run", "--mode", "parallel")
        recurrent = self.logits("run", "--mode", "recurrent")
        self.assertEqual(len(parallel), 64)
        self.assertLess(greatest_difference(parallel, recurrent), 1e-4)
        # So close means something only where the logits differ much between themselves.
        self.assertGreater(max(parallel[-1]) - min(parallel[-1]), 1)
        # And bf16 is the same model, roughly.
        rough = self.logits("run", "--dtype", "bf16")
        self.assertNotEqual(rough, parallel)
        self.assertLess(greatest_difference(rough, parallel), 0.5)

    def test_logits_prints_the_last_row_of_all(self):
        rows = self.logits("run")
        printed = self.rookery("logits", "--model", "run", "--tokens", self.ids()).split()
        # Nine digits tell every fp32 from its neighbours.
        values = [struct.unpack("<f", struct.pack("<f", float(value)))[0] for value in printed]
        self.assertEqual(values, list(rows[-1]))

    def test_models_converted_there_and_back_are_bit_for_bit_the_same(self):
        self.rookery("convert", "run", "a.pth")
        self.rookery("convert", "a.pth", "b.safetensors")
        self.rookery("convert", "b.safetensors", "c.pth")
        self.assertEqual(*((self.folder / name).read_bytes() for name in ("a.pth", "c.pth")))
        expected = self.logits("run")
        for model in ("run", "run/checkpoints/step_00000060", "a.pth", "b.safetensors"):
            with self.subTest(model):
                self.assertEqual(self.logits(model), expected)

    def test_a_converted_model_still_writes_where_it_is_told_the_tokenizer(self):
        arguments = ("--prompt", self.prompt, "--length", 20)
        expected = self.rookery("generate", "--model", "run", *arguments)
        # .safetensors keeps the run's configuration, and with it the tokenizer; .pth cannot.
        self.rookery("convert", "run", "kept.safetensors")
        self.rookery("convert", "run", "lost.pth")
        self.assertEqual(self.rookery("generate", "--model", "kept.safetensors", *arguments),
                         expected)
        self.assertEqual(self.rookery("generate", "--model", "lost.pth",
                                      "--tokenizer", self.tokenizer, *arguments), expected)


class Bytes(Path, unittest.TestCase):
    tokenizer = "bytes"

    def test_tokens_are_the_bytes_of_the_text_and_a_zero(self):
        content = (self.folder / "train.bin").read_bytes()
        ids = struct.unpack(f"<{len(content) // 2}H", content)
        self.assertEqual(bytes(ids), (self.folder / "train.txt").read_bytes() + b"\0")


class Sentencepiece(Path, unittest.TestCase):
    tokenizer = "sentencepiece:text.model"

    @classmethod
    def make_tokenizer(cls):
        out = rookery("tokenizer", "train", "--input", "train.txt", "--output", "text.model",
                      "--vocab-size", 320, cwd=cls.folder)
        if out != b"text.model\n":
            raise AssertionError(out)

    def test_eval_by_document_does_without_the_tokenizer_where_its_file_is_gone(self):
        options = ("--data", "validation", "--by-document")
        expected = self.evaluate(*options)
        moved = (self.folder / "text.model").rename(self.folder / "moved.model")
        self.addCleanup(moved.rename, self.folder / "text.model")
        result = self.evaluate(*options)
        self.assertEqual(result["loss"], expected["loss"])
        self.assertEqual({row["opening"] for row in result["documents"]["worst"]}, {""})
        done = support.run("eval", "--model", "run", *options, "--tokenizer",
                           "sentencepiece:text.model", cwd=self.folder)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"text.model", done.stderr)

    def test_tokens_are_fewer_than_bytes_and_end_each_document(self):
        record = json.loads((self.folder / "validation.tokenizer.json").read_text())
        self.assertEqual(record["vocab_size"], 320)
        self.assertLess(record["num_tokens"], 0.9 * record["text_bytes"])
        content = (self.folder / "validation.bin").read_bytes()
        ids = struct.unpack(f"<{len(content) // 2}H", content)
        self.assertEqual(ids.count(record["end_of_document"]), 200)
        self.assertEqual(ids[-1], record["end_of_document"])


class Help(unittest.TestCase):
    def test_lists_every_command(self):
        text = rookery("--help").decode()
        for command in COMMANDS:
            self.assertRegex(text, rf"(?m)^  {command.split()[0]} +\w")
        self.assertEqual(rookery().decode(), text)

    def test_of_every_command_shows_an_example_of_it(self):
        for command in COMMANDS:
            with self.subTest(command):
                text = rookery(*command.split(), "--help").decode()
                self.assertRegex(text, rf"Example:\n  rookery {command} -*\w")
        self.assertIn("Example:\n", rookery("tokenizer", "--help").decode())

    def test_examples_have_only_options_that_the_help_lists(self):
        for command in COMMANDS:
            text = rookery(*command.split(), "--help").decode()
            options, _, example = text.partition("Example:")
            used = re.findall(r"--[a-z-]+", example)
            self.assertEqual([], [name for name in used if name not in options], command)

    def test_says_which_version_it_is(self):
        self.assertRegex(rookery("--version").decode(), r"^rookery \d+\.\d+\.\d+\n$")


class ForeignFiles(support.Folder):
    """A model and a corpus that others made: neither says anything of a tokenizer."""

    def setUp(self):
        super().setUp()
        folder = support.test_data("derived/rwkv4_synthetic")
        self.model = folder / "weights_fp32.pth"
        self.expected = json.loads((folder / "summary.json").read_text())["loss_ce_mean"]
        ids = struct.unpack("<42i", (folder / "tokens_i32_2x21.bin").read_bytes())
        self.write_corpus("corpus", [ids[:21], ids[21:]])

    def write_corpus(self, prefix, documents):
        sizes = [len(document) for document in documents]
        starts = [2 * sum(sizes[:i]) for i in range(len(sizes))]
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
        index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *starts)
        index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
        (self.folder / f"{prefix}.idx").write_bytes(index)
        (self.folder / f"{prefix}.bin").write_bytes(b"".join(
            struct.pack(f"<{len(document)}H", *document) for document in documents))

    def test_have_the_loss_that_float64_maths_gives(self):
        result = json.loads(rookery("eval", "--model", self.model, "--data", "corpus",
                                    "--by-document", "--json", cwd=self.folder))
        # Of 21 tokens the first is given: nobody says which token would stand before it.
        self.assertEqual((result["tokens"], result["documents"]["count"]), (40, 2))
        self.assertAlmostEqual(result["loss"], self.expected, delta=1e-6)
        self.assertNotIn("bits_per_byte", result)

    def test_that_give_no_loss_fail_and_say_in_which_document(self):
        torch = support.package("torch")
        weights = torch.load(self.model)
        token = 5
        weights["emb.weight"][token] = math.nan
        torch.save(weights, self.folder / "nan.pth")
        self.write_corpus("spoilt", [[1, 2, 3], [1, token, 3], [3, 2, 1]])
        options = ("eval", "--model", "nan.pth", "--data", "spoilt", "--by-document")
        done = support.run(*options, "--json", cwd=self.folder)
        self.assertEqual(done.returncode, 1)
        self.assertIn("nan.pth: its loss is not a number, expected a finite number",
                      support.error_message(done.stderr))
        result = json.loads(done.stdout)
        self.assertIsNone(result["loss"])
        self.assertEqual(result["documents"]["worst"][0]["document"], 1)
        self.assertIsNone(result["documents"]["worst"][0]["loss"])
        self.assertGreater(result["documents"]["worst"][1]["loss"], 0)
        done = support.run(*options, cwd=self.folder)
        self.assertRegex(done.stdout, rb"loss -?nan  perplexity +-?nan  document 1,")

    def test_are_read_in_windows_across_documents_unless_asked(self):
        result = json.loads(rookery("eval", "--model", self.model, "--data", "corpus",
                                    "--ctx-len", 20, "--json", cwd=self.folder))
        self.assertEqual((result["tokens"], result["ctx_len"]), (41, 20))
        self.assertNotAlmostEqual(result["loss"], self.expected, delta=1e-3)


class Bench(support.Folder):
    def rows(self, *arguments):
        return json.loads(rookery("bench", *arguments, "--json", "-", cwd=self.folder))

    def test_of_tokenizers_reads_the_text_it_is_given(self):
        support.write_text(self.folder / "a.txt", ["Grüße"] * 1000)
        support.write_text(self.folder / "b.jsonl", [json.dumps({"text": "more"})])
        (row,) = self.rows("tokenizer", "--tokenizer", "bytes", "--text", "a.txt",
                           "--text", "b.jsonl", "--repeats", 2)
        self.assertEqual((row["what"], row["repeats"], row["tokens"]), ("tokenizer bytes", 2, 8004))
        self.assertAlmostEqual(row["mb_per_s"], 8.004 / row["median_ms"], delta=1e-3)
        printed = rookery("bench", "tokenizer", "--megabytes", 1, "--tokenizer", "bytes").decode()
        self.assertRegex(printed, r"(?m)^tokenizer bytes +\d\S* \[\S+-\S+\] +\S+ +1000000 ")

    TINY = ("--shape", "S", "--n-layer", 1, "--n-embd", 24, "--vocab", 50, "--repeats", 2,
            "--threads", 1)
    # Large enough that rates, not calls, decide over the times.
    SMALL = ("--shape", "S", "--n-layer", 2, "--n-embd", 384, "--repeats", 5, "--threads", 1)

    def test_never_goes_below_a_floor(self):
        batch = ("--batch", 8, "--ctx-len", 48)
        for arguments in (("ops", *self.SMALL, *batch), ("step", *self.SMALL, *batch),
                          ("decode", *self.SMALL, "--prompt-len", 64)):
            # A floor that is wrong is so every time; a machine that changes its pace is not.
            below = None
            for _ in range(4):
                rows = {row["what"] for row in self.rows(*arguments)
                        if row["floor_ms"] >= 1.05 * row["min_ms"]}
                below = rows if below is None else below & rows
                if not below:
                    break
            self.assertEqual(below, set(), "in each of four runs")

    def test_takes_a_thread_a_core_whatever_the_environment_says(self):
        # Where tests run, OMP_NUM_THREADS is 1.
        arguments = [one for one in self.TINY if one != "--threads"][:-1]
        (row,) = self.rows("step", *arguments, "--batch", 1, "--ctx-len", 2, "--dtype", "fp32")
        self.assertEqual(row["conditions"]["threads"], len(os.sched_getaffinity(0)))

    def test_says_what_the_figures_depend_on(self):
        for what, rates in (("step", {"matmul_gflops_per_s", "update_gb_per_s"}),
                            ("decode", {"matmul_gflops_per_s", "read_gb_per_s"}),
                            ("ops", {"update_gb_per_s", "copy_gb_per_s", "read_gb_per_s"})):
            for row in self.rows(what, *self.TINY, "--dtype", "fp32"):
                self.assertEqual(set(row["conditions"]), {"threads"} | rates)
                self.assertEqual(row["conditions"]["threads"], 1)
                self.assertGreater(min(row["conditions"].values()), 0)

    def test_counts_the_memory_of_a_step_without_the_code_of_libraries(self):
        (row,) = self.rows("step", *self.TINY, "--batch", 1, "--ctx-len", 2, "--dtype", "fp32")
        # The model takes less than one of them; the code that a step runs is 25 MB.
        self.assertLess(row["peak_mb"], 15)

    def test_counts_little_memory_of_decoding_beside_the_weights(self):
        shape = ("--shape", "S", "--n-layer", 2, "--n-embd", 768, "--vocab", 30000)
        for version in ("rwkv4", "rwkv7"):
            _, row = self.rows("decode", *shape, "--version", version, "--dtype", "bf16",
                               "--prompt-len", 7, "--repeats", 2, "--threads", 1)
            # Weights in fp32 beside those in bf16 would be three times as much.
            self.assertGreater(row["peak_mb"] / row["weights_mb"], 0.99)
            self.assertLess(row["peak_mb"] / row["weights_mb"], 1.15)

    def test_of_processes_gives_one_alone_and_all_together(self):
        shape = ("--shape", "S", "--n-layer", 2, "--n-embd", 128, "--batch", 3, "--ctx-len", 16,
                 "--repeats", 2)
        for dtype, zero, micro_batches in (("fp32", 0, 1), ("fp32", 1, 2), ("bf16", 1, 1),
                                           ("bf16", 2, 2)):
            together, alone = self.rows("distributed", *shape, "--dtype", dtype, "--zero", zero,
                                        "--micro-batches", micro_batches)
            self.assertEqual(together["conditions"], {"processes": 2, "zero": zero, "threads": 1})
            self.assertEqual(alone["conditions"], {"processes": 1, "zero": 0, "threads": 1})
            for row in (together, alone):
                self.assertTrue(row["what"].endswith(f"step rwkv4 L2 D128 V256 {dtype} B3 T16"
                                                     + (" x 2" if micro_batches == 2 else "")))
                self.assertAlmostEqual(row["tokens_per_s"],
                                       48 * micro_batches / row["median_ms"] * 1000, delta=1e-3)
            self.assertAlmostEqual(together["times_as_fast"],
                                   alone["median_ms"] / together["median_ms"], delta=1e-6)
            self.assertGreater(together["waiting_ms"], 0)
            self.assertLess(together["waiting_percent"], 100)
            self.assertEqual([part["what"] for part in together["parts"]], ["rank 0", "rank 1"])
            for part in together["parts"]:
                self.assertAlmostEqual(part["states_mb"], sum(
                    part[f"{kind}_mb"] for kind in ("weights", "masters", "gradients", "moments")))
                if zero < 2:
                    # The plan of stage 2 has a bucket more, of which nothing is left after a step.
                    self.assertAlmostEqual(part["states_mb"] / part["formula_mb"], 1, delta=0.05)
                else:
                    self.assertLess(part["states_mb"], part["formula_mb"])

    def test_of_processes_needs_a_core_and_a_sequence_for_each(self):
        tiny = ("bench", "distributed", "--shape", "S", "--n-layer", 1, "--n-embd", 24,
                "--repeats", 1)
        for arguments, words in (
            (("--nproc", 1), "one process"),
            (("--nproc", 1000), "1000 processes here need a core each, but may run on"),
            (("--batch", 1), "--batch 1: fewer sequences than the 2 processes"),
            (("--zero", 3), "--zero 3: expected"),
            (("--micro-batches", 0), "--micro-batches 0: must be 1 or more"),
            (("--shape", "both"), "--shape both"),
        ):
            with self.subTest(arguments):
                done = support.run(*tiny, *arguments)
                self.assertEqual(done.returncode, 2, done)
                self.assertIn(words, done.stderr.decode())

    def test_of_a_step_and_of_decoding_give_times_beside_floors(self):
        rows = self.rows("step", *self.TINY, "--batch", 2, "--ctx-len", 5)
        self.assertEqual([row["what"] for row in rows],
                         [f"step rwkv4 L1 D24 V50 {dtype} B2 T5" for dtype in ("fp32", "bf16")])
        for row in rows:
            self.assertAlmostEqual(row["tokens_per_s"], 10 / row["median_ms"] * 1000, delta=1e-3)
            self.assertGreater(row["floor_ms"], 0)
            self.assertGreater(row["backward_ms"], 0)
        rows = self.rows("decode", *self.TINY, "--prompt-len", 7, "--dtype", "bf16")
        self.assertEqual([row["what"] for row in rows],
                         ["prefill of 7 rwkv4 L1 D24 V50 bf16", "decode a token rwkv4 L1 D24 V50 bf16"])

    def test_of_a_step_writes_its_timeline(self):
        trace = self.folder / "trace.json"
        self.rows("step", *self.TINY, "--batch", 2, "--ctx-len", 5, "--dtype", "fp32",
                  "--trace", trace)
        names = [event.get("name")
                 for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]]
        # Of three steps, and not of those before them.
        self.assertEqual(names.count("rookery::adamw_"), 3)
        self.assertEqual(names.count("rookery::wkv4_backward"), 3)

    def test_of_ops_has_every_op_beside_plain_ones(self):
        rows = self.rows("ops", *self.TINY, "--batch", 2, "--ctx-len", 5, "--dtype", "fp32")
        self.assertEqual([row["what"].split()[0] for row in rows],
                         ["layer_norm_shift_mix", "wkv4", "gated_residual", "relu_squared_",
                          "cross_entropy_gradient_", "embedding", "adamw_", "few_rows_linear"])
        for row in rows:
            self.assertGreater(row["plain_ms"], 0)
            self.assertGreater(row["floor_ms"], 0)

    def test_of_a_save_leaves_nothing(self):
        rows = self.rows("save", "--folder", self.folder, "--megabytes", 20, "--repeats", 1)
        self.assertEqual([row["what"] for row in rows],
                         ["a plain file, fsync", "a checkpoint", "the copy of it in memory"])
        plain, checkpoint, copy = rows
        self.assertAlmostEqual(checkpoint["of_plain"],
                               plain["median_ms"] / checkpoint["median_ms"], places=4)
        self.assertAlmostEqual(checkpoint["mb_per_s"], 20e3 / checkpoint["median_ms"],
                               delta=0.01 * checkpoint["mb_per_s"])
        self.assertLess(copy["median_ms"], checkpoint["median_ms"])
        self.assertEqual(support.listing(self.folder), {})

    def test_of_the_start_ends_with_the_first_step_and_leaves_nothing(self):
        with unittest.mock.patch.dict(os.environ, TMPDIR=str(self.folder)):
            helped, trained = self.rows("startup", "--repeats", 1)
        self.assertEqual(helped["what"], "rookery --help")
        self.assertIn("train to its first step", trained["what"])
        # LibTorch alone takes longer to load than all of the help.
        self.assertLess(helped["max_ms"], trained["min_ms"] / 2)
        self.assertEqual(support.listing(self.folder), {})


class Paths(support.Folder):
    def test_may_hold_commas_and_spaces(self):
        support.write_text(self.folder / "a, b.txt", support.text_lines(50))
        rookery("tokenize", "--tokenizer", "bytes", "--output", "c, d", "a, b.txt", cwd=self.folder)
        rookery("tokenizer", "train", "--input", "a, b.txt", "--input", "a, b.txt",
                "--output", "e,f.model", "--vocab-size", 300, cwd=self.folder)
        support.write_config(self.folder / "a.toml", **support.small_run(
            {"train": "none"}, total_steps=1))
        rookery("train", "--config", "a.toml", "--set", "data.train=c, d",
                "--set", "train.run_dir=g, h", cwd=self.folder)
        self.assertEqual(support.checkpoints(self.folder / "g, h"), ["step_00000001"])


class PrintConfig(support.Folder):
    def test_reads_back_as_itself_and_has_what_was_set_and_what_follows(self):
        support.write_text(self.folder / "text.txt", support.text_lines(50))
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=self.folder)
        support.write_config(self.folder / "a.toml", **support.small_run(
            {"train": "text"}, total_steps=5))
        first = rookery("train", "--config", "a.toml", "--set", "train.total_tokens=9000",
                        "--set", "schedule.kind=cosine", "--print-config", cwd=self.folder)
        (self.folder / "b.toml").write_bytes(first)
        second = rookery("train", "--config", "b.toml", "--print-config", cwd=self.folder)
        self.assertEqual(second, first)

        config = tomllib.loads(first.decode())
        self.assertEqual(config["model"]["vocab_size"], 256)
        self.assertEqual(config["model"]["dim_ffn"], 128)
        self.assertEqual(config["train"]["total_tokens"], 9000)
        self.assertNotIn("total_steps", config["train"])
        self.assertEqual(config["schedule"]["kind"], "cosine")
        self.assertFalse((self.folder / "run").exists(), "printing starts no run")

    def test_is_printed_without_the_corpus_and_what_follows_from_it(self):
        support.write_config(self.folder / "a.toml", **support.small_run(
            {"train": "nowhere"}, total_steps=5))
        done = support.run("train", "--config", "a.toml", "--print-config", cwd=self.folder)
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"nowhere.idx: cannot be opened", done.stderr)
        config = tomllib.loads(done.stdout.decode())
        self.assertEqual(config["data"]["train"], "nowhere")
        self.assertNotIn("vocab_size", config["model"])

    def test_is_what_the_run_then_keeps_beside_itself_and_in_its_checkpoint(self):
        support.write_text(self.folder / "text.txt", support.text_lines(50))
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=self.folder)
        support.write_config(self.folder / "a.toml", **support.small_run(
            {"train": "text"}, total_steps=2))
        printed = rookery("train", "--config", "a.toml", "--print-config", cwd=self.folder)
        rookery("train", "--config", "a.toml", cwd=self.folder)
        self.assertEqual((self.folder / "run/config.toml").read_bytes(), printed)
        checkpoint = self.folder / "run/checkpoints/step_00000002"
        self.assertEqual((checkpoint / "config.toml").read_bytes(), printed)


if __name__ == "__main__":
    support.main()
