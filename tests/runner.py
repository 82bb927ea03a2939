"""Runs every check of the repository: what CI runs and what a person runs before a commit.

Each check reports named results (passed, failed, skipped). A skip that tests/skips.toml does not excuse by a
feature which this host lacks counts as a failure. The last line is `N passed, N failed, N skipped`.
"""

import argparse
import ctypes
import datetime
import fnmatch
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
# The core's promise: no I/O, no clock, no randomness, no async.
IMPURE = {"tokio", "tonic", "tracing", "rand", "getrandom", "sysinfo", "nix", "libc", "rustix", "mio", "prost", "jiff"}
# An ordinary user for the hostile suite: below the uids that anything here gives to jobs, above those of people.
USER_UID = 1_990_000
# What `systemd-analyze security` of systemd 252 may give each unit, from 0 to 10. The spawner's is what its job leaves:
# capabilities to mount and to change uids, namespaces, and no filter that its jobs could not live with.
EXPOSURE_MAX = {"muster-agent": 1.5, "muster-coordinator": 1.6, "muster-spawner": 5.0}
SKIP_LINE = re.compile(r"^\s*SKIP ([\w:./-]+): (.+)$", re.MULTILINE)


class Results:
    """What was found, by name."""

    def __init__(self, excuses):
        self.excuses = excuses
        self.passed, self.failed, self.skipped, self.notes = [], [], [], []

    def pass_(self, name):
        self.passed.append(name)

    def fail(self, name, why):
        self.failed.append((name, why))
        say(f"FAIL {name}: {why}")

    def skip(self, name, why):
        excuse = next((e for e in self.excuses if fnmatch.fnmatch(name, e["test"])), None)
        if excuse and excuse["without"] not in FEATURES:
            raise SystemExit(f"tests/skips.toml: unknown feature {excuse['without']}")
        if excuse and not FEATURES[excuse["without"]]():
            self.skipped.append((name, why))
        else:
            self.fail(name, f"skipped without an excuse in tests/skips.toml: {why}")

    def note(self, text):
        self.notes.append(text)
        say(text)


def say(text):
    print(text, flush=True)


