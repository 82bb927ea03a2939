"""A throw-away QEMU guest: assembles its disk, boots it without KVM, runs commands in it, and never outlives us.

What the guest is for (which checks run in it) is not decided here; see `smoke`.
"""

import datetime
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BEGAN = time.monotonic()
# Emulated, and on a busy machine: a quiet boot takes 10 s.
BOOT_SECONDS = 240
APT_PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}


def say(text):
    """With the time since the check began."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def tick():
    """Between two looks at a condition: the only sleep of the guest's checks."""
    time.sleep(0.2)


class GuestError(Exception):
    """The guest did not do what was asked in time."""


def install_missing(say):
    """Installs QEMU and the image tools by apt, and says so. Returns why not, or None."""
    missing = [package for program, package in APT_PACKAGES.items() if not shutil.which(program)]
    if not missing:
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"missing packages: {' '.join(missing)} (installing them needs root and apt-get)"
    say(f"installing by apt-get: {' '.join(missing)}")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            return f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return None


def skip_unless_possible():
    """Ends the check with a line that says why, where a guest can be neither built nor booted."""
    why_not = install_missing(say) if os.geteuid() == 0 else "building and booting the guest needs root"
    if why_not:
        print(f"SKIP guest: {why_not}")
        sys.exit(0)


def results_folder(check):
    """A new one for a check; from here on a polite end runs the guards, which end QEMU and what belongs to it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    results = ROOT / "results" / f"{check}-{stamp}"
    results.mkdir(parents=True)
    return results


def base_image():
    """The folder with root.tar, vmlinuz and initrd, built if this is the first time."""
    done = subprocess.run([HERE / "build-image"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=1200)
    if done.returncode != 0:
        raise GuestError("the base image could not be built; the lines above say why")
    return Path(done.stdout.strip().splitlines()[-1])


class Guest:
    """One guest. Use as a context manager: QEMU is ended and the disk removed on every way out."""

    def __init__(self, results, customise, extra=(), forward=""):
        """`customise(root)` puts files into the guest's root folder before its disk is made. `extra` are more arguments of
        QEMU, `forward` is what its user network forwards."""
        self.extra, self.forward = list(extra), f",{forward}" if forward else ""
        self.console = Path(results) / "console.log"
        self.work = Path(tempfile.mkdtemp(prefix="muster-guest-"))
        self.customise = customise
        self.process = None
        self.control = None
        self.buffer = b""
        self.boots = 1

    def __enter__(self):
        try:
            self._make_disk()
            self._boot()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        if self.control:
            self.control.close()
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.process.wait()
        shutil.rmtree(self.work, ignore_errors=True)

    def _make_disk(self):
        image = base_image()
        root = self.work / "root"
        root.mkdir()
        subprocess.run(["tar", "-xf", image / "root.tar", "-C", root], check=True)
        self._install(HERE / "files/guest-control", root / "usr/local/sbin/guest-control", 0o755)
        for unit in ("guest-control.service", "guest-network.service"):
            self._install(HERE / "files" / unit, root / "etc/systemd/system" / unit, 0o644)
            enable(root, unit)
        self.customise(root)
        self.disk = self.work / "disk.img"
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", root, self.disk, "1500M"], check=True, capture_output=True)
        shutil.rmtree(root)
        for name in ("vmlinuz", "initrd"):
            shutil.copy(image / name, self.work / name)

    @staticmethod
    def _install(source, target, mode):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        target.chmod(mode)

    def _boot(self):
        path = self.work / "control.sock"
        command = qemu(
            self.work, self.disk, self.console, "systemd.journald.forward_to_console=1", cores=2, tb_mib=512,
            forward=self.forward, extra=["-serial", f"unix:{path},server=on,wait=off", *self.extra])
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=self.work)
        deadline = time.monotonic() + BOOT_SECONDS
        self.control = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self.control.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._check(deadline, "QEMU to open its control socket")
                time.sleep(0.05)
        self._read_until(rb"@@READY\r?\n", deadline, "the guest to boot")

    def boot_again(self):
        """Boots the same disk when the guest has powered itself off; one that has not loses its power first."""
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        (self.work / "control.sock").unlink(missing_ok=True)
        self.buffer = b""
        self.boots += 1
        self.console = self.console.with_name(f"console-{self.boots}.log")
        self._boot()

    def _check(self, deadline, waiting_for):
        if self.process.poll() is not None:
            raise GuestError(f"QEMU ended with {self.process.returncode} while waiting for {waiting_for}")
        if time.monotonic() > deadline:
            raise GuestError(f"timed out waiting for {waiting_for}; see {self.console}")

    def _read_until(self, pattern, deadline, waiting_for):
        while True:
            found = re.search(pattern, self.buffer)
            if found:
                before, self.buffer = self.buffer[: found.start()], self.buffer[found.end():]
                return before, found
            self._check(deadline, waiting_for)
            self.control.settimeout(0.5)
            try:
                data = self.control.recv(65536)
            except TimeoutError:
                continue
            if not data:
                raise GuestError(f"the guest's control port closed while waiting for {waiting_for}")
            self.buffer += data

    def run(self, command, timeout=60):
        """Runs a shell command as root in the guest; returns (exit code, output)."""
        assert "\n" not in command, "one command a line"
        self.control.sendall(command.encode() + b"\n")
        output, end = self._read_until(rb"\r?\n@@END (\d+)\r?\n", time.monotonic() + timeout, f"`{command}`")
        return int(end.group(1)), output.decode(errors="replace").replace("\r\n", "\n").strip()

    def wait_for_exit(self, timeout):
        """Waits until the guest has powered itself off; returns QEMU's exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not power off within {timeout} s") from None


