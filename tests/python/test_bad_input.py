"""Whatever is wrong with what the user gave: one message that helps, and nothing left behind.

Run by ctest as: test_bad_input.py PATH_OF_ROOKERY.
"""

import math
import os
import pathlib
import pickle
import shutil
import struct
import tempfile
import time
import unittest
import zipfile

import support
from support import rookery

FAILED, USAGE = 1, 2

# What a message for people never has in it.
TRACES = ("Exception raised from", "frame #", "terminate called", "what():", "std::", "c10::",
          "Assertion", "a bug in rookery", "filesystem error", "0x0", "basic_string")


def setUpModule():
    """A corpus of bytes and one of words, a run of two steps, and its model in both formats."""
    global base
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    base = pathlib.Path(folder.name)
    support.write_text(base / "text.txt", support.text_lines(300))
    rookery("tokenizer", "train", "--input", "text.txt", "--output", "words.model",
            "--vocab-size", 320, cwd=base)
    for prefix, tokenizer in (("bytes", "bytes"), ("words", "sentencepiece:words.model")):
        rookery("tokenize", "--tokenizer", tokenizer, "--output", prefix, "text.txt", cwd=base)
    support.write_config(base / "run.toml", **support.small_run({"train": "bytes"}, total_steps=2))
    rookery("train", "--config", "run.toml", cwd=base)
    # Whoever starts another run names another folder.
    support.write_config(base / "new.toml", **support.small_run({"train": "bytes"}, total_steps=2,
                                                                run_dir="new"))
    rookery("convert", "run", "model.pth", cwd=base)
    rookery("convert", "run", "model.safetensors", cwd=base)


class BadInput(support.Folder):
    def setUp(self):
        super().setUp()
        shutil.copytree(base, self.folder, dirs_exist_ok=True)

    def path(self, name):
        return self.folder / name

    def cut(self, name, size):
        os.truncate(self.path(name), size)

    def write(self, name, content):
        self.path(name).write_bytes(content)

    def refuses(self, command, code, *words, may_leave=()):
        """`command` (a text to split at spaces, or a list) ends with `code` and one message, with
        all of `words` in it; it changes no file but those in `may_leave` and below."""
        arguments = command.split() if isinstance(command, str) else command
        with self.subTest(" ".join(arguments)):
            before = support.listing(self.folder)
            done = support.run(*arguments, cwd=self.folder)
            after = support.listing(self.folder)
            message = support.error_message(done.stderr)
            self.assertEqual(done.returncode, code, message)
            self.assertEqual(done.stdout, b"")
            starts = [line for line in message.splitlines() if line.startswith("rookery: ")]
            self.assertEqual(len(starts), 1, message)
            self.assertTrue(message.startswith("rookery: "), message)
            for trace in TRACES:
                self.assertNotIn(trace, message)
            for word in words:
                self.assertIn(word, message)
            changed = {name for name in before.keys() | after.keys()
                       if before.get(name, b"-") != after.get(name, b"-")}
            left = {path for path in changed
                    if not any(path == name or path.startswith(name + "/") for name in may_leave)}
            self.assertEqual(left, set(), message)


