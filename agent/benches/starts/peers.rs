//! What the spawner is measured beside: a bare `posix_spawn`, bubblewrap, runc, xargs.

use std::{
    ffi::{CStr, CString},
    fs::{self, File},
    io::{PipeReader, Read as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    slice::from_ref,
    thread,
    time::{Duration, Instant},
};

use nix::{
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn},
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    PAUSE, Sample, Way, now_ns,
    program::{EXIT_CODE, Programs},
};

/// The program by itself.
pub struct PosixSpawn {
    pub name: &'static str,
    /// Before each start.
    pub rest: Duration,
}

impl Way for PosixSpawn {
    fn name(&self) -> &'static str {
        self.name
    }

    fn sample(&mut self, programs: &Programs) -> Sample {
        sample(self.rest, from_ref(&programs.tells_when), from_ref(&programs.exits))
    }
}

/// The program in all of bubblewrap's namespaces.
pub struct Bubblewrap {
    path: CString,
}

impl Bubblewrap {
    /// # Errors
    /// The sentence why it cannot be measured.
    pub fn find(programs: &Programs) -> Result<Self, String> {
        let way = Self { path: find("bwrap")? };
        try_once(&way.command(&programs.exits)).map(|()| way)
    }

    fn command(&self, program: &CStr) -> Vec<CString> {
        let mut command = vec![self.path.clone()];
        let words = "--unshare-all --die-with-parent --ro-bind / / --proc /proc --dev /dev --tmpfs /tmp --";
        command.extend(words.split(' ').map(|word| CString::new(word).unwrap()));
        command.push(program.to_owned());
        command
    }
}

impl Way for Bubblewrap {
    fn name(&self) -> &'static str {
        "bubblewrap"
    }

    fn sample(&mut self, programs: &Programs) -> Sample {
        sample(PAUSE, &self.command(&programs.tells_when), &self.command(&programs.exits))
    }
}

/// The program in a bundle of runc's own default, with a root that holds nothing else.
pub struct Runc {
    path: CString,
    folder: TempDir,
    count: u32,
}

impl Runc {
    /// # Errors
    /// The sentence why it cannot be measured.
    pub fn find(programs: &Programs) -> Result<Self, String> {
        let path = find("runc")?;
        let folder = tempfile::Builder::new().prefix("muster-runc-").tempdir().map_err(|error| error.to_string())?;
        let mut way = Self { path, folder, count: 0 };
        for program in [&programs.tells_when, &programs.exits] {
            way.make_bundle(program).map_err(|error| error.to_string())?;
        }
        try_once(&way.command(&programs.exits)).map(|()| way)
    }

    fn bundle(&self, program: &CStr) -> PathBuf {
        self.folder.path().join(PathBuf::from(program.to_str().unwrap()).file_name().unwrap())
    }

    fn make_bundle(&self, program: &CStr) -> Result<(), Box<dyn std::error::Error>> {
        let bundle = self.bundle(program);
        fs::create_dir_all(bundle.join("rootfs"))?;
        fs::copy(program.to_str()?, bundle.join("rootfs/program"))?;
        let made = Command::new(self.path.to_str()?).arg("spec").arg("--bundle").arg(&bundle).status()?;
        if !made.success() {
            return Err("`runc spec` failed".into());
        }
        let config = bundle.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config)?)?;
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = serde_json::json!(["/program"]);
        fs::write(config, serde_json::to_vec(&spec)?)?;
        Ok(())
    }

    fn command(&mut self, program: &CStr) -> Vec<CString> {
        self.count += 1;
        let name = format!("muster-bench-{}-{}", std::process::id(), self.count);
        let bundle = CString::new(self.bundle(program).into_os_string().into_encoded_bytes()).unwrap();
        vec![self.path.clone(), c"run".into(), c"--bundle".into(), bundle, CString::new(name).unwrap()]
    }
}

impl Way for Runc {
    fn name(&self) -> &'static str {
        "runc"
    }

    fn sample(&mut self, programs: &Programs) -> Sample {
        let [tells_when, exits] = [&programs.tells_when, &programs.exits].map(|program| self.command(program));
        sample(PAUSE, &tells_when, &exits)
    }
}

/// How long `xargs -P OUTSTANDING -n1 PROGRAM` takes for so many.
pub fn xargs(program: &CStr, tasks: usize, outstanding: usize) -> Option<Duration> {
    let numbers: String = (0..tasks).map(|number| format!("{number}\n")).collect();
    let mut list = tempfile::tempfile().ok()?;
    std::io::Write::write_all(&mut list, numbers.as_bytes()).ok()?;
    std::io::Seek::rewind(&mut list).ok()?;
    let mut command = Command::new("xargs");
    command.args([&format!("-P{outstanding}"), "-n1", program.to_str().ok()?]);
    let begun = Instant::now();
    let done = command.stdin(list).stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    // 123: a program of its own exited with something else than 0, as ours do.
    (done.code() == Some(123)).then(|| begun.elapsed())
}

fn find(program: &str) -> Result<CString, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An ordinary user's PATH may lack the folder that runc lies in.
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    let found = folders.map(|folder| folder.join(program)).find(|path| path.is_file());
    let path = found.ok_or_else(|| format!("there is no {program}"))?;
    CString::new(path.into_os_string().into_encoded_bytes()).map_err(|error| error.to_string())
}

/// The words that a peer says when it does not work here.
fn try_once(command: &[CString]) -> Result<(), String> {
    let words: Vec<&str> = command.iter().map(|word| word.to_str().unwrap()).collect();
    let done = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    let done = done.map_err(|error| error.to_string())?;
    match done.status.code() {
        Some(EXIT_CODE) => Ok(()),
        _ => Err(format!("{}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim())),
    }
}

fn sample(rest: Duration, tells_when: &[CString], exits: &[CString]) -> Sample {
    thread::sleep(rest);
    let (mut out, write) = std::io::pipe().unwrap();
    let begun = now_ns();
    let child = spawn(tells_when, write.into());
    expect_exit(child);
    let first = read_when(&mut out) - begun;
    thread::sleep(rest);
    let null = File::options().write(true).open("/dev/null").unwrap();
    let begun = now_ns();
    expect_exit(spawn(exits, null.into()));
    Sample { first, started: None, exit: now_ns() - begun }
}

fn spawn(command: &[CString], stdout: OwnedFd) -> Pid {
    let mut actions = PosixSpawnFileActions::init().unwrap();
    actions.add_dup2(stdout.as_raw_fd(), 1).unwrap();
    let environment: [&CStr; 1] = [c"PATH=/usr/bin:/bin"];
    posix_spawn(command[0].as_c_str(), &actions, &PosixSpawnAttr::init().unwrap(), command, &environment).unwrap()
}

fn expect_exit(child: Pid) {
    assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, EXIT_CODE));
}

fn read_when(out: &mut PipeReader) -> u64 {
    let mut when = [0; 8];
    out.read_exact(&mut when).unwrap();
    u64::from_le_bytes(when)
}
