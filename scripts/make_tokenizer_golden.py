#!/usr/bin/env python3
"""Writes tests/golden/tokenizer_ids.json and tests/golden/dummy_prefix.model from the upstream
packages: rwkv (TRIE tokenizer), tokenizers (Hugging Face) and sentencepiece.

    scripts/make_tokenizer_golden.py TEST_DATA      the folder that ROOKERY_TEST_DATA names
"""
import importlib.metadata
import io
import json
import pathlib
import sys

import sentencepiece
import tokenizers
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

TEXTS = [
    "", "a", " ", "\n", "\t", "  ", "\n\n", "\n\nA:", "\r\n", "\r\n\r\n", "Hello world",
    " Hello world", "Hello  world", "hello\n\n\nworld\n", "a  b", "a   b", " a", "  a", "a ", "a  ",
    "x" + " " * 24 + "y", "x" + " " * 25 + "y", "x" + " " * 26 + "y", "x" + " " * 49 + "y",
    "x" + " " * 73, " \n \n  \n", "\t\tif (x):\n\t\t\treturn 1;\n", "    def f(self):\n        pass\n",
    "a\n  b", "a \nb", "a \n b", "a  \n  b", "one\u00a0two \u00a0 three", "a\u2003\u2003b", "a\u3000b\u3000",
    "a\u0085b", "x\u2028y\u2029z", "a\u180eb \u180e c", "zero\u200bwidth\u200djoin\ufeff", "nul\0byte\0\0",
    "I'll 'test don't we've they're I'm he'd it's 's 'S DON'T I'LL", "''s '''ve", "'ll'll 'lll",
    "0 1 12 123 1234 12345 3.14159 1,000,000 2026-11-23", "x1y22z333", "²³¹ ½ ⅓ Ⅷ ⅷ ① ٣٤٥ ४५६ 五",
    "!!! ... --- ??? ?!?! (((())))[[]]{{}}", "a.b,c;d:e!f?g", "<div class=\"x\">&amp;</div>",
    "https://example.org/a_b?c=d&e=f#g", "int main() { return a->b ? *c : &d; } // x",
    "<|endoftext|>", "a<|endoftext|>b", "<|padding|> <|padding|>", "<|endoftext", "<|endoftext|",
    "<<|endoftext|>>", "<|endoftext|><|endoftext|>\n", "  <|endoftext|>  ", "<|im_start|>", "</s><s><unk>",
    "café naïve Ångström", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "\u0301 alone, a\u0301\u0323 b\u0323\u0301",
    "q\u0307\u0323 q\u0323\u0307 e\u0328\u0301", "\u212b \u2126 \u1fef \u037e \u2000x\u2001 \u0340 \u0344 \u0387",
    "\u0958 \u0915\u093c \ufb1d \ufb4f \u2adc \U0001d15e", "\u1100\u1161\u11a8 \u1100\u1161 각 가\u11a8 \u1161\u11a8",
    "한국어 텍스트입니다. 안녕하세요", "日本語のテキスト。カタカナ、ひらがな漢字", "か\u3099 ハ\u309a ば",
    "你好，世界！今天天气很好。", "繁體中文測試「引號」", "блабла Привет, мир! й и\u0306", "Γειά σου Κόσμε ά α\u0301",
    "שָׁלוֹם עולם", "مرحبا بالعالم العربية", "नमस्ते दुनिया क्षत्रिय", "สวัสดีชาวโลก", "Xin chào thế giới Việt Nam",
    "ជំរាបសួរ မင်္ဂလာပါ", "😀😃 👍🏽 👨‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ ☃", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠀀𪚥", "∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ⇒ √2 ≈ 1.414",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３", "ﬁ ﬂ ﷺ", "\ufffd\uffff\ufdd0\U0010ffff", "\u2581 \u2581under\u2581", "▅▆▇█",
    "a" * 200, "ab" * 100, "=" * 100, "Zz" + "\u0300" * 40 + "z", "aaaaaaaaaaaaaaaaaaaaaab",
    "supercalifragilisticexpialidocious antidisestablishmentarianism " * 2, "\x01\x02\x1f\x7f\x80\x9f",
    "I'll 'd test блабла 以下は、]) -> <|endoftext|><|padding|> int", "line1\rline2\x0bline3\x0cline4\x1c\x1d\x1e\x1f",
]

# Bytes that are not UTF-8: only the World tokenizer has an upstream answer.
BYTES = [
    bytes(range(256)), b"\x80", b"\xff\xfe", b"a\xc3", b"a\xc3(", b"\xe4\xbd", b"\xe4\xbd\xa0\xe5",
    b"\xf0\x9f\x98", b"\xf0\x9f\x98\x80\xf0\x9f", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"Latin-1 caf\xe9 na\xefve", bytes(range(255, 127, -1)),
]


def train_foreign_model(corpus):
    """A model with sentencepiece's usual dummy prefix and without byte tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()), model_writer=model, vocab_size=400,
        normalization_rule_name="identity", minloglevel=2)
    return model.getvalue()


def main():
    data = pathlib.Path(sys.argv[1])
    golden = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
    world = TRIE_TOKENIZER(str(data / "tokenizers" / "rwkv_vocab_v20230424.txt"))
    neox = tokenizers.Tokenizer.from_file(str(data / "tokenizers" / "20B_tokenizer.json"))
    model_file = golden / "dummy_prefix.model"
    if not model_file.exists():
        model_file.write_bytes(train_foreign_model((data / "corpora/tinyshakespeare/input.txt").read_text()))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    rows = []
    for text in TEXTS:
        rows.append({
            "text": text,
            "world": world.encode(text) if text else [],
            "neox": neox.encode(text).ids,
            "neox_decoded": neox.decode(neox.encode(text).ids, skip_special_tokens=False),
            "sentencepiece": pieces.encode(text),
        })
    out = {
        "made_by": "scripts/make_tokenizer_golden.py",
        "versions": {name: importlib.metadata.version(name) for name in ("rwkv", "tokenizers", "sentencepiece")},
        "texts": rows,
        "bytes": [{"hex": text.hex(), "world": world.encodeBytes(text)} for text in BYTES],
    }
    lines = json.dumps(out, ensure_ascii=True, separators=(",", ":")).replace('{"text"', '\n{"text"')
    (golden / "tokenizer_ids.json").write_text(lines.replace('{"hex"', '\n{"hex"') + "\n")


if __name__ == "__main__":
    main()
