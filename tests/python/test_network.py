"""Two hosts that train together: network namespaces joined by a pair of virtual devices, a launcher in
each. What one link more or less does to a run.

Run by ctest as: test_network.py PATH_OF_ROOKERY. It asks for root and iproute2, and skips without.
"""

import json
import shutil
import subprocess
import time

import support
from support import rookery

DEADLINE_S = 120
TIMEOUT_S = 5  # the least that distributed.timeout_s may be
# For ranks to say what they know and launchers to see them end, on a busy machine.
ENDING_S = 7
PORT = 29500
ADDRESSES = ("10.61.0.1", "10.61.0.2")


class Host:
    """A network namespace. It lives as long as a process in it, which lives as long as this one."""

    def __init__(self):
        self.holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
        if self.holder.stdout.readline() != b"ready\n":
            reason = self.holder.stderr.read().decode().strip()
            self.close()
            support.missing(f"network namespaces ({reason}); run as root, and allow them")

    def close(self):
        # Its devices go with it.
        self.holder.communicate()

    def command(self, *command):
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--", *command]

    def ip(self, *arguments):
        done = subprocess.run(self.command("ip", *map(str, arguments)), capture_output=True,
                              check=False)
        if done.returncode != 0:
            support.missing(f"ip {' '.join(map(str, arguments))} in a network namespace: "
                            + done.stderr.decode().strip())

    def set_link(self, state):
        self.ip("link", "set", "link0", state)


class TwoHosts(support.Folder):
    def setUp(self):
        super().setUp()
        for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
            if shutil.which(tool) is None:
                support.missing(f"{tool}; install Debian's {package}")
        self.hosts = []
        for _ in ADDRESSES:
            self.hosts.append(Host())
            self.addCleanup(self.hosts[-1].close)
        first, second = self.hosts
        first.ip("link", "add", "link0", "type", "veth",
                 "peer", "name", "link0", "netns", second.holder.pid)
        for host, address in zip(self.hosts, ADDRESSES, strict=True):
            host.ip("address", "add", f"{address}/24", "dev", "link0")
            host.ip("link", "set", "lo", "up")
            host.set_link("up")
        support.write_text(self.folder / "text.txt", support.text_lines())
        rookery("tokenize", "--tokenizer", "bytes", "--output", "corpus", "text.txt",
                cwd=self.folder)
        config = support.small_run({"train": "corpus"}, total_steps=400, batch_size=7,
                                   log_every_steps=1, save_every_steps=20,
                                   schedule={"kind": "constant", "lr_init": 1e-3})
        config["schedule"].pop("lr_final")
        support.write_config(self.folder / "run.toml", **config,
                             distributed={"timeout_s": TIMEOUT_S})

    def start(self, *options):
        """A launcher on each host."""
        launchers = []
        for node, host in enumerate(self.hosts):
            with open(self.folder / f"node_{node}.log", "wb") as log:
                launchers.append(subprocess.Popen(
                    host.command(*support.command_line(
                        "train", "--config", "run.toml", "--nproc", 1, "--nnodes", 2,
                        "--node-rank", node, "--master", f"{ADDRESSES[0]}:{PORT}", *options)),
                    cwd=self.folder, env=support.environment(), stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=log))
            self.addCleanup(launchers[-1].wait)
            self.addCleanup(launchers[-1].kill)
        return launchers

    def log(self, node):
        return (self.folder / f"node_{node}.log").read_text(encoding="utf-8")

    def logs(self):
        return "".join(f"---- node {node}:\n{self.log(node)}" for node in range(2))

    def wait(self, launchers):
        end = time.monotonic() + DEADLINE_S
        return [launcher.wait(timeout=end - time.monotonic()) for launcher in launchers]

    def wait_for_steps(self, count, launchers, run):
        path = self.folder / run / "metrics.jsonl"
        end = time.monotonic() + DEADLINE_S
        while not (path.exists() and path.read_bytes().count(b"\n") >= count):
            self.assertLess(time.monotonic(), end, self.logs())
            self.assertEqual([launcher.poll() for launcher in launchers], [None, None], self.logs())
            time.sleep(0.005)

    def result(self, run):
        """What a run comes to: the losses, and the files of its last checkpoint."""
        checkpoint = self.folder / run / "checkpoints/step_00000400"
        lines = (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return ([json.loads(line)["loss"] for line in lines],
                {path.name: path.read_bytes() for path in checkpoint.glob("optimizer*.safetensors")})

    def run_on_loopback(self):
        rookery("train", "--config", "run.toml", "--nproc", 2, "--set", "train.run_dir=loopback",
                cwd=self.folder)
        return self.result("loopback")

    def cut_in_mid_step(self, launchers, node, run="run"):
        """Cuts the link of one host; returns when it did."""
        self.wait_for_steps(50, launchers, run)
        self.hosts[node].set_link("down")
        return time.monotonic()

    def assert_the_other_is_named(self):
        """Each by the other, with the step and what it was doing."""
        for node in range(2):
            self.assertRegex(
                self.log(node),
                rf"step \d+: (in the [^:]+|the .* failed on rank {node}): "
                rf".*rank {1 - node}(,| has not been)")

    def test_make_the_run_of_two_processes_bit_for_bit(self):
        self.assertEqual(self.wait(self.start()), [0, 0], self.logs())
        self.assertTrue(self.result("run") == self.run_on_loopback())

    def test_that_lose_their_link_name_each_other_and_end_in_time(self):
        for node in range(2):
            with self.subTest(cut_at=node):
                launchers = self.start("--max-restarts", "0", "--set", f"train.run_dir=cut_{node}",
                                       "--set", "train.total_steps=1000000")
                cut = self.cut_in_mid_step(launchers, node, f"cut_{node}")
                self.assertEqual(self.wait(launchers), [1, 1], self.logs())
                self.assertLess(time.monotonic() - cut, TIMEOUT_S + ENDING_S, self.logs())
                self.assert_the_other_is_named()
                self.hosts[node].set_link("up")

    def test_go_on_when_the_link_is_there_again(self):
        launchers = self.start("--max-restarts", "10")
        self.cut_in_mid_step(launchers, 1)
        time.sleep(TIMEOUT_S / 2)
        self.assertEqual([launcher.poll() for launcher in launchers], [None, None], self.logs())
        end = time.monotonic() + DEADLINE_S
        while not all("restart 1 of 10" in self.log(node) for node in range(2)):
            self.assertLess(time.monotonic(), end, self.logs())
            time.sleep(0.05)
        self.hosts[1].set_link("up")
        self.assertEqual(self.wait(launchers), [0, 0], self.logs())
        self.assert_the_other_is_named()
        self.assertRegex(self.log(0), r"going on from run/checkpoints/step_\d+")
        self.assertTrue(self.result("run") == self.run_on_loopback())


if __name__ == "__main__":
    support.main()
