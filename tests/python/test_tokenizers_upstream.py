"""Our tokenizers against the packages they follow: rwkv, tokenizers and sentencepiece, on whole
corpora. Run by ctest, which gives the path of encode_ids.

A package or corpus that is not there skips its tests; in CI (environment variable CI) it fails them.
"""
import array
import hashlib
import importlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import unicodedata
import unittest
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DATA = pathlib.Path(os.environ.get("ROOKERY_TEST_DATA", ROOT / "../shared/data"))
WORLD = DATA / "tokenizers/rwkv_vocab_v20230424.txt"
NEOX = DATA / "tokenizers/20B_tokenizer.json"
SHAKESPEARE = DATA / "corpora/tinyshakespeare/input.txt"


def skip_or_fail(test, reason):
    if os.environ.get("CI"):
        test.fail(reason + "; CI must have it")
    test.skipTest(reason)


def package(test, name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        skip_or_fail(test, f"package {name} is not installed ({error})")


def data_file(test, name):
    path = DATA / name
    if not path.exists():
        skip_or_fail(test, f"{path} is not there; set ROOKERY_TEST_DATA")
    return path


def run_encode_ids(*arguments):
    subprocess.run([ENCODE_IDS, *map(str, arguments)], check=True,
                   stdout=subprocess.DEVNULL)


def ids_of(spec, text, part_bytes=None):
    """Ids of bytes, by our tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "text"), pathlib.Path(folder, "ids")
        source.write_bytes(text)
        run_encode_ids("encode", spec, source, target, *([part_bytes] if part_bytes else []))
        ids = array.array("H", target.read_bytes())
    return ids.tolist()


def corpora(test):
    """(name, bytes) of every corpus; the zip files are one text each, of 2 MB at most, for the
    upstream World tokenizer takes a minute for 10 MB."""
    folder = data_file(test, "corpora")
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".txt", ".jsonl"):
            yield path.name, path.read_bytes()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
                yield path.name, b"\n".join(map(archive.read, names))[:2_000_000]


def first_difference(ours, theirs):
    for index, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return f"id {index}: ours {ours[index:index + 5]}, theirs {theirs[index:index + 5]}"
    return f"ours has {len(ours)} ids, theirs {len(theirs)}"


class TokenizerTest(unittest.TestCase):
    def assert_same_ids(self, ours, theirs, what):
        if ours != theirs:
            self.fail(f"{what}: {first_difference(ours, theirs)}")


class KnownHashes(TokenizerTest):
    """The sha256 sums of ids, as little-endian uint16, that came with the test data."""

    SUMS = [
        ("tinyshakespeare/input.txt", 331658,
         "8cd49dc79e4a454c62243e0a14710e32e31b94eb18ad5b939630360f552fe354", 340240,
         "2ac8f527f33cd8c85270938eb49c42b18ba5cfc575ce6bc70ac8b6e87bba9f54"),
        ("wikitext-2/valid.txt", 260639, "4dab56be35ac4e7f", 258131, "5567439384b7e282"),
        ("wikitext-2/test.txt", 297950, "e26b950297771af5", 295232, "16c3172a03017c0e"),
    ]

    def test_whole_and_through_a_small_buffer(self):
        for name, world_count, world_sum, neox_count, neox_sum in self.SUMS:
            text = data_file(self, f"corpora/{name}").read_bytes()
            for spec, count, expected in ((f"world:{WORLD}", world_count, world_sum),
                                          (f"neox:{NEOX}", neox_count, neox_sum)):
                for part_bytes in (None, 4096):
                    with self.subTest(name=name, spec=spec, part_bytes=part_bytes):
                        ids = ids_of(spec, text, part_bytes)
                        self.assertEqual(len(ids), count)
                        found = hashlib.sha256(array.array("H", ids).tobytes()).hexdigest()
                        self.assertEqual(found[:len(expected)], expected)


class World(TokenizerTest):
    def setUp(self):
        package(self, "rwkv")
        module = package(self, "rwkv.rwkv_tokenizer")
        self.upstream = module.TRIE_TOKENIZER(str(data_file(self, WORLD)))

    def test_corpora(self):
        for name, text in corpora(self):
            with self.subTest(name):
                self.assert_same_ids(ids_of(f"world:{WORLD}", text),
                                     self.upstream.encodeBytes(text), name)

    def test_random_bytes(self):
        text = random.Random(1).randbytes(200_000)
        self.assert_same_ids(ids_of(f"world:{WORLD}", text), self.upstream.encodeBytes(text),
                             "random bytes")


class Neox(TokenizerTest):
    def setUp(self):
        tokenizers = package(self, "tokenizers")
        self.upstream = tokenizers.Tokenizer.from_file(str(data_file(self, NEOX)))

    def check(self, text, what):
        self.assert_same_ids(ids_of(f"neox:{NEOX}", text.encode()), self.upstream.encode(text).ids,
                             what)

    def test_corpora(self):
        for name, text in corpora(self):
            with self.subTest(name):
                # Upstream takes Unicode only.
                self.check(text.decode("utf-8", errors="ignore"), name)

    def test_every_character(self):
        # Up to what this Python knows (Unicode 14 in Python 3.11): later versions of Unicode give
        # characters other classes, and each library has its own version.
        def is_assigned(character):
            return unicodedata.category(character) not in ("Cn", "Cs")

        characters = [c for c in map(chr, range(0x110000)) if is_assigned(c)]
        for template in ("a{0}b\n", "7{0} {0}{0}\n", " {0}\t{0} x\n"):
            with self.subTest(template):
                for start in range(0, len(characters), 20_000):
                    some = characters[start:start + 20_000]
                    text = "".join(template.format(c) for c in some)
                    if ids_of(f"neox:{NEOX}", text.encode()) == self.upstream.encode(text).ids:
                        continue
                    for c in some:
                        self.check(template.format(c), f"U+{ord(c):04X} in {template!r}")

    def test_random_characters(self):
        generator = random.Random(2)
        pieces = ["a", " ", "  ", "\n", "e", "'s", "<|endoftext|>", "1", ".", "\uac00", "你"]
        # Upstream's tables for form C are of Unicode 9 and do not order marks added since: old
        # characters first, then all, with the text brought to form C before upstream sees it.
        for database, upstream_normalizes in ((unicodedata.ucd_3_2_0, True), (unicodedata, False)):
            interesting = [c for c in map(chr, range(0x110000))
                           if database.combining(c) or database.decomposition(c)
                           or c.isspace() or 0x1100 <= ord(c) < 0x1200]
            for round_number in range(10):
                text = "".join(generator.choice(pieces if generator.random() < 0.5 else interesting)
                               for _ in range(10_000))
                seen = text if upstream_normalizes else unicodedata.normalize("NFC", text)
                self.assert_same_ids(ids_of(f"neox:{NEOX}", text.encode()),
                                     self.upstream.encode(seen).ids,
                                     f"round {round_number}, upstream_normalizes {upstream_normalizes}")


class Sentencepiece(TokenizerTest):
    def setUp(self):
        self.package = package(self, "sentencepiece")
        data_file(self, SHAKESPEARE)

    def test_models_that_we_train(self):
        lines = data_file(self, "corpora/wikitext-2/valid.txt").read_text().split("\n")[:1000]
        lines += ["", " ", "   two  spaces ", "\ttab", "你好 é 😀", "12345"]
        for kind in ("unigram", "bpe"):
            with self.subTest(kind), tempfile.TemporaryDirectory() as folder:
                model = pathlib.Path(folder, "a.model")
                run_encode_ids("train", SHAKESPEARE, model, 1000, kind)
                upstream = self.package.SentencePieceProcessor(model_file=str(model))
                theirs = upstream.encode("\n".join(lines[:20]))
                ours = ids_of(f"sentencepiece:{model}", "\n".join(lines[:20]).encode())
                self.assert_same_ids(ours, theirs, "twenty lines as one text")
                line_feed = upstream.piece_to_id("\n")
                theirs = []
                for line in lines:
                    theirs += upstream.encode(line) + [line_feed]
                ours = ids_of(f"sentencepiece:{model}", ("\n".join(lines) + "\n").encode())
                self.assert_same_ids(ours, theirs, "line by line")
                self.assertEqual(upstream.decode(theirs), "\n".join(lines) + "\n")


if __name__ == "__main__":
    ENCODE_IDS = os.path.abspath(sys.argv.pop(1))
    unittest.main()
