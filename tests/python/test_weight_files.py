"""Weight files against the programs whose formats they are: PyTorch, safetensors, rwkv.

Run by ctest as: test_weight_files.py PATH_OF_WEIGHT_TOOL. Exit status 77 (skipped) if a package is
missing, 1 in CI.
"""

import collections
import os
import subprocess
import sys
import tempfile
import unittest

try:
    import numpy
    import safetensors.torch
    import torch
except ImportError as error:
    print(f"skipped: {error}; install torch, numpy and safetensors, or set ROOKERY_PYTHON")
    sys.exit(1 if "CI" in os.environ else 77)

WEIGHT_TOOL = ""

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}


def tool(*arguments, stdin=None):
    done = subprocess.run([WEIGHT_TOOL, *arguments], input=stdin, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode())
    return done.stdout


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def listed(path):
    """What weight_tool reads: {name: (torch dtype, shape, bytes)}."""
    tensors = {}
    for line in tool("list", path).decode().splitlines():
        name, dtype, shape, data = line.split("\t")
        sizes = tuple(int(size) for size in shape.split(",") if size)
        tensors[name] = (DTYPES[dtype], sizes, bytes.fromhex(data))
    return tensors


def described(tensors):
    return {name: (t.dtype, tuple(t.shape), bytes_of(t)) for name, t in tensors.items()}