class CommandLine(BadInput):
    def test_that_names_what_is_not_there(self):
        self.refuses("fry", USAGE, '"fry"', "rookery --help")
        self.refuses("tokenizer use", USAGE, '"use"', '"train"', "for example: rookery tokenizer")
        for command in ("tokenize", "train", "eval", "generate", "logits", "convert"):
            self.refuses(f"{command} --frobnicate", USAGE, "frobnicate", "--help")
        self.refuses("eval --model run --data bytes more", USAGE, '"more"', "--help")

    def test_without_a_required_option(self):
        for command, option in (("tokenizer train", "input"), ("tokenizer train --input text.txt",
                                "output"), ("tokenize text.txt --output a", "tokenizer"),
                                ("tokenize --tokenizer bytes --output a", "files"),
                                ("train", "config"),
                                ("eval --data bytes", "model"), ("generate", "model"),
                                ("logits --model run", "tokens"), ("convert run", "to"),
                                ("convert", "from")):
            self.refuses(command, USAGE, f"--{option} is not given", "for example: rookery ")

    def test_with_a_value_out_of_range(self):
        self.refuses("logits --model run --tokens 1 --dtype fp8", USAGE,
                     "--dtype fp8", "expected fp32 or bf16")
        self.refuses("convert run a.pth --dtype int8", USAGE,
                     "--dtype int8", "expected fp32, bf16 or fp16")
        self.refuses("logits --model run --tokens 1 --mode both", USAGE,
                     "--mode both", "expected parallel or recurrent")
        self.refuses("logits --model run --tokens 1,256", USAGE,
                     "--tokens", "256", "vocabulary of 256")
        self.refuses("logits --model run --tokens -1", USAGE,
                     "--tokens", "-1", "vocabulary of 256")
        for tokens, wrong in (("1,two", "two"), ("", ""), ("1,,2", ""), ("1.5", "1.5"),
                              ("1,99999999999999999999", "99999999999999999999")):
            self.refuses(["logits", "--model", "run", "--tokens", tokens], USAGE,
                         f'--tokens: "{wrong}" is no token id', "separated by commas")
        self.refuses("logits --model run --tokens 1 --all", USAGE,
                     "--all and --output go together", "for example")
        self.refuses("logits --model run --tokens 1 --output a.safetensors", USAGE,
                     "--all and --output go together")
        generate = "generate --model run --tokenizer bytes --prompt a"
        self.refuses(f"{generate} --temperature -1", USAGE, "temperature", "-1", "0 or more")
        self.refuses(f"{generate} --top-p 2", USAGE, "top_p", "2", "1")
        self.refuses(f"{generate} --top-k -1", USAGE, "top_k", "-1", "0 or more")
        self.refuses(f"{generate} --length -1", USAGE, "--length", "-1", "0 or more")
        self.refuses(f"{generate} --seed x", USAGE, "x", "--help")
        self.refuses("eval --model run --data bytes --ctx-len 0", USAGE,
                     "--ctx-len", "1 or more")
        self.refuses("bench step --micro-batches 0", USAGE, "--micro-batches 0", "1 or more")
        self.refuses("bench step --micro-batches 2 --explain", USAGE,
                     "--micro-batches 2 --explain", "leave either out")
        self.refuses("bench step --version rwkv6 --explain", USAGE,
                     "--version rwkv6 --explain", "only those of rwkv4 and rwkv7")
        train = "tokenizer train --input text.txt --output a.model"
        self.refuses(f"{train} --vocab-size 256", USAGE, "vocab_size = 256", "expected 300 ..")
        self.refuses(f"{train} --vocab-size 5000", USAGE, "vocab_size = 5000", "too large",
                     "use at most")
        self.refuses(f"{train} --kind word", USAGE, "--kind word", "unigram or bpe")

    def test_that_names_no_tokenizer(self):
        for name in ("byte", "sentencepiece", "bytes:file", "neox:"):
            self.refuses(f"tokenize --tokenizer {name} --output a text.txt", USAGE,
                         f'tokenizer "{name}"', "sentencepiece:FILE")

    def test_that_leaves_open_which_tokenizer(self):
        self.refuses("generate --model model.pth --prompt a", USAGE,
                     "model.pth", "give --tokenizer", "sentencepiece:FILE")

    def test_with_a_tokenizer_larger_than_the_model(self):
        for command in ("generate --prompt a", "eval --text text.txt", "eval --lambada a.jsonl"):
            self.refuses(f"{command} --model model.pth --tokenizer sentencepiece:words.model",
                         USAGE, "320 ids", "vocabulary is 256", "another tokenizer")

    def test_with_another_tokenizer_than_the_model_was_trained_with(self):
        for command in ("generate --prompt a", "eval --text text.txt", "eval --lambada a.jsonl"):
            for model in ("run", "model.safetensors"):
                self.refuses(f"{command} --model {model} --tokenizer sentencepiece:words.model",
                             USAGE, 'tokenizer "sentencepiece:words.model" is of the tokenizer '
                             "sentencepiece:", "was trained with bytes")
        self.refuses("eval --model run --data words", USAGE, "words.bin is of the tokenizer "
                     "sentencepiece:", "was trained with bytes")
        self.refuses("eval --model run --data bytes --baseline words", USAGE,
                     "words.bin is of the tokenizer sentencepiece:", "was trained with bytes")

    def test_of_eval_that_do_not_go_together(self):
        self.refuses("eval --model run", USAGE,
                     "one of --data, --text and --lambada", "0 are given")
        self.refuses("eval --model run --data bytes --text text.txt", USAGE, "2 are given")
        for options, unused in (("--lambada a.jsonl", "by-document by-position"),
                                ("--text text.txt", "baseline=bytes"),
                                ("--data bytes", "jsonl-key=a"),
                                ("--data bytes --by-document", "baseline=bytes")):
            for option in unused.split():
                self.refuses(f"eval --model run {options} --{option}", USAGE,
                             f"--{option.partition('=')[0]} has no use", "leave it out")


