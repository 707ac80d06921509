"""scripts/gpu_check.sh, on what scripts/package_gpu.sh gathers, with the CPU as the device.

Run by ctest as: test_gpu_check.py PATH_OF_ROOKERY.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import unittest

import support

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
sys.path.append(str(SCRIPTS))
import gpu_check  # noqa: E402
import step_trace  # noqa: E402
CHECKS = ["kernels", "training starts", "rwkv7 starts", "rwkv7 steps fp32", "rwkv7 steps bf16",
          "rwkv7 graph fp32", "rwkv7 graph bf16", "rwkv7 resume bf16", "steps fp32", "steps bf16",
          "graph fp32", "graph bf16", "resume bf16", "trace", "two processes", "links", "zero 0", "zero 1", "zero 2"]


class GpuCheck(support.Folder):
    def run_check(self, build, status):
        """Both files, of a run that ends with `status`."""
        out = self.folder / "out"
        # The script asks for python3: the one that has torch.
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            [SCRIPTS / "gpu_check.sh", "--device", "cpu", "--quick", "--build", build, "--out", out],
            env={**support.environment(), "PATH": path}, capture_output=True, text=True,
            check=False)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        report = json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))
        return report, (out / "gpu_check.md").read_text(encoding="utf-8")

    def package(self):
        """This build, as it is carried to another machine."""
        build = pathlib.Path(support.command_line()[0]).parents[1]
        done = subprocess.run(
            [SCRIPTS / "package_gpu.sh", "--build", build, "--out", self.folder / "package"],
            capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return self.folder / "package"

    def broken_build(self, settings_of_run):
        """A build whose program takes other settings for the runs of that name."""
        program = self.folder / "build" / "bin" / "rookery"
        program.parent.mkdir(parents=True)
        cases = [f'  *"/{run}.toml "*) set -- "$@" --set={setting} ;;\n'
                 for run, setting in settings_of_run.items()]
        program.write_text('#!/bin/sh\ncase "$* " in\n' + "".join(cases) + "esac\n"
                           + f'exec "{support.command_line()[0]}" "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        return self.folder / "build"

    def test_writes_what_it_checked_and_timed(self):
        report, text = self.run_check(self.package(), 0)
        self.assertEqual([check["name"] for check in report["checks"]], CHECKS)
        # No kernels of a device on the CPU.
        self.assertEqual([check["result"] for check in report["checks"]],
                         ["skipped", *["passed"] * (len(CHECKS) - 1)])
        details = {check["name"]: check["detail"] for check in report["checks"]}
        self.assertRegex(details["resume bf16"], "^killed after step_0+[1-9].* equal bit")
        self.assertRegex(details["trace"], "^[0-9]+ events; only a GPU has calls")
        self.assertRegex(details["links"], r"^Gloo, between CPUs; bus GB/s at 1 MiB: sum \d.*"
                         r"broadcast \d.*links: 0 to 1 \S+ GB/s, \S+ us, 1 to 0 ")
        for stage in range(3):
            self.assertRegex(details[f"zero {stage}"],
                             r"^worst of 10 losses .* of one process .* 1e-05 is allowed; again, "
                             r"and eager: weights and optimizer equal bit for bit at step_0+10$")
        for name in ("device", "rookery", "torch", "system", "processor"):
            self.assertTrue(report["facts"][name], name)
        benchmarks = [timing["command"].split()[2] for timing in report["timings"]]
        self.assertEqual(benchmarks, ["step"] * 5 + ["decode"] + ["distributed"] * 2 + ["ops"])
        for timing in report["timings"]:
            with self.subTest(timing["command"]):
                self.assertNotIn("left_out", timing)
                self.assertIn(f"## `{timing['command']}`", text)
                for row in timing["rows"]:
                    self.assertGreater(row["median_ms"], 0)
                    self.assertIn(f"| {row['what']} | ", text)
        # A step has its ops in a table, too.
        for timing in report["timings"][:4]:
            self.assertEqual(timing["rows"][0]["parts"][-1]["what"], "explained")
        self.assertIn("| wkv4 with gate | ", text)
        # Two processes stand beside one and the target, for one micro-batch and for two.
        for micro_batches, timing in zip(("", " x 2"), report["timings"][6:8], strict=True):
            together, alone = timing["rows"]
            self.assertEqual(together["conditions"]["zero"], 1)
            self.assertEqual(together["target_percent"], 97)
            self.assertNotIn("target_percent", alone)
            self.assertIn(f"B2 T16{micro_batches} |", text)
            self.assertTrue(alone["what"].endswith("B2 T16" + micro_batches), alone["what"])
        self.assertIn(" percent_of_linear |", text)
        self.assertIn(" target_percent |", text)

    def test_what_failed_is_named_and_not_timed(self):
        report, text = self.run_check(self.broken_build({
            "steps_bf16": "schedule.lr_init=0.3", "graph_fp32": "schedule.lr_init=1.001e-3",
            "killed_bf16": "schedule.lr_init=1.001e-3", "zero0": "schedule.lr_init=1.01e-3",
            "again_zero1": "schedule.lr_init=1.001e-3",
            "eager_zero2": "schedule.lr_init=1.001e-3"}), 1)
        results = {check["name"]: check for check in report["checks"]}
        failed = [name for name in CHECKS if results[name]["result"] == "failed"]
        self.assertEqual(failed, ["steps bf16", "graph fp32", "resume bf16",
                                  "zero 0", "zero 1", "zero 2"])
        self.assertRegex(results["steps bf16"]["detail"], r"off by .* 2e-02 is allowed")
        self.assertRegex(results["graph fp32"]["detail"],
                         r"tensors differ between graph_fp32 and eager_fp32, first \w")
        self.assertRegex(results["zero 0"]["detail"], r"off by .* of one process .* 1e-05 is allowed$")
        # A file of one of the two.
        self.assertRegex(results["zero 1"]["detail"],
                         r"^model\.00000-of-00002\.safetensors: .* between zero1 and again_zero1, ")
        self.assertRegex(results["zero 2"]["detail"], " between zero2 and eager_zero2, first ")
        left_out = {(timing["command"].split()[2], timing["left_out"])
                    for timing in report["timings"] if "left_out" in timing}
        self.assertEqual(left_out, {("step", "graph fp32 failed"), ("step", "steps bf16 failed"),
                                    ("decode", "steps bf16 failed"),
                                    ("distributed", "steps bf16, zero 1 failed")})
        self.assertIn("Left out: graph fp32 failed", text)
        self.assertEqual([bool(timing["rows"]) for timing in report["timings"]],
                         [False] * 4 + [True] + [False] * 3 + [True])

    def test_two_processes_are_left_out_where_one_gpu_is_visible(self):
        class Machine:
            device = "cuda"

            def __init__(self, gpus):
                self.gpus = gpus

            def rookery(self, *_):
                return json.dumps({"gpus": ["a GPU"] * self.gpus})

        for gpus, result, detail in (
                (1, "skipped", "1 GPU is visible, and two processes need one each"),
                (2, "passed", "2 GPUs are visible")):
            report = gpu_check.Report()
            with contextlib.redirect_stdout(io.StringIO()):
                report.check("two processes", gpu_check.check_two_places, Machine(gpus))
            self.assertEqual((report.checks[0]["result"], report.checks[0]["detail"]),
                             (result, detail))
            self.assertEqual(report.passed("two processes"), result == "passed")
            # Nothing is wrong without them.
            self.assertTrue(report.all_well())

    def test_the_package_holds_what_the_program_needs_beside_torch(self):
        package = self.package()
        carried = {path.name for path in (package / "lib").iterdir()}
        self.assertIn("librookery_torch.so", carried)
        self.assertTrue((package / "bin" / "rookery").exists())
        needed = subprocess.run(["ldd", support.command_line()[0]], capture_output=True, text=True,
                                check=True).stdout.split()
        for library in ("spdlog", "fmt", "sentencepiece", "simdjson", "utf8proc", "zstd"):
            names = [name for name in needed if name.startswith(f"lib{library}.so")]
            self.assertTrue(carried.issuperset(names) and names, library)
        for left_out in ("libc.so.6", "libstdc++.so.6", "libtorch_cpu.so", "libgomp.so.1"):
            self.assertNotIn(left_out, carried)

    def test_a_build_that_is_not_there_is_named(self):
        done = subprocess.run(
            [SCRIPTS / "package_gpu.sh", "--build", self.folder, "--out", self.folder / "package"],
            capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"{self.folder}/bin/rookery is not there; build first", done.stderr)

    def test_another_folder_is_not_overwritten(self):
        support.write_text(self.folder / "mine.txt", ["mine"])
        build = pathlib.Path(support.command_line()[0]).parents[1]
        done = subprocess.run(
            [SCRIPTS / "package_gpu.sh", "--build", build, "--out", self.folder],
            capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("is no package of an earlier call", done.stderr)
        self.assertEqual((self.folder / "mine.txt").read_text(), "mine\n")

    def test_a_folder_without_a_program_is_a_wrong_command_line(self):
        done = subprocess.run([SCRIPTS / "gpu_check.sh", "--out", self.folder / "out", "--build", self.folder],
                              capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn("bin/rookery is not there; make it with scripts/package_gpu.sh", done.stderr)



class StepTrace(unittest.TestCase):
    """What is read from a timeline, of made-up ones: (category, name, begin, duration)."""

    # The trace's own beginning and end allocate and wait.
    STEPS = (("cuda_runtime", "cudaMalloc", 0, 5), ("cuda_runtime", "cudaGraphLaunch", 10, 2),
             ("cuda_runtime", "cudaEventSynchronize", 14, 3), ("cuda_runtime", "cudaMemcpyAsync", 18, 1),
             ("cuda_runtime", "cudaGraphLaunch", 20, 2), ("cuda_runtime", "cudaDeviceSynchronize", 30, 9),
             ("kernel", "a", 12, 4), ("kernel", "b", 15, 3), ("gpu_memcpy", "c", 20, 2))

    def findings(self, *more):
        return step_trace.findings_of([
            {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}
            for category, name, begin, duration in (*self.STEPS, *more)])

    def test_counts_between_the_launches_alone(self):
        found = self.findings()
        self.assertEqual(found["launches"], 2)
        self.assertEqual((found["allocates"], found["waits"]), ([], []))
        self.assertEqual(found["calls"], {"cudaEventSynchronize": 1, "cudaGraphLaunch": 2,
                                          "cudaMemcpyAsync": 1})

    def test_counts_work_side_by_side_once(self):
        found = self.findings()
        self.assertEqual((found["gpu_us"], found["gpu_busy_us"], found["longest_pause_us"]), (10, 8, 2))

    def test_names_what_allocates_and_waits(self):
        for name in ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cuMemCreate"):
            self.assertEqual(self.findings(("cuda_runtime", name, 15, 1))["allocates"], [name])
        for name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"):
            self.assertEqual(self.findings(("cuda_runtime", name, 15, 1))["waits"], [name])

    def test_says_nothing_of_steps_without_graphs(self):
        self.assertIsNone(step_trace.findings_of([]))


if __name__ == "__main__":
    support.main()
