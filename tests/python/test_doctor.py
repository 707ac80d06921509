"""`rookery doctor` on this machine, and in an installation that lacks its library."""

import json
import os
import pathlib
import shutil
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


if __name__ == "__main__":
    support.main()