def run(command, timeout, **options):
    """Runs a command with its output shown; returns whether it succeeded."""
    say(f"+ {' '.join(map(str, command))}")
    try:
        # A session of its own, so that at the timeout its children end with it.
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    except FileNotFoundError as error:
        say(str(error))
        return False
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        say(f"timed out after {timeout} s")
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_of(command, timeout=120):
    """A command's standard output; empty if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, errors="replace"
        )
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return ""
    return done.stdout if done.returncode == 0 else ""


# Features of this host, for tests/skips.toml.


def has_cgroup2(controllers):
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2":
            found = set((Path(mount) / "cgroup.controllers").read_text().split())
            return {"cpu", "memory", "pids"} <= found if controllers else True
    return False


def has_user_namespaces():
    return subprocess.run(["unshare", "-U", "true"], stderr=subprocess.DEVNULL).returncode == 0


def landlock_version():
    create_ruleset, version = 444, 1
    return ctypes.CDLL(None).syscall(create_ruleset, None, ctypes.c_size_t(0), version)


def has_pypi():
    return PYTHON_CLIENT_READY


def has_systemd_analyze():
    return bool(shutil.which("systemd-analyze"))


def has_qemu():
    return os.geteuid() == 0 and all(shutil.which(p) for p in ("qemu-system-x86_64", "mmdebstrap", "mke2fs"))


def has_postgres():
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    return any((Path(folder) / "initdb").exists() and (Path(folder) / "pg_ctl").exists() for folder in folders)


PYTHON_CLIENT_READY = False
FEATURES = {
    "root": lambda: os.geteuid() == 0,
    "not-root": lambda: os.geteuid() != 0,
    "cgroup2": lambda: has_cgroup2(False),
    "cgroup2-controllers": lambda: has_cgroup2(True),
    "missing-controllers": lambda: not has_cgroup2(True),
    "user-namespaces": has_user_namespaces,
    "landlock": lambda: landlock_version() >= 2,
    "landlock-scopes": lambda: landlock_version() >= 6,
    "qemu": has_qemu,
    "postgres": has_postgres,
    "cc": lambda: bool(shutil.which("cc")),
    "curl": lambda: bool(shutil.which("curl")),
    "systemd-analyze": has_systemd_analyze,
    "pypi": has_pypi,
}


def read_excuses():
    """tests/skips.toml without a TOML parser, which older Pythons lack: tables of `key = "text"` lines."""
    excuses = []
    for line in (ROOT / "tests/skips.toml").read_text().splitlines():
        if line.strip() == "[[skip]]":
            excuses.append({})
        elif match := re.fullmatch(r'(\w+) = "(.*)"', line.strip()):
            excuses[-1][match[1]] = match[2]
    return excuses


# The checks, in the order in which they run: cheap ones first.


def check_fmt(results, _):
    if run(["cargo", "fmt", "--all", "--check"], 120):
        results.pass_("fmt")
    else:
        results.fail("fmt", "run `cargo fmt --all`")


def check_clippy(results, _):
    if run(["cargo", "clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"], 1800):
        results.pass_("clippy")
    else:
        results.fail("clippy", "the lines above say what")


def check_core(results, _):
    """The core has no crate that could do I/O, read a clock or roll dice, and builds without std."""
    lines = output_of(["cargo", "tree", "--locked", "-p", "muster-core", "-e", "normal", "--prefix", "none"]).splitlines()
    crates = {line.split()[0] for line in lines if line.strip()}
    impure = sorted(crates & IMPURE)
    if not crates or impure:
        results.fail("core-pure", f"muster-core depends on {', '.join(impure)}" if impure else "cargo tree failed")
    else:
        results.pass_("core-pure")

    installed = output_of(["rustup", "target", "list", "--installed"]).split()
    bare = next((t for t in installed if "-none" in t), None)
    if bare:
        ok = run(["cargo", "check", "--locked", "--quiet", "-p", "muster-core", "--target", bare], 300)
        how = f"cargo check --target {bare}"
    else:
        # Without such a target: the attribute itself, and no dependency with its std feature on.
        results.note("note: no target without std is installed; checking the attribute and the features instead")
        attribute = re.search(r"^#!\[no_std\]", (ROOT / "core/src/lib.rs").read_text(), re.MULTILINE)
        features = output_of(["cargo", "tree", "--locked", "-p", "muster-core", "-e", "normal,features", "--prefix", "none"])
        ok = bool(attribute) and 'feature "std"' not in features
        how = "#![no_std] and no dependency with std"
    if ok:
        results.pass_("core-no-std")
    else:
        results.fail("core-no-std", f"{how} does not hold")


def check_deny(results, options):
    if not shutil.which("cargo-deny"):
        if not (options.long and run(["cargo", "install", "--locked", "--quiet", "cargo-deny"], 1800)):
            results.note("note: cargo-deny is not installed; checking deny.toml's bans, licences and sources by cargo metadata")
            results.note("advisories not checked: cargo-deny is not installed")
            check_deny_by_metadata(results)
            return
    if run(["cargo", "deny", "check", "bans", "licenses", "sources"], 300):
        results.pass_("deny")
    else:
        results.fail("deny", "the lines above say which crate")
    done = subprocess.run(
        ["cargo", "deny", "check", "advisories"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    if done.returncode == 0:
        results.pass_("advisories")
    elif "error[vulnerability]" in done.stderr or "error[unmaintained]" in done.stderr or "error[yanked]" in done.stderr:
        say(done.stderr)
        results.fail("advisories", "the lines above say which crate")
    else:
        results.note("advisories not checked: the database could not be fetched")


def check_deny_by_metadata(results):
    """The three lists of deny.toml that need no network, read line by line."""
    text = (ROOT / "deny.toml").read_text()
    banned = set(re.findall(r'crate = "([^"]+)"', text))
    allowed = set(re.findall(r'^    "([^"]+)",$', text, re.MULTILINE))
    packages = json.loads(output_of(["cargo", "metadata", "--format-version", "1", "--locked"]) or '{"packages": []}')["packages"]
    others = [package for package in packages if package["source"]]

    def licensed(expression):
        # SPDX without exceptions inside brackets: OR of ANDs, `/` as the old way to write OR.
        expression = expression.replace("(", "").replace(")", "").replace("/", " OR ")
        if " AND " in expression:
            return all(licensed(part) for part in expression.split(" AND "))
        return any(part.strip() in allowed for part in expression.split(" OR "))

    found = {
        "bans": [package["name"] for package in others if package["name"] in banned],
        "licences": [f"{p['name']} ({p['license']})" for p in others if not licensed(p["license"] or "none")],
        "sources": [p["name"] for p in others if p["source"] != "registry+https://github.com/rust-lang/crates.io-index"],
    }
    for name, wrong in found.items():
        if wrong or not others:
            results.fail(f"deny-{name}", ", ".join(wrong) or "cargo metadata failed")
        else:
            results.pass_(f"deny-{name}")


def check_units(results, _):
    """The shipped units are as closed as they were."""
    if not has_systemd_analyze():
        results.skip("units", "there is no systemd-analyze")
        return
    for name, most in EXPOSURE_MAX.items():
        text = output_of(["systemd-analyze", "security", "--offline=true", "--no-pager", f"systemd/{name}.service"])
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", text)
        if not found:
            results.fail(f"units-{name}", "systemd-analyze security --offline=true gives no figure for it")
        elif float(found[1]) > most:
            results.fail(f"units-{name}", f"exposure {found[1]}, at most {most}: see `systemd-analyze security --offline=true systemd/{name}.service`")
        else:
            say(f"{name}: exposure {found[1]}, at most {most}")
            results.pass_(f"units-{name}")


def check_build(results, _):
    """The binary that all end-to-end checks run."""
    if run(["cargo", "build", "--locked", "--quiet", "--workspace", "--bins"], 2400):
        results.pass_("build")
        os.environ["MUSTER_BIN"] = str(TARGET / "debug/muster")
    else:
        results.fail("build", "the lines above say what")


def install_postgres(results):
    """PostgreSQL by apt, without the server that the package would start: tests make their own, each in its folder."""
    if has_postgres() or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    results.note("note: installing PostgreSQL by apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends"]
    if not run(["apt-get", "-qq", "update"], 600, env=environment):
        return
    if run([*install, "postgresql-common"], 600, env=environment):
        config = Path("/etc/postgresql-common/createcluster.conf")
        text = config.read_text() if config.exists() else ""
        config.write_text(re.sub(r"^#?create_main_cluster.*\n", "", text, flags=re.MULTILINE) + "create_main_cluster = false\n")
        run([*install, "postgresql"], 900, env=environment)


def check_rust(results, options):
    """All Rust tests: unit, scenarios, simulator, tidy, end to end."""
    install_postgres(results)
    if options.long:
        os.environ["MUSTER_LONG"] = "1"
    if shutil.which("cargo-nextest"):
        report = TARGET / "nextest/ci/junit.xml"
        report.unlink(missing_ok=True)
        command = ["cargo", "nextest", "run", "--config-file", "tests/nextest.toml", "--profile", "ci", "--workspace", "--locked"]
        # Two more than cores: those of the group `waits` hardly compute.
        command += ["--test-threads", str((os.cpu_count() or 2) + 2)]
        ok = run(command, 7200 if options.long else 2400)
        read_junit(results, report, ok)
    else:
        results.note("note: cargo-nextest is not installed; using cargo test")
        read_cargo_test(results, options)
    if run(["cargo", "test", "--locked", "--quiet", "--workspace", "--doc"], 1200):
        results.pass_("doc-tests")
    else:
        results.fail("doc-tests", "the lines above say which")
    # A feature of its own: the rules are broken on purpose in this build alone.
    mutations = ["cargo", "test", "--locked", "--quiet", "-p", "muster-sim", "--features", "mutations", "--test", "mutations"]
    if run(mutations, 1200):
        results.pass_("mutations")
    else:
        results.fail("mutations", "a rule that was broken on purpose was not noticed; the lines above say which")


def read_junit(results, report, ok):
    if not report.exists():
        results.fail("rust-tests", "they did not build or run; the lines above say why")
        return
    failures = 0
    for suite in xml.parse(report).getroot().iter("testsuite"):
        for case in suite.iter("testcase"):
            name = f"{suite.get('name')}::{case.get('name')}"
            text = "".join(case.findtext(kind) or "" for kind in ("system-out", "system-err"))
            if case.find("failure") is not None or case.find("error") is not None:
                failures += 1
                results.fail(name, "see its output above")
            else:
                sort_skip(results, name, text)
    if not ok and not failures:
        results.fail("rust-tests", "the runner failed without naming a test; the lines above say why")


def sort_skip(results, name, text):
    skip = SKIP_LINE.search(text)
    if skip:
        results.skip(name, f"{skip[2].strip()}")
    else:
        results.pass_(name)


def read_cargo_test(results, options):
    command = ["cargo", "test", "--locked", "--no-fail-fast", "--workspace", "--lib", "--bins", "--tests", "--", "--show-output"]
    say(f"+ {' '.join(command)}")
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", timeout=7200 if options.long else 2400,
    )
    suite, verdicts, outputs, current = "?", {}, {}, None
    for line in done.stdout.splitlines():
        if match := re.search(r"Running .*\(.*/([\w-]+)-[0-9a-f]{16}\)", line):
            suite = match[1]
        elif match := re.match(r"test (\S+) \.\.\. (ok|FAILED|ignored)", line):
            verdicts[f"{suite}::{match[1]}"] = match[2]
        elif match := re.match(r"---- (\S+) stdout ----", line):
            current = f"{suite}::{match[1]}"
        elif current:
            outputs[current] = outputs.get(current, "") + line + "\n"
    if done.returncode != 0:
        say(done.stdout[-20000:])
    for name, verdict in verdicts.items():
        if verdict == "FAILED":
            results.fail(name, "see its output above")
        elif verdict == "ok":
            sort_skip(results, name, outputs.get(name, ""))
    if done.returncode != 0 and "FAILED" not in verdicts.values():
        results.fail("rust-tests", "they did not build or run; the lines above say why")


def check_python(results, _):
    """A client in another language, from nothing but reflection and the admin's certificate."""
    global PYTHON_CLIENT_READY
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "muster-tests"
    venv = cache / f"venv-{platform.python_version()}"
    python = venv / "bin/python"
    wanted = ["grpcio", "grpcio-reflection"]
    if not python.exists() or not output_of([python, "-c", "import grpc, grpc_reflection; print('ok')"]):
        say(f"installing from PyPI into {venv}: {' '.join(wanted)}")
        cache.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(venv, ignore_errors=True)
        if not run([sys.executable, "-m", "venv", venv], 120) or not run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], 600
        ):
            shutil.rmtree(venv, ignore_errors=True)
            results.skip("python-client", "grpcio could not be installed from PyPI")
            return
    PYTHON_CLIENT_READY = True
    if run([python, "-B", "tests/foreign/check.py"], 180):
        results.pass_("python-client")
    else:
        results.fail("python-client", "the lines above say what")


