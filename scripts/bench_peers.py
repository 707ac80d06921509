"""Times rookery beside the programs that do the same, in one run on this machine.

    scripts/bench_peers.sh [OPTION...]      installs the peers, then runs this; --help lists options

Every contender runs in a process of its own, with nothing else of ours running; contenders of one
table take turns, `--rounds` times, so that a slow minute of the machine falls on all of them. Of
each round the median counts; printed is the median of the rounds with their least and greatest
time, and how many times as long as rookery the peer takes for the same work ("x"; below 1 the peer
is faster). Prints Markdown; --json also writes the figures to a file.

Ours are `rookery bench step|decode|tokenizer|startup`. Peers: a plain GPT of the same size in eager
and in compiled PyTorch, Hugging Face's RWKV-4, rwkv7-hf's RWKV-7 in plain PyTorch, the `rwkv`
package, and tokenizers; how each is run stands in bench_peers_worker.py. rwkv7-hf goes through
sequences one by one, in seconds each, so it gets one, in one round. No peer that is missing is
passed over in silence: the run fails, or with --skip-missing names what it leaves out.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKER = ROOT / "scripts" / "bench_peers_worker.py"
SHAPES = {
    "S": {"n_layer": 6, "n_embd": 384, "vocab": 256, "batch": 8, "ctx_len": 256},
    "M": {"n_layer": 12, "n_embd": 768, "vocab": 50277, "batch": 4, "ctx_len": 128},
    # Nothing to conclude from: to try this script.
    "tiny": {"n_layer": 2, "n_embd": 64, "vocab": 300, "batch": 2, "ctx_len": 16},
}
DOCUMENT_BYTES = 4000
VERSIONS = {"rwkv4": "RWKV-4", "rwkv7": "RWKV-7"}


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=ROOT / "build/release/bin/rookery")
    parser.add_argument("--version", default="rwkv4", choices=VERSIONS,
                        help="of steps and decoding; default %(default)s")
    parser.add_argument("--tables", default="step,decode,tokenizer,startup",
                        help="some of %(default)s")
    parser.add_argument("--shapes", default="S,M", help="of the steps: some of S,M,tiny")
    parser.add_argument("--decode-shape", default="M", help="one of S,M,tiny; default %(default)s")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--without", default="", metavar="NAME,...",
                        help="contenders to leave out, by a part of their name: 'compiled'; what "
                        "is left is compared with its first")
    parser.add_argument("--skip-missing", action="store_true",
                        help="leave out, and name, contenders whose package is not installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="timings a round, of steps")
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--text", metavar="FILE", help="a .txt for the tokenizers; default: the "
                        "King James Bible of Debian's bible-kjv")
    parser.add_argument("--neox", metavar="20B_tokenizer.json",
                        help="adds the tokenizers that read it")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    for name in ("tables", "shapes", "dtypes", "without"):
        setattr(options, name, [part for part in getattr(options, name).split(",") if part])
    for name, known in (("tables", TABLES), ("shapes", SHAPES), ("dtypes", ("fp32", "bf16"))):
        unknown = set(getattr(options, name)) - set(known)
        if unknown:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if options.decode_shape not in SHAPES:
        parser.error(f"--decode-shape {options.decode_shape} is none of {', '.join(SHAPES)}")
    if min(options.rounds, options.repeats, options.threads, options.prompt_len) < 1:
        parser.error("--rounds, --repeats, --threads and --prompt-len must be 1 or more")
    if not os.access(options.program, os.X_OK):
        parser.error(f"--program {options.program}: is not there; build it (cmake --build --preset "
                     "release) or name another")
    options.program = os.path.abspath(options.program)
    return options


def output_of(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n"
                           + done.stderr.strip())
    return done.stdout


class Contender:
    """`time_once()` gives the milliseconds of one round: least, median, greatest."""

    def __init__(self, name, time_once, amount=None, unit="", package=None, most_rounds=None):
        self.name, self.time_once = name, time_once
        self.package = package  # that a peer needs
        self.most_rounds = most_rounds
        self.amount, self.unit = amount, unit  # what one timing gets done: 2048 "tokens/s"
        self.rounds = []

    def figures(self):
        median = statistics.median(row[1] for row in self.rounds)
        figures = {"what": self.name, "median_ms": median,
                   "min_ms": min(row[0] for row in self.rounds),
                   "max_ms": max(row[2] for row in self.rounds), "rounds": len(self.rounds)}
        if self.amount:
            figures[self.unit] = self.amount / median * 1000
        return figures


def spread(times):
    return min(times), statistics.median(times), max(times)


def ours(options, arguments, row=0):
    """Row number `row` of `rookery bench` with those arguments."""
    def time_once():
        rows = json.loads(output_of([options.program, "bench", *map(str, arguments),
                                     "--json", "-"]))
        return rows[row]["min_ms"], rows[row]["median_ms"], rows[row]["max_ms"]
    return time_once


def peer(name, settings):
    command = [sys.executable, WORKER, name, json.dumps(settings)]
    return lambda: spread(json.loads(output_of(command).splitlines()[-1])["ms"])


def whole_process(command, repeats):
    def time_once():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            output_of(command)
            times.append((time.perf_counter() - start) * 1000)
        return spread(times)
    return time_once


def shape_arguments(options, shape):
    return ["--shape", "S", "--version", options.version, "--n-layer", shape["n_layer"],
            "--n-embd", shape["n_embd"], "--vocab", shape["vocab"]]


def describe(shape):
    return f"L{shape['n_layer']} D{shape['n_embd']} V{shape['vocab']}"


def step_tables(options, _):
    for name in options.shapes:
        for dtype in options.dtypes:
            shape = SHAPES[name]
            settings = {**shape, "dtype": dtype, "threads": options.threads,
                        "repeats": options.repeats}
            arguments = ["step", *shape_arguments(options, shape), "--batch", shape["batch"],
                         "--ctx-len", shape["ctx_len"], "--dtype", dtype,
                         "--threads", options.threads, "--repeats", options.repeats]
            done = (shape["batch"] * shape["ctx_len"], "tokens/s")
            yield (f"Training step {name}, {describe(shape)} B{shape['batch']} "
                   f"T{shape['ctx_len']}, {dtype}", [
                       Contender(f"rookery {VERSIONS[options.version]}",
                                 ours(options, arguments), *done),
                       Contender("GPT, eager PyTorch", peer("gpt eager", settings), *done,
                                 "torch"),
                       Contender("GPT, compiled PyTorch", peer("gpt compiled", settings), *done,
                                 "torch"),
                       same_version(options, settings, done)])


def same_version(options, settings, done):
    """The plain PyTorch implementation of the version that rookery runs."""
    if options.version == "rwkv4":
        return Contender("RWKV-4, Hugging Face", peer("hugging face", settings), *done,
                         "transformers")
    return Contender("RWKV-7, `rwkv7-hf`, B1",
                     peer("rwkv7-hf", {**settings, "batch": 1, "repeats": 1}),
                     settings["ctx_len"], "tokens/s", "rwkv7-hf", most_rounds=1)


def decode_tables(options, folder):
    shape = SHAPES[options.decode_shape]
    for dtype in options.dtypes:
        settings = {**shape, "dtype": dtype, "threads": options.threads, "folder": folder,
                    "version": options.version, "prompt_len": options.prompt_len}
        arguments = ["decode", *shape_arguments(options, shape), "--prompt-len", options.prompt_len,
                     "--dtype", dtype, "--threads", options.threads, "--repeats", 64]
        for row, what, tokens, repeats in ((1, "A token", 1, 64),
                                           (0, f"Prefill of {options.prompt_len} tokens",
                                            options.prompt_len, options.repeats)):
            name = "rwkv decode" if tokens == 1 else "rwkv prefill"
            yield (f"{what}, {VERSIONS[options.version]} {describe(shape)}, {dtype}", [
                Contender("rookery", ours(options, arguments, row), tokens, "tokens/s"),
                Contender("`rwkv` package", peer(name, {**settings, "repeats": repeats}),
                          tokens, "tokens/s", "rwkv")])


def write_documents(options, folder):
    """The text in pieces of whole lines, as .jsonl; returns its path and the bytes of text."""
    if options.text:
        text = pathlib.Path(options.text).read_text(encoding="utf-8", errors="replace")
    else:
        text = output_of(["bible", "-f", "gen1:1-rev22:21"])
    path = pathlib.Path(folder, "documents.jsonl")
    documents, document = [], ""
    for line in text.splitlines(keepends=True):
        document += line
        if len(document) >= DOCUMENT_BYTES:
            documents.append(document)
            document = ""
    documents += [document] if document else []
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in documents),
                    encoding="utf-8")
    return str(path), len(text.encode())


def tokenizer_tables(options, folder):
    text, size = write_documents(options, folder)
    words = str(pathlib.Path(folder, "words.model"))
    output_of([options.program, "tokenizer", "train", "--input", text, "--output", words,
               "--vocab-size", "8000", "--kind", "bpe"])
    families = [("World", "world", ("rwkv-tokenizer", "pyrwkv-tokenizer"),
                 str(ROOT / ".deps/share/rwkv_vocab_v20230424.txt")),
                ("sentencepiece BPE 8000", f"sentencepiece:{words}", ("sentencepiece",), words)]
    if options.neox:
        families.insert(1, ("GPT-NeoX 20B", f"neox:{options.neox}", ("tokenizers", "tiktoken"),
                            options.neox))
    for name, spec, peers, file in families:
        settings = {"text": text, "file": file, "repeats": 3, "threads": 1}
        contenders = [Contender("rookery", ours(options, ["tokenizer", "--tokenizer", spec,
                                                          "--text", text, "--repeats", 3]),
                                size / 1e6, "MB/s")]
        contenders += [Contender(f"`{package}`", peer(package, settings), size / 1e6, "MB/s",
                                 package)
                       for package in peers]
        yield f"Encoding, {name}, {size / 1e6:.1f} MB in documents of 4 kB, one thread", contenders


def startup_tables(options, _):
    def python(statement):
        return whole_process([sys.executable, "-c", statement], 3)
    startup = ["startup", "--repeats", 3]
    yield "Start", [
        Contender("rookery --help", ours(options, startup, 0)),
        Contender("rookery train to the end of its first step, S fp32", ours(options, startup, 1)),
        Contender("python: import torch", python("import torch"), package="torch"),
        Contender("python: import RwkvForCausalLM",
                  python("from transformers import RwkvForCausalLM"), package="transformers"),
        Contender("python: import rwkv.model", python("import rwkv.model"), package="rwkv")]


TABLES = {"step": step_tables, "decode": decode_tables, "tokenizer": tokenizer_tables,
          "startup": startup_tables}


def markdown(title, contenders):
    rows = [contender.figures() for contender in contenders]
    unit = contenders[0].unit
    lines = [f"### {title}", "", f"| | ms, median [min-max] |{f' {unit} |' if unit else ''} x |",
             f"|---|---|{'---|' if unit else ''}---|"]
    for row in rows:
        cells = [row["what"], f"{row['median_ms']:.4g} [{row['min_ms']:.4g}-{row['max_ms']:.4g}]"]
        cells += [f"{row[unit]:.4g}"] if unit else []
        cells += [f"{rows[0][unit] / row[unit]:.2f}" if unit
                  else f"{row['median_ms'] / rows[0]['median_ms']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PACKAGES = ("torch", "transformers", "rwkv7-hf", "rwkv", "tokenizers", "tiktoken",
            "rwkv-tokenizer", "pyrwkv-tokenizer", "sentencepiece")


def versions_of(packages, skip_missing):
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not skip_missing:
                raise
    return versions


def environment(options):
    processor = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo")
                      if line.startswith("model name")), platform.processor())
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processor": processor, "cores": os.cpu_count(), "threads": options.threads,
            "rookery": output_of([options.program, "--version"]).split()[1],
            "packages": versions_of(PACKAGES, options.skip_missing)}


def main():
    options = parse_options()
    about = environment(options)
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    print(f"{about['processor']}, {about['cores']} cores, {about['threads']} threads; rookery "
          f"{about['rookery']}; {versions}; {options.rounds} rounds\n", flush=True)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for table in options.tables:
            for title, contenders in TABLES[table](options, folder):
                contenders = [one for one in contenders
                              if not any(part in one.name for part in options.without)]
                for one in contenders:
                    if one.package and one.package not in about["packages"]:
                        print(f"{title}: {one.name} is skipped: {one.package} is not installed",
                              file=sys.stderr)
                contenders = [one for one in contenders
                              if not one.package or one.package in about["packages"]]
                if not contenders:
                    continue
                for number in range(options.rounds):
                    for contender in contenders:
                        if contender.most_rounds and number >= contender.most_rounds:
                            continue
                        print(f"{title}: {contender.name}", file=sys.stderr, flush=True)
                        contender.rounds.append(contender.time_once())
                print(markdown(title, contenders), flush=True)
                tables.append({"title": title, "rows": [one.figures() for one in contenders]})
    if options.json:
        pathlib.Path(options.json).write_text(
            json.dumps({**about, "rounds": options.rounds, "tables": tables}, indent=2) + "\n",
            encoding="utf-8")


if __name__ == "__main__":
    main()
