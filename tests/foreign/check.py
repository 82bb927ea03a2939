"""Starts a coordinator and one node and steers them with client.py: with the admin's certificate, and without."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent))
import client  # noqa: E402

MUSTER = os.environ.get("MUSTER_BIN", str(Path(__file__).resolve().parents[2] / "target/debug/muster"))
STRICT = (
    "ns.pid ns.mount ns.ipc ns.uts ns.net root.readonly no_new_privs caps.none uid.own "
    "limits.cpu limits.memory limits.pids limits.disk kill.cgroup"
).split()


class Parts:
    """Processes that end with us: each watches a pipe whose other end only we hold."""

    def __init__(self, folder):
        self.folder = folder
        self.running = []

    def start(self, name, *arguments):
        read, write = os.pipe()
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [MUSTER, *map(str, arguments), "--parent-fd", str(read)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[read],
            )
        os.close(read)
        self.running.append((name, process, write))

    def logs(self):
        for name, _, _ in self.running:
            print(f"---- {name}\n{(self.folder / f'{name}.log').read_text(errors='replace')[-3000:]}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.logs()
        for _, _, write in reversed(self.running):
            os.close(write)
        for _, process, _ in reversed(self.running):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def eventually(what, probe, seconds=60):
    """Asks until there is an answer, with a deadline."""
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds} s in vain: {what}")
        time.sleep(0.05)


def check(folder, parts):
    data, port_file = folder / "coordinator", folder / "port"
    parts.start("coordinator", "coordinator", "serve", "--init", "--data", data, "--listen", "127.0.0.1:0", "--port-file", port_file)
    address = eventually("the coordinator is ready", lambda: port_file.exists() and port_file.read_text().strip())
    address = address if ":" in address else f"127.0.0.1:{address}"
    token = subprocess.run(
        [MUSTER, "--server", f"unix:{data}/operator.sock", "token", "create"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True, timeout=60,
    ).stdout.strip()
    spawner = ["spawner", "--socket", folder / "spawner.sock", "--state", folder / "spawner", "--node-id", f"python-{os.getpid()}"]
    if os.geteuid() == 0:
        # Away from the ranges of the Rust tests.
        spawner += ["--uids", "900000-900063"]
    parts.start("spawner", *spawner)
    parts.start(
        "agent", "agent", "run", "--state", folder / "agent", "--coordinator", address, "--spawner", folder / "spawner.sock",
        "--name", "n1", "--cpu", "2", "--memory", "2G", "--token", token, "--slice",
    )

    with client.connect(address, data / "pki") as channel:
        fleet = client.Fleet(channel)
        node = eventually("the node is ready", lambda: [n for n in fleet.nodes() if n.state == "ready"])[0]
        print(f"python: node {node.name} is {node.state}, {node.capacity.cpu_milli} milli-cores")
        job = fleet.submit(["/bin/echo", "hello from python"], [fence for fence in STRICT if fence not in node.fences])
        end = fleet.wait(job)
        assert end.summary.state == "succeeded", end
        assert fleet.output(job) == b"hello from python\n", fleet.output(job)
        print(f"python: job {job} {end.summary.state}, its output read back")
        described = fleet

    with client.connect(address, data / "pki", with_certificate=False) as channel:
        described.channel = channel
        for name, attempt in (("Nodes.List", described.nodes), ("Jobs.Submit", lambda: described.submit(["/bin/true"]))):
            try:
                attempt()
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
                print(f"python: {name} without a certificate: {error.code().name}: {error.details()}")
            else:
                raise SystemExit(f"{name} was answered without a certificate")


def main():
    with tempfile.TemporaryDirectory(prefix="muster-python-") as folder, Parts(Path(folder)) as parts:
        check(Path(folder), parts)
    print("python: ok")


if __name__ == "__main__":
    main()