class Files(BadInput):
    def test_that_are_missing(self):
        cases = {
            "tokenize --tokenizer bytes --output a none.txt": "none.txt",
            "tokenize --tokenizer sentencepiece:none.model --output a text.txt": "none.model",
            "tokenize --tokenizer neox:none.json --output a text.txt": "none.json",
            "tokenize --tokenizer world:none.txt --output a text.txt": "none.txt",
            "tokenizer train --input none.txt --output a.model": "none.txt",
            "train --config none.toml": "none.toml",
            "train --config new.toml --set data.train=none": "none.idx",
            "train --config new.toml --set data.validation=none": "none.idx",
            "eval --model none --data bytes": "none",
            "eval --model run --data none": "none.idx",
            "eval --model run --data bytes --baseline none": "none.idx",
            "generate --model none.pth --tokenizer bytes": "none.pth",
            "logits --model none.pth --tokens 1": "none.pth",
            "convert none.pth a.safetensors": "none.pth",
        }
        for command, name in cases.items():
            self.refuses(command, FAILED, f"{name}: cannot be opened: No such file")

    def test_that_are_folders(self):
        os.mkdir(self.path("folder"))
        os.mkdir(self.path("folder.txt"))
        os.mkdir(self.path("folder.idx"))
        for command in ("tokenize --tokenizer bytes --output a folder.txt",
                        "tokenize --tokenizer sentencepiece:folder --output a text.txt",
                        "tokenizer train --input folder.txt --output a.model",
                        "train --config folder", "eval --model run --data folder"):
            self.refuses(command, FAILED, "folder", "is a directory, expected a file")
        self.refuses("logits --model folder --tokens 1", FAILED,
                     "folder: is a folder without model.safetensors", "expected a checkpoint")

    def test_that_cannot_be_written(self):
        self.refuses("tokenize --tokenizer bytes --output text.txt/a text.txt", FAILED,
                     "--output text.txt/a: its folder cannot be made: Not a directory")
        for command in ("tokenizer train --input text.txt --output none/a --vocab-size 300",
                        "convert run none/a.pth", "convert run none/a.safetensors",
                        "logits --model run --tokens 1 --all --output none/a.safetensors"):
            self.refuses(command, FAILED, "none/a", "cannot be created: No such file or directory",
                         "is its folder there")

    def test_that_are_to_be_written_where_a_folder_is(self):
        os.mkdir(self.path("a.pth"))
        self.refuses("convert run a.pth", FAILED, "a.pth", "irectory")

    def test_on_a_full_disk(self):
        with open("/dev/full", "wb") as full:
            for command in ("logits --model run --tokens 1", "--help",
                            "generate --model run --tokenizer bytes --prompt a --length 9",
                            "eval --model run --data bytes"):
                with self.subTest(command):
                    done = support.run(*command.split(), cwd=self.folder, stdout=full)
                    self.assertEqual(done.returncode, FAILED)
                    self.assertIn("cannot be written to standard output", done.stderr.decode())

    def test_with_a_run_dir_that_is_a_file(self):
        self.refuses("train --config new.toml --set train.run_dir=text.txt", FAILED,
                     "text.txt", "folder")

    def test_with_an_ending_that_names_no_format(self):
        for name in ("a.bin", "a", "a.pt.gz"):
            self.refuses(f"convert run {name}", USAGE, f"{name}: the ending", ".pth, .safetensors")
        self.write("a.md", b"text")
        for command in ("tokenize --tokenizer bytes --output b a.md",
                        "tokenizer train --input a.md --output b.model"):
            self.refuses(command, USAGE, "a.md: its name does not say", ".jsonl")

    def test_that_are_both_read_and_written(self):
        self.refuses("convert model.pth model.pth", USAGE, "model.pth: is the file to read",
                     "another name")
        checkpoint = "run/checkpoints/step_00000002/model.safetensors"
        self.refuses(f"convert run {checkpoint}", USAGE, "is the file to read")
        os.symlink("model.pth", self.path("other.pth"))
        self.refuses("convert model.pth other.pth", USAGE, "other.pth: is the file to read")


class Text(BadInput):
    def refuses_rows(self, content, *words):
        self.write("a.jsonl", content)
        for command in ("tokenize --tokenizer bytes --output b a.jsonl",
                        "tokenizer train --input a.jsonl --output b.model"):
            self.refuses(command, FAILED, *words)

    def test_that_is_not_json_or_not_utf8(self):
        row = b'{"text": "a"}\n'
        self.refuses_rows(row + b'{"text": "\xff"}\n', "a.jsonl:2: ", "not valid UTF-8", "convert")
        self.refuses_rows(row * 3 + b'{"text": "a"\n', "a.jsonl:4: not JSON", "expected one JSON")
        self.refuses_rows(row + b'["a"]\n', "a.jsonl:2: the row is an array", "expected an object")
        self.refuses_rows(b'{"txt": "a"}\n', 'a.jsonl:1: has no key "text", but "txt"')
        self.refuses_rows(b'{"text": 1}\n', "a.jsonl:1: ", "is a number; expected a string")

    def test_that_is_empty(self):
        self.write("a.txt", b"")
        self.refuses("tokenize --tokenizer bytes --output b a.txt", FAILED, "b: the text holds no",
                     "expected one or more")
        self.refuses("tokenizer train --input a.txt --output b.model", FAILED,
                     "a.txt holds no text to train on")

    def test_that_is_compressed_and_cut_or_not_compressed_at_all(self):
        import gzip

        content = gzip.compress(self.path("text.txt").read_bytes())
        self.write("a.txt.gz", content[:-20])
        self.refuses("tokenize --tokenizer bytes --output b a.txt.gz", FAILED,
                     "a.txt.gz: the compressed stream ends early", "cut short")
        for name in ("b.txt.gz", "b.txt.zst"):
            self.write(name, b"plain text, and longer than any header")
            self.refuses(f"tokenize --tokenizer bytes --output b {name}", FAILED,
                         f"{name}: the ", "stream is corrupt")

    def test_for_a_tokenizer_whose_file_is_another(self):
        for tokenizer in ("sentencepiece:text.txt", "neox:text.txt", "world:text.txt",
                          "neox:words.model", "world:words.model"):
            self.refuses(f"tokenize --tokenizer {tokenizer} --output b text.txt", FAILED,
                         tokenizer.partition(":")[2], "expected")
        self.cut("words.model", 500)
        self.refuses("tokenize --tokenizer sentencepiece:words.model --output b text.txt", FAILED,
                     "words.model: is not a sentencepiece model, or only a part of one")