def build_probe(results):
    """The hostile job, linked statically: it brings no library that a sandbox would have to show."""
    command = ["cargo", "rustc", "--locked", "--quiet", "--profile", "probe", "-p", "muster-probe", "--bin", "muster-probe"]
    if run([*command, "--", "-C", "target-feature=+crt-static"], 600):
        os.environ["MUSTER_PROBE"] = str(TARGET / "probe/muster-probe")
        return True
    results.fail("hostile-probe", "it does not build; the lines above say why")
    return False


def check_hostile(results, _):
    """Every attack of a job that a host survives, each with its control, as root and as an ordinary user; the others are the guest's."""
    if not build_probe(results):
        return
    check_differences(results)
    if os.geteuid() == 0:
        run_hostile(results, "hostile", [TARGET / "debug/muster-hostile"], None)
    else:
        results.skip("hostile", "most fences are only raised, and most controls only succeed, as root")
    if not has_user_namespaces():
        results.skip("hostile-user", "this host gives an ordinary user no user namespace, in which all of its fences are")
    elif os.geteuid() != 0:
        run_hostile(results, "hostile-user", [TARGET / "debug/muster-hostile"], None)
    else:
        # A uid that nobody has, with a group beside its own; it need not reach the folder of the build.
        with tempfile.TemporaryDirectory(prefix="muster-hostile-") as folder:
            os.chmod(folder, 0o755)
            programs = {}
            for path in (TARGET / "debug/muster", TARGET / "debug/muster-hostile", Path(os.environ["MUSTER_PROBE"])):
                programs[path.name] = shutil.copy(path, folder)
            command = ["setpriv", f"--reuid={USER_UID}", f"--regid={USER_UID}", f"--groups={USER_UID + 1}", programs["muster-hostile"]]
            own = {"MUSTER_BIN": programs["muster"], "MUSTER_PROBE": programs["muster-probe"], "HOME": "/tmp"}
            run_hostile(results, "hostile-user", command, {**os.environ, **own})