def qemu(image, disk, console, kernel="", *, cores=1, tb_mib=256, forward="", card="", extra=()):
    """The command that boots a disk with the kernel of an image's folder, and ends when the guest powers itself off."""
    # KVM is not asked for: nested or software KVM boots a stock kernel badly or not at all, TCG always does.
    # Each of the first two becomes the next by exec, so the process that we hold is QEMU, and it dies with us.
    return [
        "setpriv", "--pdeathsig", "KILL", "nice", "-n", "5", "qemu-system-x86_64", "-M", "q35",
        "-accel", f"tcg,thread=multi,tb-size={tb_mib}", "-cpu", "Nehalem", "-smp", str(cores), "-m", "1024",
        "-display", "none", "-monitor", "none", "-no-reboot", "-serial", f"file:{console}",
        "-kernel", image / "vmlinuz", "-initrd", image / "initrd",
        "-append", "console=ttyS0 root=/dev/vda rw quiet loglevel=3 systemd.show_status=0 net.ifnames=0 "
        f"panic=-1 mitigations=off tsc=reliable {kernel}".rstrip(),
        "-drive", f"file={disk},format=raw,if=virtio,file.locking=off",
        "-netdev", f"user,id=n0{forward}", "-device", f"virtio-net-pci,netdev=n0{card}", *extra,
    ]


def wait_for_systemd(guest):
    """The control port opens before the message bus does, which systemd-run needs."""
    deadline = time.monotonic() + BOOT_SECONDS
    while guest.run("systemctl is-active dbus.service multi-user.target")[0] != 0:
        if time.monotonic() > deadline:
            raise GuestError("systemd did not come up")
        tick()


def put_program(root, program, name):
    """Into the guest's /usr/bin, without what only a debugger reads: its disk is small."""
    target = root / "usr/bin" / name
    shutil.copy(program, target)
    target.chmod(0o755)
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-debug", target], check=False)


def enable(root, unit):
    """What `systemctl enable` does for a unit of multi-user.target."""
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for folder in ("etc/systemd/system", "usr/lib/systemd/system"):
        if (root / folder / unit).exists():
            (wants / unit).symlink_to(f"/{folder}/{unit}")
            return
    raise GuestError(f"no unit {unit} in the guest")
