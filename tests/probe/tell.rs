//! One line of JSON for each try: its name, whether it worked, the errno's name
//! if it did not, and what was seen.

use std::io::Write as _;

/// What one try came to: what was seen, or errno(3).
pub type Outcome<T> = Result<T, i32>;

/// Tells a try whose value does not matter.
pub fn tell<T>(name: &str, outcome: Outcome<T>) {
    line(name, outcome.map(|_| String::new()));
}

/// Tells a try with what was seen.
pub fn tell_value(name: &str, outcome: Outcome<impl ToString>) {
    line(name, outcome.map(|value| value.to_string()));
}

/// The errno of an I/O error; 0 if it has none.
pub fn number(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// As an outcome.
pub fn of<T>(result: std::io::Result<T>) -> Outcome<T> {
    result.map_err(|error| number(&error))
}

fn line(name: &str, outcome: Outcome<String>) {
    let text = match outcome {
        Ok(value) => format!("{{\"try\":{},\"ok\":true,\"value\":{}}}\n", quoted(name), quoted(&value)),
        Err(errno) => format!("{{\"try\":{},\"ok\":false,\"errno\":{}}}\n", quoted(name), quoted(&errno_name(errno))),
    };
    // Without a reader there is nobody to tell.
    let mut out = std::io::stdout().lock();
    let _unread = out.write_all(text.as_bytes());
    let _unread = out.flush();
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(letter))),
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}

/// Its name in errno(3).
pub fn errno_name(errno: i32) -> String {
    const NAMES: [(i32, &str); 47] = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::E2BIG, "E2BIG"),
        (libc::ENOEXEC, "ENOEXEC"),
        (libc::EBADF, "EBADF"),
        (libc::ECHILD, "ECHILD"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::EXDEV, "EXDEV"),
        (libc::ENODEV, "ENODEV"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::EISDIR, "EISDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENFILE, "ENFILE"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::ETXTBSY, "ETXTBSY"),
        (libc::EFBIG, "EFBIG"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EROFS, "EROFS"),
        (libc::EMLINK, "EMLINK"),
        (libc::EPIPE, "EPIPE"),
        (libc::EDEADLK, "EDEADLK"),
        (libc::ENAMETOOLONG, "ENAMETOOLONG"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ELOOP, "ELOOP"),
        (libc::EUSERS, "EUSERS"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
        (libc::ESOCKTNOSUPPORT, "ESOCKTNOSUPPORT"),
        (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
        (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (libc::ENETUNREACH, "ENETUNREACH"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
        (libc::EHOSTUNREACH, "EHOSTUNREACH"),
        (libc::ETIMEDOUT, "ETIMEDOUT"),
        (libc::EDQUOT, "EDQUOT"),
        (libc::ENOKEY, "ENOKEY"),
        (libc::EUCLEAN, "EUCLEAN"),
    ];
    NAMES.iter().find(|(number, _)| *number == errno).map_or_else(|| format!("E{errno}"), |(_, name)| (*name).into())
}