def mixed_tensors():
    """A state dict of everything that occurs in one: types, views, shared storages, parameters."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 10, generator=generator)
    tensors = collections.OrderedDict()
    for name, dtype in DTYPES.items():
        tensors["types." + name] = (base * 50).clamp(0, 100).to(dtype)
    tensors["transposed"] = base.t()
    tensors["sliced"] = base[1:5:2, 3:7]
    tensors["permuted"] = torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1)
    tensors["shared.first"] = base[:3]
    tensors["shared.rest"] = base[3:]
    tensors["expanded"] = base[:1].expand(4, 10)
    tensors["expanded.bf16"] = torch.tensor([1.5], dtype=torch.bfloat16).expand(3)
    tensors["scalar"] = torch.tensor(7)
    tensors["empty"] = torch.zeros(0, 3)
    tensors["empty.with.offset"] = base[6:]
    tensors["parameter"] = torch.nn.Parameter(torch.randn(1, 1, 5, generator=generator))
    tensors["unicode.\u00e4\u6f22"] = torch.ones(2)
    return tensors


class Folder(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()

    def tearDown(self):
        self.folder.cleanup()

    def path(self, name):
        return os.path.join(self.folder.name, name)


class WhatTorchSaves(Folder):
    def check(self, saved, expected, **options):
        torch.save(saved, self.path("a.pth"), **options)
        self.assertEqual(listed(self.path("a.pth")), described(expected))

    def test_is_read_with_equal_values_from_both_containers_and_every_protocol(self):
        tensors = mixed_tensors()
        for protocol in (2, 3, 4, 5):
            for zipped in (True, False):
                with self.subTest(protocol=protocol, zip=zipped):
                    self.check(
                        tensors,
                        tensors,
                        pickle_protocol=protocol,
                        _use_new_zipfile_serialization=zipped,
                    )

    def test_is_read_from_under_a_key_and_beside_other_values(self):
        tensors = mixed_tensors()
        for key in ("state_dict", "model", "anything"):
            wrapped = {
                "epoch": 3,
                "losses": [0.5, None, True, -(2**40), 2**70],
                "dtype": torch.bfloat16,
                "shape": torch.Size([2, 3]),
                key: tensors,
            }
            self.check(wrapped, tensors)

    def test_is_read_from_beside_an_optimizer(self):
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self.check(saved, model.state_dict())
        self.check(saved, model.state_dict(), _use_new_zipfile_serialization=False)

    def test_is_read_without_the_prefixes_of_wrappers(self):
        tensors = mixed_tensors()
        for prefix in ("_forward_module.", "module.", "_forward_module._orig_mod.model."):
            self.check({prefix + name: t for name, t in tensors.items()}, tensors)

    def test_is_read_from_a_module_with_more_tensors_than_one_batch_of_items(self):
        module = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(1100))
        self.check(module.state_dict(), module.state_dict())

    def test_is_read_without_checksums(self):
        before = torch.serialization.get_crc32_options()
        try:
            torch.serialization.set_crc32_options(False)
            self.check(mixed_tensors(), mixed_tensors())
        finally:
            torch.serialization.set_crc32_options(before)

    def test_is_refused_where_it_is_not_a_state_dict(self):
        cases = {
            "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
            "holds no dict of tensors": torch.ones(2),
            "wants torch.ComplexFloatStorage": {"a": torch.ones(2, dtype=torch.complex64)},
            "wants torch._utils._rebuild_sparse_tensor": {"a": torch.ones(2).to_sparse()},
            '"neg"': {"a": torch._neg_view(torch.ones(2))},
        }
        for text, saved in cases.items():
            with self.subTest(text):
                torch.save(saved, self.path("a.pth"))
                with self.assertRaises(RuntimeError) as caught:
                    listed(self.path("a.pth"))
                self.assertIn(text, str(caught.exception))


class WhatWeWrite(Folder):
    def test_loads_in_torch_bit_for_bit(self):
        tensors = mixed_tensors()
        torch.save(tensors, self.path("a.pth"))
        tool("copy", self.path("a.pth"), self.path("b.pth"))
        for options in ({}, {"mmap": True}, {"weights_only": False}):
            loaded = torch.load(self.path("b.pth"), **{"weights_only": True, **options})
            self.assertEqual(type(loaded), collections.OrderedDict)
            self.assertEqual(list(loaded), list(tensors))
            self.assertEqual(described(loaded), described(tensors))

    def test_is_a_zip_file_that_unzip_finds_no_fault_with(self):
        import zipfile

        torch.save(mixed_tensors(), self.path("a.pth"))
        tool("copy", self.path("a.pth"), self.path("b.pth"))
        with zipfile.ZipFile(self.path("b.pth")) as archive:
            self.assertIsNone(archive.testzip())
            self.assertEqual(archive.read("archive/version"), b"3\n")

    def test_runs_in_the_rwkv_package_as_the_reference_does(self):
        root = os.environ.get("ROOKERY_TEST_DATA", "../shared/data")
        folder = os.path.join(root, "derived", "rwkv4_synthetic")
        try:
            os.environ["RWKV_JIT_ON"] = "0"
            from rwkv.model import RWKV
        except ImportError as error:
            self.missing(str(error))
        if not os.path.isdir(folder):
            self.missing(folder)
        tool("copy", os.path.join(folder, "weights_fp32.pth"), self.path("rwkv4.pth"))
        model = RWKV(model=self.path("rwkv4.pth"), strategy="cpu fp32", verbose=False)
        tokens = numpy.fromfile(os.path.join(folder, "tokens_i32_2x21.bin"), "<i4").reshape(2, 21)
        expected = numpy.fromfile(os.path.join(folder, "logits_f64_2x20x48.bin"), "<f8")
        for row, logits in zip(tokens[:, :20].tolist(), expected.reshape(2, 20, 48)):
            ours, _ = model.forward(row, None, full_output=True)
            self.assertLess(numpy.abs(ours.numpy() - logits).max(), 2e-5)

    def missing(self, what):
        if "CI" in os.environ:
            self.fail(f"missing, and CI must have it: {what}")
        self.skipTest(f"missing: {what}")


class Safetensors(Folder):
    def contiguous_tensors(self):
        return {name: t.detach().contiguous().clone() for name, t in mixed_tensors().items()}

    def test_written_by_the_package_are_read(self):
        tensors = self.contiguous_tensors()
        safetensors.torch.save_file(tensors, self.path("a.safetensors"), {"format": "pt"})
        self.assertEqual(listed(self.path("a.safetensors")), described(tensors))

    def test_written_by_us_load_in_the_package_with_their_metadata(self):
        tensors = self.contiguous_tensors()
        metadata = {"format": "pt", "a \"quoted\" key\n": "\u00e4"}
        safetensors.torch.save_file(tensors, self.path("a.safetensors"), metadata)
        tool("copy", self.path("a.safetensors"), self.path("b.st"))
        loaded = safetensors.torch.load_file(self.path("b.st"))
        self.assertEqual(described(loaded), described(tensors))
        with safetensors.safe_open(self.path("b.st"), "pt") as file:
            self.assertEqual(file.metadata(), metadata)

    def test_made_from_pth_and_back_are_the_same(self):
        tensors = mixed_tensors()
        torch.save(tensors, self.path("a.pth"))
        tool("copy", self.path("a.pth"), self.path("b.safetensors"))
        self.assertEqual(
            described(safetensors.torch.load_file(self.path("b.safetensors"))), described(tensors)
        )
        tool("copy", self.path("b.safetensors"), self.path("c.pth"))
        loaded = torch.load(self.path("c.pth"), weights_only=True)
        self.assertEqual(described(loaded), described(tensors))


class Conversions(unittest.TestCase):
    def check(self, tensor, source, target):
        self.assertEqual(tensor.dtype, DTYPES[source])
        out = tool("convert", source, target, stdin=bytes_of(tensor))
        ours = torch.frombuffer(bytearray(out), dtype=DTYPES[target])
        theirs = tensor.to(DTYPES[target])
        # The bits of NaN differ between PyTorch's own code paths.
        nan = theirs.isnan()
        self.assertTrue(torch.equal(ours.isnan(), nan))
        self.assertEqual(bytes_of(ours[~nan]), bytes_of(theirs[~nan]))

    def test_from_f32_are_torchs_for_random_bits_and_for_every_tie(self):
        generator = torch.Generator().manual_seed(2)
        bits = torch.randint(-(2**31), 2**31, (400_000,), generator=generator)
        high = torch.arange(65536)
        # Around half a bf16, and around half an f16 (13 bits below its last).
        ties = [high * 65536 + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        steps = torch.arange(0x33000000 >> 12, 0x47800000 >> 12)
        ties += [steps * 4096 + low for low in (-1, 0, 1)]
        patterns = torch.cat([bits, *ties]).to(torch.int32)
        for target in ("f16", "bf16", "f64"):
            with self.subTest(target):
                self.check(patterns.view(torch.float32), "f32", target)

    def test_from_every_f16_and_bf16_are_torchs(self):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
        for source, others in (("f16", ("bf16", "f32", "f64")), ("bf16", ("f16", "f32", "f64"))):
            for target in others:
                with self.subTest(source=source, target=target):
                    self.check(every.view(DTYPES[source]), source, target)

    def test_from_f64_are_torchs(self):
        generator = torch.Generator().manual_seed(3)
        values = torch.randn(100_000, dtype=torch.float64, generator=generator)
        values = values * torch.exp2(torch.randint(-160, 160, values.shape, generator=generator))
        special = torch.tensor([0.0, -0.0, 1e300, -1e300, 5e-324, float("inf"), float("nan")])
        for target in ("f32", "f16", "bf16"):
            with self.subTest(target):
                self.check(torch.cat([values, special.double()]), "f64", target)


if __name__ == "__main__":
    WEIGHT_TOOL = os.path.abspath(sys.argv.pop(1))
    unittest.main()