class Corpora(BadInput):
    COMMANDS = ("train --config new.toml --set data.train=bad",
                "train --config new.toml --set data.validation=bad",
                "eval --model run --data bad", "eval --model run --data bytes --baseline bad")

    def setUp(self):
        super().setUp()
        for ending in (".bin", ".idx", ".tokenizer.json"):
            shutil.copy(self.path("bytes" + ending), self.path("bad" + ending))

    def all_refuse(self, *words):
        for command in self.COMMANDS:
            self.refuses(command, FAILED, *words)

    def test_with_an_index_that_is_cut(self):
        self.cut("bad.idx", 40)
        self.all_refuse("bad.idx: 40 bytes, too few", "cut short")
        self.cut("bad.idx", 20)
        self.refuses(self.COMMANDS[0], FAILED, "bad.idx: 20 bytes", "header alone has 34",
                     "cut short")

    def test_with_an_index_that_is_none(self):
        self.write("bad.idx", b"PK\x03\x04" * 20)
        self.all_refuse("bad.idx: does not start with MMIDIDX", "is it the right file?")

    def test_with_tokens_that_are_cut(self):
        size = self.path("bad.bin").stat().st_size
        self.cut("bad.bin", size - 100)
        listed = f"{size // 2:,} tokens of 2 bytes ({size:,})"
        self.all_refuse(f"bad.bin: {size - 100:,} bytes", f"lists {listed}", "cut short")

    def test_with_no_tokens(self):
        self.write("bad.bin", b"")
        self.write("bad.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
        self.all_refuse("bad.idx: lists no tokens", "expected one or more", "empty?")

    def test_with_a_record_of_another_corpus(self):
        shutil.copy(self.path("words.tokenizer.json"), self.path("bad.tokenizer.json"))
        self.all_refuse("bad.tokenizer.json: describes a corpus of", "tokenize the text again")
        self.write("bad.tokenizer.json", b"{")
        self.refuses(self.COMMANDS[0], FAILED, "bad.tokenizer.json: is not JSON")

    def test_shorter_than_a_window(self):
        self.refuses("train --config new.toml --set model.ctx_len=1_000_000", USAGE, "bytes.bin",
                     "1000000", "tokens", "use a longer corpus or a smaller")

    def test_with_ids_beyond_the_vocabulary(self):
        self.refuses("train --config new.toml --set model.vocab_size=255", USAGE,
                     "model.vocab_size = 255", "bytes.bin", "256 ids", "use that or more")
        # Without a record of its tokenizer only reading a corpus shows what is in it.
        os.remove(self.path("bad.tokenizer.json"))
        train = "train --config new.toml --set data.train=bad"
        self.refuses(train, USAGE, "model.vocab_size is not given", "bad.tokenizer.json",
                     "give the vocabulary size")
        content = bytearray(self.path("bad.bin").read_bytes())
        struct.pack_into("<H", content, 2 * 1234, 60_000)
        self.write("bad.bin", content)
        expected = ("bad.bin: ", "1,234 has id 60000", "256 ids", "another tokenizer?")
        self.refuses(f"{train} --set model.vocab_size=256 --set train.total_epochs=1", FAILED,
                     *expected, may_leave={"new"})
        self.refuses("eval --model run --data bad", FAILED, *expected)
        self.refuses("eval --model run --data bytes --baseline bad", FAILED, *expected)

    def test_made_with_another_tokenizer_than_the_run_names(self):
        self.refuses("train --config new.toml --set data.tokenizer=sentencepiece:words.model",
                     USAGE, 'data.tokenizer = "sentencepiece:words.model" is sentencepiece',
                     "bytes.bin was made with bytes", "tokenize the text again")
        self.refuses("train --config new.toml --set data.validation=words", USAGE,
                     'data.validation = "words"', 'data.train = "bytes" with bytes',
                     "tokenize both with one tokenizer")
        # Without a record of its tokenizer, ids that the model cannot know give a corpus away.
        self.path("words.tokenizer.json").unlink()
        self.refuses("eval --model run --data words", FAILED, "words", "another tokenizer")


class Config(BadInput):
    def refuses_config(self, text, *words, code=USAGE):
        self.write("bad.toml", text.encode())
        self.refuses("train --config bad.toml", code, *words)
        self.refuses("train --config bad.toml --print-config", code, *words)

    def changed(self, old, new):
        text = self.path("new.toml").read_text()
        self.assertIn(old, text)
        return text.replace(old, new)

    def test_with_a_key_that_is_misspelt_or_misplaced(self):
        self.refuses_config(self.changed("n_layer", "n_layers"),
                            "bad.toml:3: unknown key model.n_layers; did you mean model.n_layer?")
        self.refuses_config(self.changed("[data]\n", "[data]\nlr_init = 1\n"), "bad.toml:7: ",
                            "unknown key data.lr_init; did you mean schedule.lr_init?")
        self.refuses_config(self.changed("[schedule]", "[shedule]"),
                            "unknown section shedule; did you mean schedule?")
        self.refuses("train --config new.toml --set train.sead=1", USAGE,
                     "--set train.sead=1: unknown key train.sead; did you mean train.seed?")
        self.refuses("train --config new.toml --set seed", USAGE, "--set seed",
                     "expected section.key=value")

    def test_with_a_value_out_of_range_or_of_another_type(self):
        self.refuses_config(self.changed("n_embd = 32", "n_embd = -2"),
                            "bad.toml:4: model.n_embd = -2: must be 1 or more")
        self.refuses_config(self.changed("n_embd = 32", 'n_embd = "32"'),
                            "bad.toml:4: model.n_embd = ", "(a string)", "expected an integer")
        self.refuses_config(self.changed("rwkv4", "rwkv44"),
                            'model.version = "rwkv44"', "known are rwkv7, rwkv6, rwkv5, rwkv4")
        self.refuses_config(self.changed("n_embd = 32", "n_embd = 32\nhead_size = 8"),
                            "model.head_size = 8", "leave the key out")
        self.refuses_config(self.changed("total_steps = 2", "# none"),
                            "train.total_tokens is not given", "give one of")

    def test_that_is_not_toml(self):
        self.refuses_config(self.changed("n_embd = 32", "n_embd = "), "bad.toml:4: ")
        self.write("bad.toml", b"\xff\xfe\0")
        self.refuses("train --config bad.toml", USAGE, "bad.toml:1: ", "UTF-8")
        self.write("bad.toml", self.changed("rwkv4", "rwkv\udcff").encode(errors="surrogateescape"))
        self.refuses("train --config bad.toml", USAGE, "bad.toml:2: ", "utf-8")

    def test_that_asks_for_another_device(self):
        self.refuses_config(self.changed("threads = 1", 'threads = 1\ndevice = "gpu"'),
                            'train.device = "gpu"', 'expected "cpu", "cuda", or "cuda:1"')

    def test_that_asks_for_a_gpu_that_has_no_kernels_for_the_model(self):
        train = "train --config new.toml --set train.device=cuda:1 --set model.version="
        for version in ("rwkv5", "rwkv6"):
            self.refuses(f"{train}{version} --set model.head_size=32", USAGE,
                         f'train.device = "cuda:1": there are no CUDA kernels for {version}',
                         'use "cpu"')
        self.refuses(f"{train}rwkv7 --set model.head_size=16", USAGE,
                     "no CUDA kernels for model.head_size = 16, only for 32, 64, 128")

    def test_of_a_version_that_its_keys_do_not_fit(self):
        def refuses(version, keys, *words):
            text = "\n".join([f'version = "{version}"', *keys])
            self.refuses_config(self.changed('version = "rwkv4"', text), *words)
        for version, width in (("rwkv5", "dim_att"), ("rwkv6", "dim_att"), ("rwkv7", "n_embd")):
            refuses(version, ["head_size = 12"],
                    f"model.{width} = 32: must be a multiple of model.head_size, 12")
            refuses(version, [], f"model.{width} = 32", "model.head_size, 64")
            refuses(version, ["head_size = -8"], "bad.toml:3: model.head_size = -8",
                    "must be 0 or more")
        refuses("rwkv7", ["dim_att = 64", "head_size = 8"],
                "model.dim_att = 64: rwkv7 has n_embd = 32; leave the key out")
        for version, key in (("rwkv4", "rank_decay"), ("rwkv5", "rank_decay"),
                             ("rwkv6", "rank_gate"), ("rwkv7", "rank_mix")):
            refuses(version, [f"{key} = 8"], f"model.{key} = 8: {version} has none; leave the key out")

    @unittest.skipIf(pathlib.Path("/proc/driver/nvidia/version").exists(), "there is a driver here")
    def test_that_asks_for_a_gpu_where_there_is_none(self):
        self.refuses("train --config new.toml --set train.device=cuda", FAILED,
                     'train.device = "cuda": no NVIDIA driver is installed here',
                     'install one for CUDA 13.0 or newer, or use "cpu"')
        self.refuses("logits --model run --tokens 1,2 --device cuda:1", FAILED,
                     "--device cuda:1: no NVIDIA driver is installed here")

    def test_that_contradicts_the_run_it_would_go_on_with(self):
        self.refuses("train --config run.toml --set model.n_layer=3 --set schedule.lr_init=0.5",
                     USAGE, "run/checkpoints/step_00000002: cannot go on",
                     "model.n_layer: 2 in the checkpoint, now 3",
                     "schedule.lr_init: 0.01 in the checkpoint, now 0.5",
                     "another train.run_dir")


class Checkpoints(BadInput):
    CHECKPOINT = "run/checkpoints/step_00000002"

    def resume(self, code, *words, **options):
        self.refuses("train --config run.toml --set schedule.kind=constant "
                     "--set train.total_steps=4", code, *words, **options)

    def setUp(self):
        super().setUp()
        # A constant rate, so that the run may be made longer.
        shutil.rmtree(self.path("run"))
        rookery("train", "--config", "run.toml", "--set", "schedule.kind=constant", cwd=self.folder)

    def test_that_lack_a_file(self):
        for name in ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.toml",
                     "manifest.json"):
            with self.subTest(name):
                path = self.path(f"{self.CHECKPOINT}/{name}")
                content = path.read_bytes()
                path.unlink()
                self.resume(FAILED, f"{self.CHECKPOINT}", name)
                path.write_bytes(content)

    def refuse_damaged(self, name, contents, *words):
        content = self.path(f"{self.CHECKPOINT}/{name}").read_bytes()
        for wrong in contents:
            with self.subTest((name, wrong[:80])):
                self.write(f"{self.CHECKPOINT}/{name}", wrong)
                self.resume(FAILED, f"{self.CHECKPOINT}/{name}", *words)
        self.write(f"{self.CHECKPOINT}/{name}", content)

    def test_that_are_damaged(self):
        trainers = (b"", b"{", b"[]", b"{}", b'{"step": "2", "samples": 1, "tokens": 1}',
                    b'{"step": -2, "samples": 16, "tokens": 512}', b'{"\xff\x1b[2J":')
        manifests = (b"", b"{", b"[]", b"{}", b'{"\xff\x1b[2J":',
                     b'{"step": 2, "processes": 1, "rookery": "", "files": [1]}',
                     b'{"step": 2, "processes": 1, "rookery": "", "files": '
                     b'[{"name": "/etc/passwd", "bytes": 1, "xxh3_128": ""}]}')
        self.refuse_damaged("trainer.json", trainers)
        self.refuse_damaged("manifest.json", manifests)
        weights = {name: self.path(f"{self.CHECKPOINT}/{name}").read_bytes()[:-4]
                   for name in ("model.safetensors", "optimizer.safetensors")}
        for name, content in weights.items():
            self.refuse_damaged(name, [content], "cut short")
        # Nothing but the readers stands between these and a run.
        support.forget_manifest(self.path(self.CHECKPOINT))
        self.refuse_damaged("trainer.json", trainers)
        for name, content in weights.items():
            self.refuse_damaged(name, [content], "cut short")

    def test_whose_optimizer_is_another_models(self):
        tensors = support.read_safetensors(self.path(f"{self.CHECKPOINT}/optimizer.safetensors"))
        del tensors["v.emb.weight"]
        support.write_safetensors(self.path(f"{self.CHECKPOINT}/optimizer.safetensors"), tensors)
        support.forget_manifest(self.path(self.CHECKPOINT))
        self.resume(FAILED, "optimizer.safetensors: v.emb.weight is missing", "not of this model")

    def test_that_are_damaged_are_not_read_as_models(self):
        weights, moments = (self.path(f"{self.CHECKPOINT}/{name}.safetensors")
                            for name in ("model", "optimizer"))
        support.flip_bit(weights)
        for name in ("run", self.CHECKPOINT):
            self.refuses(f"convert {name} out.pth", FAILED, f"{self.CHECKPOINT}/model.safetensors: ",
                         "its contents have changed")
        support.flip_bit(weights)
        moments.unlink()
        self.refuses(f"convert {self.CHECKPOINT} out.pth", FAILED,
                     "optimizer.safetensors: is missing", "no older checkpoint is whole beside it")
        self.refuses("logits --model run --tokens 1", FAILED, "optimizer.safetensors: is missing",
                     "no older checkpoint is whole beside it")
        rookery("logits", "--model", self.CHECKPOINT, "--tokens", "1", cwd=self.folder)

    def test_that_are_changed_name_the_one_before(self):
        # So large that nobody looks into the weights who does not mean to.
        rookery("train", "--config", "run.toml", "--set", "train.run_dir=large", "--set",
                "model.vocab_size=20000", "--set", "train.save_every_steps=1", cwd=self.folder)
        support.flip_bit(self.path("large/checkpoints/step_00000002/model.safetensors"))
        for command in ("logits --model large --tokens 1", "eval --model large --data train",
                        "generate --model large --prompt a", "convert large out.pth",
                        "train --config run.toml --set train.run_dir=new --set init.from=large "
                        "--set model.vocab_size=20000"):
            self.refuses(command, FAILED, "step_00000002/model.safetensors: checksum",
                         "name an older checkpoint, the newest whole one is "
                         "large/checkpoints/step_00000001", may_leave=("new",))

    def test_that_are_not_there_yet(self):
        shutil.rmtree(self.path(self.CHECKPOINT))
        self.refuses("logits --model run --tokens 1", FAILED, "run/checkpoints",
                     "holds no checkpoint yet", "train first")

    def test_beside_metrics_that_are_none(self):
        self.write("run/metrics.jsonl", b"not a line\n")
        self.resume(FAILED, "run/metrics.jsonl:1", "is not a JSON object with a", "repair the line",
                    may_leave={"run/config.toml"})


