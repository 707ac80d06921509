"""Models that we trained, in the programs they are written for: PyTorch, safetensors, rwkv.

Run by ctest as: test_peers.py PATH_OF_ROOKERY. A package that is missing skips its test; in CI it
fails it.
"""

import collections
import contextlib
import importlib
import io
import os
import pathlib
import tempfile
import unittest

import support
from support import rookery

# No size divides another but that of a head, so that a transposed or a mixed-up tensor cannot fit.
MODEL = {"n_layer": 3, "n_embd": 24, "dim_ffn": 56, "vocab_size": 260, "ctx_len": 32}
TOKENS = [72, 101, 32, 119, 101, 110, 116, 46, 10, 0, 255] + [7 * i % 251 for i in range(53)]


def shapes_of_upstream(model):
    """Names and shapes of RWKV-LM's state_dict: what its load_state_dict() takes, which is strict."""
    c, f, v = model["n_embd"], model["dim_ffn"], model["vocab_size"]
    shapes = {"emb.weight": (v, c), "head.weight": (v, c),
              "ln_out.weight": (c,), "ln_out.bias": (c,),
              "blocks.0.ln0.weight": (c,), "blocks.0.ln0.bias": (c,)}
    of_block = {"ln1.weight": (c,), "ln1.bias": (c,), "ln2.weight": (c,), "ln2.bias": (c,),
                "att.receptance.weight": (c, c), "att.key.weight": (c, c),
                "att.value.weight": (c, c), "att.output.weight": (c, c),
                "ffn.key.weight": (f, c), "ffn.value.weight": (c, f)}
    if model["version"] != "rwkv7":
        of_block["ffn.receptance.weight"] = (c, c)
    if model["version"] != "rwkv4":
        heads = (c // model["head_size"], model["head_size"])
        of_block |= {"att.ln_x.weight": (c,), "att.ln_x.bias": (c,)}
    mix = (1, 1, c)
    if model["version"] == "rwkv4":
        of_block |= {"att.time_decay": (c,), "att.time_first": (c,)}
        of_block |= {f"att.time_mix_{name}": mix for name in "kvr"}
        of_block |= {f"ffn.time_mix_{name}": mix for name in "kr"}
    elif model["version"] == "rwkv5":
        of_block |= {"att.time_decay": heads, "att.time_faaaa": heads, "att.gate.weight": (c, c)}
        of_block |= {f"att.time_mix_{name}": mix for name in "kvrg"}
        of_block |= {f"ffn.time_mix_{name}": mix for name in "kr"}
    elif model["version"] == "rwkv6":
        rank, decay = model["rank_mix"], model["rank_decay"]
        of_block |= {f"att.time_maa_{name}": mix for name in "xwkvrg"}
        of_block |= {f"ffn.time_maa_{name}": mix for name in "kr"}
        of_block |= {"att.time_maa_w1": (c, 5 * rank), "att.time_maa_w2": (5, rank, c),
                     "att.time_decay": mix, "att.time_decay_w1": (c, decay),
                     "att.time_decay_w2": (decay, c), "att.time_faaaa": heads,
                     "att.gate.weight": (c, c)}
    else:
        of_block |= {f"att.x_{name}": mix for name in "rwkvag"} | {"ffn.x_k": mix}
        of_block |= {f"att.{name}": mix for name in ("w0", "a0", "v0", "k_k", "k_a")}
        for name, rank in (("w", "decay"), ("a", "iclr"), ("v", "value"), ("g", "gate")):
            of_block |= {f"att.{name}1": (c, model[f"rank_{rank}"]),
                         f"att.{name}2": (model[f"rank_{rank}"], c)}
        of_block["att.r_k"] = heads
    return shapes | {f"blocks.{layer}.{name}": shape
                     for layer in range(model["n_layer"]) for name, shape in of_block.items()}


def load_in_package(version, path):
    """The model in the `rwkv` package, on the CPU in fp32; asked for RWKV-7 it is another program."""
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_V7_ON"] = "1" if version == "rwkv7" else "0"
    with contextlib.redirect_stdout(io.StringIO()):
        upstream = importlib.reload(support.package("rwkv.model"))
        # Of RWKV-7's files it adds the ending itself, of the others' where it is missing.
        return upstream.RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")


def bits(tensor):
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class TrainedModel:
    # Of each version below.
    model = {}
    # Tensors that nothing reads and that no gradient comes to.
    unused = ()

    @classmethod
    def setUpClass(cls):
        cls.torch = support.package("torch")
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        support.write_text(cls.folder / "text.txt", support.text_lines(900))
        rookery("tokenize", "--tokenizer", "bytes", "--output", "text", "text.txt",
                cwd=cls.folder)
        support.write_config(cls.folder / "run.toml", **support.small_run(
            {"train": "text"}, model=cls.model, total_steps=100))
        rookery("train", "--config", "run.toml", cwd=cls.folder)
        rookery("convert", "run", "model.pth", cwd=cls.folder)

    def path(self, name):
        return str(self.folder / name)

    def load(self, name):
        return self.torch.load(self.path(name), weights_only=True, mmap=True)

    def our_logits(self, model, *options):
        file = support.package("safetensors.torch")
        rookery("logits", "--model", model, "--tokens", ",".join(map(str, TOKENS)), "--all",
                "--output", "logits.safetensors", *options, cwd=self.folder)
        return file.load_file(self.path("logits.safetensors"))["logits"]

    def test_has_learnt_in_every_tensor(self):
        # The rest of this file says little of a model whose inner matrices are still zero.
        weights = self.load("model.pth")
        for name in weights.keys() - set(self.unused):
            tensor = weights[name]
            self.assertGreater(tensor.abs().max().item(), 1e-3, name)
            self.assertGreater(tensor.float().std().item(), 1e-4, name)

    def test_loads_in_torch_with_the_names_shapes_and_types_of_upstream(self):
        weights = self.load("model.pth")
        self.assertIs(type(weights), collections.OrderedDict)
        self.assertEqual({name: tuple(tensor.shape) for name, tensor in weights.items()},
                         shapes_of_upstream(self.model))
        self.assertEqual({tensor.dtype for tensor in weights.values()}, {self.torch.float32})

    def test_loads_in_safetensors_as_it_does_in_torch(self):
        file = support.package("safetensors.torch")
        rookery("convert", "model.pth", "model.safetensors", cwd=self.folder)
        theirs = file.load_file(self.path("model.safetensors"))
        weights = self.load("model.pth")
        self.assertEqual(set(theirs), set(weights))
        for name, tensor in weights.items():
            self.assertEqual(theirs[name].shape, tensor.shape, name)
            self.assertEqual(bits(theirs[name]), bits(tensor), name)

    def test_a_checkpoint_is_itself_a_file_for_safetensors(self):
        safetensors = support.package("safetensors")
        path = self.path("run/checkpoints/step_00000100/model.safetensors")
        weights = self.load("model.pth")
        with safetensors.safe_open(path, "pt") as file:
            self.assertEqual(file.metadata()["format"], "pt")
            self.assertEqual(set(file.keys()), set(weights))
            for name, tensor in weights.items():
                self.assertEqual(bits(file.get_tensor(name)), bits(tensor), name)

    def test_converted_to_bf16_and_fp16_is_what_torch_makes_of_it(self):
        weights = self.load("model.pth")
        for option, dtype in (("bf16", self.torch.bfloat16), ("fp16", self.torch.float16)):
            with self.subTest(option):
                rookery("convert", "run", f"{option}.pth", "--dtype", option, cwd=self.folder)
                converted = self.load(f"{option}.pth")
                self.assertEqual(list(converted), list(weights))
                for name, tensor in weights.items():
                    self.assertEqual(converted[name].dtype, dtype, name)
                    self.assertEqual(bits(converted[name]), bits(tensor.to(dtype)), name)

    def test_saved_again_by_torch_gives_us_the_same_logits(self):
        weights = self.load("model.pth")
        self.torch.save(dict(weights), self.path("again.pth"))
        self.torch.save(dict(weights), self.path("legacy.pth"),
                        _use_new_zipfile_serialization=False)
        expected = self.our_logits("run")
        for name in ("again.pth", "legacy.pth"):
            with self.subTest(name):
                self.assertTrue(self.torch.equal(self.our_logits(name), expected))

    def test_gives_the_same_logits_in_the_rwkv_package(self):
        model = load_in_package(self.model["version"], self.path("model.pth"))
        expected, _ = model.forward(TOKENS, None, full_output=True)
        for mode in ("parallel", "recurrent"):
            with self.subTest(mode):
                difference = (self.our_logits("run", "--mode", mode) - expected).abs().max().item()
                self.assertLess(difference, 1e-4)
        # Differences this small mean little if the logits hardly depend on what came before.
        alone, _ = model.forward(TOKENS[-1:], None)
        self.assertGreater((alone - expected[-1]).abs().max().item(), 0.5)

    def test_state_is_that_of_the_rwkv_package(self):
        model = load_in_package(self.model["version"], self.path("model.pth"))
        prompt = b"The little"
        # A document begins with a zero byte.
        _, state = model.forward([0, *prompt], None)
        rookery("generate", "--model", "run", "--tokenizer", "bytes", "--prompt", prompt.decode(),
                "--length", 0, "--save-state", "state.bin", cwd=self.folder)
        # The package's of a layer: att's row, wkv, ffn's row; rwkv.cpp's begins with ffn's.
        a_layer = len(state) // self.model["n_layer"]
        theirs = []
        for i in range(0, len(state), a_layer):
            theirs += [state[i + a_layer - 1], *state[i:i + a_layer - 1]]
        theirs = self.torch.cat([tensor.flatten().float() for tensor in theirs])
        ours = self.torch.frombuffer(bytearray((self.folder / "state.bin").read_bytes()),
                                     dtype=self.torch.float32)
        self.assertEqual(ours.shape, theirs.shape)
        self.assertLess((ours - theirs).abs().max().item(), 1e-4 * theirs.abs().max().item())

    def test_continues_a_prompt_as_the_rwkv_package_does(self):
        model = load_in_package(self.model["version"], self.path("model.pth"))
        prompt = b"The little"
        logits, state = model.forward(list(prompt), None)
        theirs = bytearray(prompt)
        for _ in range(80):
            token = int(logits[:256].argmax())
            theirs.append(token)
            logits, state = model.forward([token], state)
        ours = rookery("generate", "--model", "run", "--tokenizer", "bytes",
                       "--prompt", prompt.decode(), "--length", 80, "--temperature", 0,
                       cwd=self.folder)
        self.assertEqual(ours, bytes(theirs) + b"\n")


class Rwkv4(TrainedModel, unittest.TestCase):
    model = {**MODEL, "version": "rwkv4"}


class Rwkv5(TrainedModel, unittest.TestCase):
    model = {**MODEL, "version": "rwkv5", "head_size": 8}


class Rwkv6(TrainedModel, unittest.TestCase):
    model = {**MODEL, "version": "rwkv6", "head_size": 8, "rank_mix": 5,
             "rank_decay": 7}


class Rwkv7(TrainedModel, unittest.TestCase):
    model = {**MODEL, "version": "rwkv7", "head_size": 8, "rank_decay": 5, "rank_iclr": 7,
             "rank_value": 9, "rank_gate": 11}
    unused = [f"blocks.0.att.v{i}" for i in range(3)]


if __name__ == "__main__":
    support.main()
