"""One peer of rookery, timed in a process of its own: started by bench_peers.py, which see.

    bench_peers_worker.py NAME SETTINGS     SETTINGS is a JSON object; prints {"ms": [...], ...}

Every function below is one peer. It prepares what it needs, and returns what to time, and how often
to do that before the clock counts. Peers run as their own documentation would have them run.
"""

import json
import os
import pathlib
import sys
import time


def random_tokens(torch, vocab, *shape):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


def training_step(torch, model, loss_of, dtype):
    """A step as in most PyTorch trainers: autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gpt(torch, n_layer, n_embd, vocab, ctx_len):
    """GPT-2's architecture: learned positions, biases everywhere, head not tied to the embedding,
    as RWKV's is not, so that both have about the same number of parameters."""
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
            self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
            self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(approximate="tanh"),
                                     nn.Linear(4 * n_embd, n_embd))

        def forward(self, x):
            batch, length, width = x.shape
            heads = (batch, length, max(1, width // 64), min(64, width))
            q, k, v = (part.view(heads).transpose(1, 2)
                       for part in self.qkv(self.ln1(x)).split(width, dim=2))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.mlp(self.ln2(x))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.position = nn.Embedding(vocab, n_embd), nn.Embedding(ctx_len, n_embd)
            self.blocks = nn.Sequential(*(Block() for _ in range(n_layer)))
            self.ln_out, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab, bias=False)

        def forward(self, tokens):
            x = self.emb(tokens) + self.position(torch.arange(tokens.shape[1]))
            return self.head(self.ln_out(self.blocks(x)))

    return Gpt()


def gpt_step(settings, compiled):
    import torch

    torch.set_num_threads(settings["threads"])
    # A multiple of 64: what its users are told to do.
    vocab = -(-settings["vocab"] // 64) * 64
    model = gpt(torch, settings["n_layer"], settings["n_embd"], vocab, settings["ctx_len"])
    ids = random_tokens(torch, settings["vocab"], settings["batch"], settings["ctx_len"] + 1)

    def loss_of(network):
        logits = network(ids[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return training_step(torch, torch.compile(model) if compiled else model, loss_of,
                         settings["dtype"]), 2


def hugging_face_step(settings):
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.set_num_threads(settings["threads"])
    model = RwkvForCausalLM(RwkvConfig(
        vocab_size=settings["vocab"], hidden_size=settings["n_embd"],
        num_hidden_layers=settings["n_layer"], context_length=settings["ctx_len"],
        use_cache=False))
    model.train()
    ids = random_tokens(torch, settings["vocab"], settings["batch"], settings["ctx_len"])
    return training_step(torch, model, lambda network: network(ids, labels=ids).loss,
                         settings["dtype"]), 1


def rwkv7_hf_step(settings):
    """With the author's ranks, as ours."""
    import torch
    from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM

    torch.set_num_threads(settings["threads"])
    rank = ranks_of_rwkv7(settings["n_embd"])
    model = RWKV7ForCausalLM(RWKV7Config(
        vocab_size=settings["vocab"], hidden_size=settings["n_embd"],
        num_hidden_layers=settings["n_layer"], decay_low_rank_dim=rank["w"],
        a_low_rank_dim=rank["a"], v_low_rank_dim=rank["v"], gate_low_rank_dim=rank["g"],
        use_cache=False))
    model.train()
    ids = random_tokens(torch, settings["vocab"], settings["batch"], settings["ctx_len"])
    return training_step(torch, model, lambda network: network(ids, labels=ids).loss,
                         settings["dtype"]), 1


def ranks_of_rwkv7(n_embd):
    return {name: max(32, 32 * round(factor * n_embd**0.5 / 32))
            for name, factor in (("w", 2.5), ("a", 2.5), ("v", 1.7), ("g", 5))}


def write_rwkv4(torch, path, n_layer, n_embd, vocab):
    """Random weights under RWKV-LM's names."""
    generator = torch.Generator().manual_seed(1)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm(name):
        return {f"{name}.weight": torch.ones(n_embd), f"{name}.bias": torch.zeros(n_embd)}

    weights = {"emb.weight": matrix(vocab, n_embd), "head.weight": matrix(vocab, n_embd),
               **norm("blocks.0.ln0"), **norm("ln_out")}
    for layer in range(n_layer):
        block = f"blocks.{layer}"
        weights |= norm(f"{block}.ln1") | norm(f"{block}.ln2")
        for name in ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "ffn.time_mix_k",
                     "ffn.time_mix_r"):
            weights[f"{block}.{name}"] = torch.rand(1, 1, n_embd, generator=generator)
        for name in ("time_decay", "time_first"):
            weights[f"{block}.att.{name}"] = torch.randn(n_embd, generator=generator)
        for name in ("att.key", "att.value", "att.receptance", "att.output", "ffn.receptance"):
            weights[f"{block}.{name}.weight"] = matrix(n_embd, n_embd)
        weights[f"{block}.ffn.key.weight"] = matrix(4 * n_embd, n_embd)
        weights[f"{block}.ffn.value.weight"] = matrix(n_embd, 4 * n_embd)
    torch.save(weights, path)


def write_rwkv7(torch, path, n_layer, n_embd, vocab):
    """The same of RWKV-7, with heads of 64 channels and the author's ranks."""
    generator = torch.Generator().manual_seed(1)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm(name):
        return {f"{name}.weight": torch.ones(n_embd), f"{name}.bias": torch.zeros(n_embd)}

    weights = {"emb.weight": matrix(vocab, n_embd), "head.weight": matrix(vocab, n_embd),
               **norm("blocks.0.ln0"), **norm("ln_out")}
    for layer in range(n_layer):
        block = f"blocks.{layer}"
        weights |= norm(f"{block}.ln1") | norm(f"{block}.ln2") | norm(f"{block}.att.ln_x")
        for name in ("att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g", "att.w0",
                     "att.a0", "att.v0", "att.k_k", "att.k_a", "ffn.x_k"):
            weights[f"{block}.{name}"] = torch.rand(1, 1, n_embd, generator=generator)
        weights[f"{block}.att.r_k"] = matrix(n_embd // 64, 64)
        for name, rank in ranks_of_rwkv7(n_embd).items():
            weights[f"{block}.att.{name}1"] = matrix(n_embd, rank)
            weights[f"{block}.att.{name}2"] = matrix(rank, n_embd)
        for name in ("receptance", "key", "value", "output"):
            weights[f"{block}.att.{name}.weight"] = matrix(n_embd, n_embd)
        weights[f"{block}.ffn.key.weight"] = matrix(4 * n_embd, n_embd)
        weights[f"{block}.ffn.value.weight"] = matrix(n_embd, 4 * n_embd)
    torch.save(weights, path)


def rwkv_package(settings):
    """The model, and the ids of a prompt."""
    os.environ["RWKV_JIT_ON"] = "1"
    os.environ["RWKV_V7_ON"] = "1" if settings["version"] == "rwkv7" else "0"
    import torch

    torch.set_num_threads(settings["threads"])
    path = pathlib.Path(settings["folder"], f"{settings['version']}.pth")
    if not path.exists():
        write = write_rwkv7 if settings["version"] == "rwkv7" else write_rwkv4
        write(torch, path, settings["n_layer"], settings["n_embd"], settings["vocab"])
    from rwkv.model import RWKV

    # It adds the ending to the name of an RWKV-7 file.
    model = RWKV(model=str(path.with_suffix("")), strategy=f"cpu {settings['dtype']}")
    return model, random_tokens(torch, settings["vocab"], settings["prompt_len"]).tolist()


def rwkv_decode(settings):
    model, prompt = rwkv_package(settings)
    state = model.forward(prompt[:16], None)[1]

    def token():
        nonlocal state
        state = model.forward([prompt[0]], state)[1]

    return token, 16


def rwkv_prefill(settings):
    model, prompt = rwkv_package(settings)
    return lambda: model.forward(prompt, None), 2


def read_documents(settings):
    lines = pathlib.Path(settings["text"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def encoding(settings, encode):
    documents = read_documents(settings)

    def work():
        for document in documents:
            encode(document)

    return work, 1


def rust_world(settings, package):
    import importlib

    tokenizer = importlib.import_module(package).WorldTokenizer(settings["file"])
    return encoding(settings, tokenizer.encode)


def hugging_face_tokenizer(settings):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    return encoding(settings, Tokenizer.from_file(settings["file"]).encode)


def byte_of_character():
    """The inverse of GPT-2's alphabet for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte
                                                  for i, byte in enumerate(hidden)}


def tiktoken_neox(settings):
    """Without the file's added tokens for runs of spaces, which its regular expression cannot say:
    in Tiny Shakespeare 4 of 61,147 ids are others for that."""
    import tiktoken

    alphabet = byte_of_character()
    model = json.loads(pathlib.Path(settings["file"]).read_text(encoding="utf-8"))["model"]
    ranks = {bytes(alphabet[character] for character in token): rank
             for token, rank in model["vocab"].items()
             if all(character in alphabet for character in token)}
    encoding_20b = tiktoken.Encoding(
        "20B", mergeable_ranks=ranks, special_tokens={},
        pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    return encoding(settings, encoding_20b.encode_ordinary)


def sentencepiece_package(settings):
    import sentencepiece

    return encoding(settings, sentencepiece.SentencePieceProcessor(model_file=settings["file"])
                    .encode)


PEERS = {
    "gpt eager": lambda settings: gpt_step(settings, compiled=False),
    "gpt compiled": lambda settings: gpt_step(settings, compiled=True),
    "hugging face": hugging_face_step,
    "rwkv7-hf": rwkv7_hf_step,
    "rwkv decode": rwkv_decode,
    "rwkv prefill": rwkv_prefill,
    "rwkv-tokenizer": lambda settings: rust_world(settings, "rwkv_tokenizer"),
    "pyrwkv-tokenizer": lambda settings: rust_world(settings, "pyrwkv_tokenizer"),
    "tokenizers": hugging_face_tokenizer,
    "tiktoken": tiktoken_neox,
    "sentencepiece": sentencepiece_package,
}


def milliseconds(work):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def main():
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    work, warm_up = PEERS[name](settings)
    for _ in range(warm_up):
        work()
    print(json.dumps({"ms": [milliseconds(work) for _ in range(settings["repeats"])]}))


if __name__ == "__main__":
    main()