def check_differences(results):
    """What docs/sandbox.md says of an ordinary user's jobs is what the suite holds them to."""
    table = output_of([TARGET / "debug/muster-hostile", "--differences"]).strip()
    if table and table in (ROOT / "docs/sandbox.md").read_text():
        results.pass_("hostile-differences")
    else:
        results.fail("hostile-differences", "docs/sandbox.md has not the table that `muster-hostile --differences` prints")


def run_hostile(results, prefix, command, environment):
    with tempfile.TemporaryDirectory(prefix="muster-hostile-") as folder:
        os.chmod(folder, 0o777)
        table = Path(folder) / "table.json"
        run([*command, "--json", table], 900, env=environment)
        if not table.exists():
            results.fail(prefix, "it ended without its table; the lines above say why")
            return
        cases = json.loads(table.read_text())["cases"]
    for case in cases:
        name = f"{prefix}-{case['case']}"
        # A difference was compared with what is documented of it.
        if case["status"] in ("pass", "differs"):
            results.pass_(name)
        elif case["status"] == "fail":
            results.fail(name, "; ".join(case["problems"]))
        elif not case["destructive"]:
            results.skip(name, case["reason"])
    left = [case["case"] for case in cases if case["destructive"]]
    say(f"left to the guest: {' '.join(left)}")