class OnLoad:
    """Pickles to a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class WeightFile(BadInput):
    def all_refuse(self, name, *words):
        for command in (f"logits --model {name} --tokens 1", f"convert {name} out.pth"):
            self.refuses(command, FAILED, *words)

    def models_refuse(self, name, *words):
        """As all_refuse() does, where one command stands for all, or only models are refused."""
        self.refuses(f"logits --model {name} --tokens 1", FAILED, *words)


class Weights(WeightFile):
    def test_of_many_tensors_are_converted_in_time(self):
        name = "a.long.name.that.all.of.the.tensors.begin.with"
        support.write_safetensors(self.path("many.safetensors"),
                                  {f"{name}.{i:05}": ("U8", [1], b"x") for i in range(1 << 16)})
        start = time.monotonic()
        rookery("convert", "many.safetensors", "copy.safetensors", cwd=self.folder)
        # Each sought among all takes 15 s.
        self.assertLess(time.monotonic() - start, 8)

    def test_that_hold_no_tensors(self):
        support.write_safetensors(self.path("none.safetensors"), {})
        self.refuses("convert none.safetensors out.pth", FAILED,
                     "none.safetensors: holds no tensors, expected the weights of a model")

    def test_that_the_other_format_could_not_be_read_back_from(self):
        # Each tensor takes some 17 values of a pickle, which may have 2^20.
        support.write_safetensors(self.path("many.safetensors"),
                                  {str(i): ("U8", [1], b"x") for i in range(1 << 16)})
        self.refuses("convert many.safetensors out.pth", FAILED, "out.pth: data.pkl: ",
                     "more than 1048576 values")

    def test_whose_tensors_do_not_match_their_checksums(self):
        content = self.path("model.pth").read_bytes()
        with zipfile.ZipFile(self.path("model.pth")) as archive:
            storage = archive.read("archive/data/3")
        self.write("model.pth", content.replace(storage, b"?" * 4 + storage[4:]))
        self.refuses("convert model.pth out.safetensors", FAILED,
                     'model.pth: "archive/data/3" has the checksum')

    def test_that_are_cut(self):
        size = self.path("model.pth").stat().st_size
        for part in (size - 10, size // 2, 60):
            self.cut("model.pth", part)
            self.all_refuse("model.pth", "model.pth: ", "cut short")
        size = self.path("model.safetensors").stat().st_size
        for part in (size - 4, 60):
            self.cut("model.safetensors", part)
            self.all_refuse("model.safetensors", "model.safetensors: ", "cut short")

    def test_that_are_something_else(self):
        self.write("a.pth", b"")
        self.all_refuse("a.pth", "a.pth: is empty", "expected .pth", "cut short")
        self.write("a.pth", b"version https://git-lfs.github.com/spec/v1\n")
        self.models_refuse("a.pth", "a.pth: is a Git LFS pointer", "git lfs pull")
        self.models_refuse("text.txt", "text.txt: first bytes", "expected .pth")
        self.models_refuse("bytes.idx", "bytes.idx: first bytes", "expected .pth")

    def test_that_would_run_a_command(self):
        for protocol in (2, 4):
            with zipfile.ZipFile(self.path("evil.pth"), "w") as archive:
                archive.writestr("archive/data.pkl",
                                 pickle.dumps(OnLoad(f"touch {self.path('harm')}"), protocol))
                archive.writestr("archive/version", "3\n")
            self.all_refuse("evil.pth", "evil.pth", "wants posix.system", "refused",
                            "save its state_dict() instead")
            self.assertFalse(self.path("harm").exists())

    def change(self, changes, name="changed.safetensors"):
        """The model with some tensors changed: {name: (dtype, shape, bytes), or None}."""
        tensors = support.read_safetensors(self.path("model.safetensors")) | changes
        support.write_safetensors(self.path(name), {k: v for k, v in tensors.items() if v})
        return name

    def test_of_a_shape_that_does_not_fit(self):
        name = "blocks.1.att.key.weight"
        self.models_refuse(self.change({name: ("F32", [32, 16], b"\0" * 2048)}),
                           f"changed.safetensors: {name} is [32, 16]", "expected [32, 32]")
        self.models_refuse(self.change({"head.weight": ("F32", [255, 32], b"\0" * 255 * 128)}),
                           "changed.safetensors: head.weight is [255, 32]", "expected [256, 32]",
                           "vocab_size = 256")
        self.models_refuse(self.change({"emb.weight": ("F32", [256 * 32], b"\0" * 256 * 128)}),
                           "changed.safetensors: emb.weight has 1 axes, expected 2")
        self.models_refuse(self.change({"emb.weight": ("F32", [0, 32], b"")}),
                           "changed.safetensors: emb.weight is [0, 32], expected", "1 or more")
        self.models_refuse(self.change({"emb.weight": ("F32", [256, 0], b"")}),
                           "changed.safetensors: emb.weight is [256, 0], expected", "1 or more")
        self.models_refuse(self.change({"blocks.0.ln1.weight": None}),
                           "changed.safetensors: model.n_layer = 0", "1 or more")

    def test_with_a_tensor_too_few_or_too_many(self):
        self.models_refuse(self.change({"blocks.1.ffn.value.weight": None}),
                           "changed.safetensors: blocks.1.ffn.value.weight is missing",
                           "expected [32, 128]")
        self.models_refuse(self.change({"emb.weight": None}),
                           "changed.safetensors: emb.weight is missing")
        self.models_refuse(self.change({"blocks.1.ln1.weight": None}),
                           "changed.safetensors: blocks.1.", "unexpected", "1 layers")
        self.models_refuse(self.change({"blocks.0.att.ln_y.weight": ("F32", [1], b"\0" * 4)}),
                           "changed.safetensors: blocks.0.att.ln_y.weight is unexpected")

    def test_of_an_rwkv_version_that_is_not_known(self):
        vectors = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0")
        tensors = {f"blocks.0.att.{name}": ("F32", [32], b"\0" * 128) for name in vectors}
        tensors["emb.weight"] = ("F32", [256, 32], b"\0" * 256 * 128)
        support.write_safetensors(self.path("v8.safetensors"), tensors)
        self.models_refuse("v8.safetensors", "v8.safetensors: holds 9 tensors of no RWKV version "
                           "known here; known are rwkv7, rwkv6, rwkv5, rwkv4")
        support.write_safetensors(self.path("empty.safetensors"), {})
        self.models_refuse("empty.safetensors", "empty.safetensors: ", "no RWKV version")

    def test_that_hold_no_numbers_of_a_model(self):
        name = self.change({"emb.weight": ("I64", [256, 32], b"\0" * 256 * 32 * 8)})
        self.models_refuse(name, "changed.safetensors: emb.weight", "i64")


def zeros(*shape):
    return "F32", list(shape), bytes(4 * math.prod(shape))


class WeightsOfVersions(WeightFile):
    """Each message names the file, what is wrong in it, and what was expected."""

    @classmethod
    def setUpClass(cls):
        heads = {"head_size": 8}
        keys = {"rwkv4": {}, "rwkv5": heads, "rwkv6": {**heads, "rank_mix": 4, "rank_decay": 6},
                "rwkv7": {**heads, "rank_decay": 4, "rank_iclr": 6, "rank_value": 10,
                          "rank_gate": 12}}
        cls.models = {}
        for version, more in keys.items():
            with tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                config = support.small_run(
                    {"train": str(base / "bytes")}, total_steps=1,
                    model={"version": version, "dim_ffn": 64, **more})
                support.write_config(folder / "run.toml", **config)
                rookery("train", "--config", "run.toml", cwd=folder)
                rookery("convert", "run", "model.safetensors", cwd=folder)
                cls.models[version] = support.read_safetensors(folder / "model.safetensors")

    def refuses_change(self, version, changes, *words):
        """The model of that version with some tensors changed: {name: tensor, or None}."""
        tensors = self.models[version] | changes
        support.write_safetensors(self.path("model.safetensors"),
                                  {name: tensor for name, tensor in tensors.items() if tensor})
        self.models_refuse("model.safetensors", "model.safetensors: ", *words)

    def block(self, version, layer):
        return {name: tensor for name, tensor in self.models[version].items()
                if name.startswith(f"blocks.{layer}.")}

    def test_that_are_whole_run(self):
        for model in self.models.values():
            support.write_safetensors(self.path("model.safetensors"), model)
            rookery("logits", "--model", "model.safetensors", "--tokens", "1", cwd=self.folder)

    def test_that_lack_a_tensor(self):
        common = set.intersection(*(set(model) for model in self.models.values()))
        for version in self.models:
            for name in self.block(version, 1).keys() - common:
                self.refuses_change(version, {name: None}, f"{name} is missing", version)
        self.refuses_change("rwkv7", {"blocks.0.att.r_k": None}, "no RWKV version known here")

    def test_with_a_tensor_too_many(self):
        for version in self.models:
            for name in ("blocks.1.att.more.weight", "blocks.2.ln2.bias", "more"):
                self.refuses_change(version, {name: zeros(32)},
                                    f"{name} is unexpected in a model of version {version}")
        # RWKV-7a's, which is another model.
        self.refuses_change("rwkv7", {"blocks.0.ffn.s0": zeros(1, 1, 64)},
                            "blocks.0.ffn.s0 is unexpected")

    def test_that_mix_versions(self):
        for version in self.models:
            for other in self.models.keys() - {version}:
                without = {name: None for name in self.block(version, 1)}
                # A tensor that is missing or of another shape.
                self.refuses_change(version, without | self.block(other, 1), "blocks.1.att.")
        self.refuses_change("rwkv7", self.models["rwkv4"] | self.models["rwkv7"],
                            "is unexpected in a model of version rwkv7")

    def test_whose_heads_do_not_divide(self):
        for version, name in (("rwkv5", "time_faaaa"), ("rwkv6", "time_faaaa"), ("rwkv7", "r_k")):
            name = f"blocks.0.att.{name}"
            self.refuses_change(version, {name: zeros(3, 10)}, f"{name} has heads of 10 channels",
                                "expected a divisor of the 32")
            self.refuses_change(version, {name: zeros(4, 0)}, f"{name} has heads of 0 channels")
            self.refuses_change(version, {name: zeros(32)}, f"{name} has 1 axes, expected 2")
            self.refuses_change(version, {name: zeros(2, 16)}, "blocks.1.att.", "is [4, 8]",
                                "expected [2, 16]")

    def test_of_odd_ranks(self):
        for name, rank in (("w", 4), ("a", 6), ("v", 10), ("g", 12)):
            name = f"blocks.1.att.{name}"
            self.refuses_change("rwkv7", {f"{name}1": zeros(32, 5)},
                                f"{name}1 is [32, 5], expected [32, {rank}]")
            self.refuses_change("rwkv7", {f"{name}2": zeros(5, 32)},
                                f"{name}2 is [5, 32], expected [{rank}, 32]")
            self.refuses_change("rwkv7", {f"{name}1": zeros(32)}, f"{name}1 is [32]")
        self.refuses_change("rwkv6", {"blocks.0.att.time_maa_w1": zeros(32, 21)},
                            "time_maa_w1 has 21 columns, expected a multiple of 5")
        self.refuses_change("rwkv6", {"blocks.0.att.time_maa_w2": zeros(5, 5, 32)},
                            "time_maa_w2 is [5, 5, 32], expected [5, 4, 32]")
        self.refuses_change("rwkv6", {"blocks.1.att.time_decay_w2": zeros(7, 32)},
                            "time_decay_w2 is [7, 32], expected [6, 32]")

    def test_of_another_version_than_the_configuration(self):
        for version, model in self.models.items():
            support.write_safetensors(self.path("model.safetensors"), model)
            for other in self.models.keys() - {version}:
                support.write_config(
                    self.path("bad.toml"), init={"from": "model.safetensors"},
                    model={"version": other, "ctx_len": 32}, data={"train": "bytes"},
                    train={"run_dir": "new", "batch_size": 2, "total_steps": 1})
                self.refuses("train --config bad.toml", USAGE,
                             f'model.version = "{other}": but model.safetensors is {version}; '
                             "leave the key out")


if __name__ == "__main__":
    support.main()
