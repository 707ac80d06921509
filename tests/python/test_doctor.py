"""`rookery doctor` on this machine, between processes on it, and in an installation that lacks its
library.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess

import support


class Doctor(support.Folder):
    def test_finds_that_training_can_run_here(self):
        result = json.loads(support.rookery("doctor", "--json", cwd=self.folder))
        self.assertTrue(result["can_train"])
        self.assertEqual(result["cores"], len(os.sched_getaffinity(0)))
        self.assertGreater(result["disk_write_bytes_per_s"], 0)
        self.assertRegex(result["libtorch"], r"^\d+\.\d+")
        (libtorch,) = [c for c in result["checks"] if c["name"] == "libtorch"]
        path = libtorch["found"].split(", ", 1)[1]
        self.assertTrue(pathlib.Path(path).name.startswith("libtorch_cpu.so"))
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_advises_wherever_something_is_wrong(self):
        result = json.loads(support.rookery("doctor", "--json", cwd=self.folder))
        for check in result["checks"]:
            self.assertEqual(bool(check["advice"]), check["verdict"] != "good", check)
        text = support.rookery("doctor", cwd=self.folder).decode()
        self.assertIn("training can run here", text)

    def limited(self, address_space):
        """The doctor where that many bytes of addresses may be used."""
        return subprocess.run(
            ["sh", "-c", f'ulimit -v {address_space >> 10}; exec "$0" doctor',
             support.command_line()[0]],
            cwd=self.folder, capture_output=True, check=False)

    def test_counts_the_limit_of_addresses(self):
        # LibTorch alone takes 430 MB of them.
        done = self.limited(750 << 20)
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stdout, rb"(?m)^fatal +memory .*GiB, 0\.\d GiB of it free$")
        done = self.limited(1500 << 20)
        self.assertEqual(done.returncode, 0, done)
        self.assertRegex(done.stdout, rb"(?m)^warning +memory")

    def test_says_that_libtorch_does_not_fit(self):
        done = self.limited(400 << 20)
        self.assertEqual(done.returncode, 1, done)
        self.assertIn(b"LibTorch cannot be loaded", done.stderr)

    def test_fails_without_the_library(self):
        # A copy of the program alone has no lib folder beside it.
        program = self.folder / "bin" / "rookery"
        program.parent.mkdir()
        shutil.copy(support.command_line()[0], program)
        done = subprocess.run([program, "doctor"], cwd=self.folder, capture_output=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"librookery_torch.so", done.stdout)
        self.assertIn(b"training cannot run here", done.stdout)


class Links(support.Folder):
    OPERATIONS = ["sum", "reduce-scatter", "all-gather", "broadcast"]

    def test_times_every_operation_and_every_link(self):
        result = json.loads(support.rookery("doctor", "--distributed", "--nproc", 3,
                                            "--max-megabytes", 1, "--json", cwd=self.folder))
        self.assertTrue(result["all_is_right"])
        self.assertEqual(result["machines"], [socket.gethostname()] * 3)
        # Of three equal parts.
        self.assertEqual([(o["operation"], o["bytes"]) for o in result["operations"]],
                         [(name, size // 12 * 12) for name in self.OPERATIONS
                          for size in (1 << 16, 1 << 20)] + [("agreement", 63)])
        for operation in result["operations"]:
            self.assertEqual(operation["wrong_ranks"], [])
            self.assertAlmostEqual(operation["algorithm_gb_per_s"] * operation["ms"] * 1e6,
                                   operation["bytes"], delta=1e-3)
        self.assertEqual([(link["from"], link["to"]) for link in result["links"]],
                         [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)])
        for link in result["links"]:
            self.assertFalse(link["is_wrong"])
            self.assertGreater(link["gb_per_s"], 0)
            self.assertGreater(link["latency_us"], 0)

    def test_is_started_as_training_is_and_prints_once(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            subprocess.Popen(
                support.command_line("doctor", "--distributed", "--max-megabytes", 1),
                cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**support.environment(), "RANK": str(rank), "WORLD_SIZE": "2",
                     "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            for rank in range(2)]
        (first, errors), (second, _) = [rank.communicate(timeout=120) for rank in ranks]
        self.assertEqual([rank.returncode for rank in ranks], [0, 0], errors)
        self.assertEqual(second, b"")
        self.assertRegex(first, rb"(?m)^2 processes, Gloo, between CPUs$")
        for name in self.OPERATIONS:
            self.assertRegex(first, rb"(?m)^%s +1 MiB +\S+ +\S+ +\S+$" % name.encode())
        self.assertRegex(first, rb"(?m)^from 1 +\S+ +-$")
        self.assertIn(b"16 MiB", support.rookery("doctor", "--distributed", "--nproc", 2,
                                                 "--max-megabytes", 16, cwd=self.folder))

    def test_refuses_what_does_not_go_together(self):
        for arguments, words in (
            (("--nproc", 2), "are of --distributed"),
            (("--device", "cuda"), "are of --distributed"),
            (("--max-megabytes", 1), "are of --distributed"),
            (("--distributed",), "one process alone has no links; give --nproc 2"),
            (("--distributed", "--nproc", 1), "one process alone has no links"),
            (("--distributed", "--nproc", 2, "--max-megabytes", 0),
             "--max-megabytes 0: expected a number from 1 to"),
            (("--distributed", "--nproc", 2, "--device", "cuda:1"), "--device cuda:1: expected cpu"),
        ):
            with self.subTest(arguments):
                done = support.run("doctor", *arguments, cwd=self.folder)
                self.assertEqual(done.returncode, 2, done)
                self.assertIn(words, done.stderr.decode())


if __name__ == "__main__":
    support.main()