def check_chaos(results, options):
    """kill -9 of anything at random moments under load, on both stores; an independent checker judges what was seen."""
    for store, runs in (("embedded", 3), ("postgres", 2)):
        runs *= 10 if options.long else 1
        name = f"chaos-{store}"
        if os.geteuid() != 0:
            results.skip(name, "its jobs write to one file of the host, each as a user of its own, which only root's spawner gives them")
            continue
        command = [TARGET / "debug/muster-chaos", "--store", store, "--seed", "2", "--runs", str(runs), "--seconds", "4"]
        say(f"+ {' '.join(map(str, command))}")
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=200 * runs
        )
        say(done.stdout.rstrip())
        skipped = SKIP_LINE.search(done.stdout)
        if skipped:
            results.skip(name, skipped[2])
        elif done.returncode == 0 and f"{store}: {runs} passed, 0 failed" in done.stdout:
            results.pass_(name)
        else:
            results.fail(name, "the lines above say which seed, where its history is, and how to run it again")


def check_guest(results, _):
    """A real host with systemd and cgroup v2, in a throw-away QEMU guest: the shipped units, power cuts, a network that
    delays and loses, then the hostile suite."""
    run_in_guest(results, "smoke", "guest")
    if has_qemu():
        run_in_guest(results, "power-cut", "guest-power")
        run_in_guest(results, "bad-network", "guest-network")
    if has_qemu() and build_probe(results):
        run_in_guest(results, "hostile", "guest-hostile")


