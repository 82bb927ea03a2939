//! The programs that are started: one page, no libc, built on the spot and put where every sandbox shows them.

use std::{ffi::CString, path::Path, process::Command};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// What they exit with: no code that a failed start could give.
pub const EXIT_CODE: i32 = 7;
/// A folder of the host that every sandbox shows; it is covered in this benchmark's own mount namespace only.
const FOLDER: &str = "/opt";
/// Without headers, so that nothing but a compiler is needed. The numbers are those of x86-64.
const SOURCE: &str = r#"
static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
void _start(void) {
#ifdef TELLS_WHEN
    long now[2];
    call(228 /* clock_gettime */, 1 /* CLOCK_MONOTONIC */, (long)now, 0);
    long nanoseconds = now[0] * 1000000000L + now[1];
    call(1 /* write */, 1, (long)&nanoseconds, 8);
#endif
    call(60 /* exit */, EXIT_CODE, 0, 0);
    for (;;) {}
}
"#;

/// Paths of the two programs.
pub struct Programs {
    /// Writes CLOCK_MONOTONIC in nanoseconds, 8 bytes, then exits.
    pub tells_when: CString,
    /// Exits.
    pub exits: CString,
}

impl Programs {
    /// Builds both. Must be called before there is a second thread.
    ///
    /// # Errors
    /// The sentence why that cannot be done here.
    pub fn build() -> Result<Self, String> {
        if !cfg!(target_arch = "x86_64") {
            return Err("the programs that are started are written for x86-64".into());
        }
        if !nix::unistd::geteuid().is_root() {
            return Err("it needs root, for a mount namespace and for jobs with a uid of their own".into());
        }
        let why = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
        unshare(CloneFlags::CLONE_NEWNS).map_err(why("unshare"))?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(why("make / private"))?;
        mount(Some("tmpfs"), FOLDER, Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=755"))
            .map_err(why("mount a tmpfs"))?;
        Ok(Self { tells_when: compile("tells-when", &["-DTELLS_WHEN"])?, exits: compile("exits", &[])? })
    }
}

fn compile(name: &str, flags: &[&str]) -> Result<CString, String> {
    let source = Path::new(FOLDER).join(format!("{name}.c"));
    let program = Path::new(FOLDER).join(name);
    std::fs::write(&source, SOURCE).map_err(|error| error.to_string())?;
    let done = Command::new("gcc")
        .args(["-nostdlib", "-static", "-Os", "-fno-stack-protector", "-fcf-protection=none"])
        .args(["-fno-asynchronous-unwind-tables", "-Wl,-z,noseparate-code", "-Wl,--build-id=none", "-s"])
        .arg(format!("-DEXIT_CODE={EXIT_CODE}"))
        .args(flags)
        .arg("-o")
        .args([&program, &source])
        .output()
        .map_err(|error| format!("gcc: {error}"))?;
    if !done.status.success() {
        return Err(format!("gcc: {}", String::from_utf8_lossy(&done.stderr)));
    }
    CString::new(program.into_os_string().into_encoded_bytes()).map_err(|error| error.to_string())
}