def run_in_guest(results, script, prefix):
    done = subprocess.run(
        [sys.executable, "-B", f"deploy/guest/{script}"], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=1800
    )
    say(done.stdout.rstrip())
    found = re.findall(r"^(PASS|FAIL|SKIP) ([\w-]+)(?:: (.*))?$", done.stdout, re.MULTILINE)
    for verdict, name, why in found:
        if verdict == "PASS":
            results.pass_(f"{prefix}-{name}")
        elif verdict == "FAIL":
            results.fail(f"{prefix}-{name}", why or "see the lines above")
        else:
            results.skip("guest" if name == "guest" else f"{prefix}-{name}", why)
    if done.returncode not in (0, 1) or not found:
        results.fail(prefix, f"ended with {done.returncode} and no verdict")


CHECKS = {
    "fmt": check_fmt,
    "core": check_core,
    "deny": check_deny,
    "units": check_units,
    "build": check_build,
    "rust": check_rust,
    "python": check_python,
    "hostile": check_hostile,
    "chaos": check_chaos,
    "guest": check_guest,
    "clippy": check_clippy,
}


def close(results, began, options):
    """Names of what failed or was skipped, then the one line that says it all."""
    lines = [f"skipped {name}: {why}" for name, why in results.skipped]
    lines += [f"failed {name}: {why}" for name, why in results.failed]
    lines += [f"not done: {note}" for note in results.notes if "not checked" in note]
    counts = f"{len(results.passed)} passed, {len(results.failed)} failed, {len(results.skipped)} skipped"
    minutes = (time.monotonic() - began) / 60
    if options.long:
        commit = output_of(["git", "rev-parse", "--short=12", "HEAD"]).strip() or "no-commit"
        dirty = "-modified" if output_of(["git", "status", "--porcelain"]).strip() else ""
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        file = ROOT / "results" / f"{stamp}-{commit}{dirty}.txt"
        file.parent.mkdir(exist_ok=True)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, {minutes:.1f} minutes"
        body = [f"commit {commit}{dirty}", machine, *[f"passed {name}" for name in results.passed], *lines, counts]
        file.write_text("\n".join(body) + "\n")
        lines.append(f"result file: {file.relative_to(ROOT)}")
    say("")
    for line in lines:
        say(line)
    say(f"({minutes:.1f} minutes)")
    say(counts)


def main():
    parser = argparse.ArgumentParser(prog="tests/run", description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="the longer tier: more rounds and seeds, and a result file")
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="only this check (may be repeated)")
    options = parser.parse_args()
    began = time.monotonic()
    results = Results(read_excuses())
    chosen = options.only or list(CHECKS)
    if {"rust", "python", "hostile", "chaos", "guest"} & set(chosen) and "build" not in chosen:
        chosen = ["build", *chosen]
    for name, check in CHECKS.items():
        if name not in chosen:
            continue
        if name in ("rust", "python", "hostile", "chaos", "guest") and any(failed == "build" for failed, _ in results.failed):
            results.fail(name, "not run: the build failed")
            continue
        say(f"\n== {name}")
        since = time.monotonic()
        try:
            check(results, options)
        except subprocess.TimeoutExpired as error:
            results.fail(name, f"timed out after {error.timeout:.0f} s")
        say(f"== {name}: {time.monotonic() - since:.0f} s")
    close(results, began, options)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
