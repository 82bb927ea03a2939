//! The house rules as tests, over every file that git tracks or would track.
//! A rule reads lines, not syntax: it may be fooled on purpose, not by accident.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A longer function wants a second name for a part of it.
const FUNCTION_LINES_MAX: usize = 100;
const FILE_LINES_MAX: usize = 1_000;

struct File {
    path: String,
    text: String,
    only_tests: bool,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Code that ships: not a test, not the harness, not a module that only tests have.
    fn ships(&self) -> bool {
        self.is_rust() && self.path.contains("src/") && !self.path.contains("/tests/") && !self.only_tests
    }

    /// Lines with their numbers, up to the tests at the end of the file.
    fn shipped_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines: Vec<&str> = self.text.lines().collect();
        let tests = lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].ends_with('{'));
        let end = tests.unwrap_or(lines.len());
        lines.into_iter().enumerate().take(end).map(|(at, line)| (at + 1, line))
    }

    /// Paths of the modules that this file declares below `#[cfg(test)]`.
    fn test_modules(&self) -> Vec<String> {
        let lines: Vec<&str> = self.text.lines().collect();
        let pairs = lines.windows(2).filter(|pair| pair[0].trim() == "#[cfg(test)]");
        let names =
            pairs.filter_map(|pair| pair[1].trim().strip_suffix(';')?.rsplit_once("mod ").map(|(_, name)| name));
        let path = Path::new(&self.path);
        let folder = match path.file_name().and_then(|name| name.to_str()) {
            Some("mod.rs" | "lib.rs" | "main.rs") | None => path.parent().unwrap_or(path).to_owned(),
            Some(_) => path.with_extension(""),
        };
        names.map(|name| format!("{}/{name}.rs", folder.display())).collect()
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

/// All text files of the repository that are not ignored.
fn files() -> Vec<File> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .ok()
        .filter(|done| done.status.success());
    let paths: Vec<String> = match listed {
        Some(done) => String::from_utf8_lossy(&done.stdout).split('\0').map(str::to_owned).collect(),
        // An archive without git: everything but what a build makes.
        None => walk(&root(), Path::new("")),
    };
    let read =
        |path: String| Some(File { text: fs::read_to_string(root().join(&path)).ok()?, path, only_tests: false });
    let mut files: Vec<File> = paths.into_iter().filter(|path| !path.is_empty()).filter_map(read).collect();
    let test_modules: Vec<String> = files.iter().filter(|file| file.is_rust()).flat_map(File::test_modules).collect();
    for file in &mut files {
        file.only_tests = test_modules.contains(&file.path);
    }
    files
}

fn walk(root: &Path, below: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root.join(below)).into_iter().flatten().flatten() {
        let path = below.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if path != Path::new("target") && path != Path::new("results") && path != Path::new(".git") {
                found.extend(walk(root, &path));
            }
        } else if let Some(path) = path.to_str() {
            found.push(path.to_owned());
        }
    }
    found
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

fn report(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}\n  {}", found.join("\n  "));
}

/// Finds each shipped code line (no comment) with one of the words, in files that `chosen` picks.
fn lines_with(words: &[&str], chosen: impl Fn(&File) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for file in files().iter().filter(|file| chosen(file)) {
        for (at, line) in file.shipped_lines().filter(|(_, line)| !is_comment(line)) {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                found.push(format!("{}:{at}: {word}", file.path));
            }
        }
    }
    found
}

#[test]
fn shipped_code_does_not_unwrap() {
    report("use expect(\"why it holds\"), or return an error:", &lines_with(&[".unwrap()"], File::ships));
}

#[test]
fn nothing_is_left_undone() {
    // Spelled so that this file does not find itself.
    let words = [
        concat!("todo", "!("),
        concat!("unimpl", "emented!("),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("TO", "DO"),
    ];
    let mut found = Vec::new();
    for file in
        files().iter().filter(|file| file.is_rust() || file.path.ends_with(".py") || file.path.ends_with(".proto"))
    {
        for (at, line) in file.text.lines().enumerate() {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                found.push(format!("{}:{}: {word}", file.path, at + 1));
            }
        }
    }
    report("finish it, or leave it out:", &found);
}

#[test]
fn the_rules_read_no_clock() {
    let clocks = ["Instant::now", "SystemTime::now", "std::time::", "Utc::now", "Zoned::now", "Timestamp::now"];
    let pure =
        |file: &File| file.is_rust() && (file.path.starts_with("core/src/") || file.path.starts_with("sim/src/"));
    report("`now` is an argument in core/ and sim/:", &lines_with(&clocks, pure));
}

#[test]
fn tests_wait_for_conditions_and_never_sleep() {
    let words = [concat!("thread::", "sleep"), concat!("time::", "sleep"), concat!("time.", "sleep(")];
    let mut found = Vec::new();
    // The places that poll a condition with a deadline, in ticks.
    let pollers = ["tests/harness/wait.rs", "deploy/guest/guest.py", "tests/foreign/check.py", "tests/tidy.rs"];
    for file in files().iter().filter(|file| !pollers.contains(&file.path.as_str())) {
        let in_tests = file.path.contains("tests/") || file.path.starts_with("deploy/");
        let from = if in_tests { 0 } else { file.shipped_lines().count() };
        if !file.is_rust() && !file.path.ends_with(".py") {
            continue;
        }
        for (at, line) in file.text.lines().enumerate().skip(from).filter(|(_, line)| !is_comment(line)) {
            if words.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{}", file.path, at + 1));
            }
        }
    }
    report("wait for a condition with a deadline (harness/wait.rs):", &found);
}

#[test]
fn every_unsafe_block_says_why_it_is_safe() {
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.is_rust() && file.path != "tests/tidy.rs") {
        let lines: Vec<&str> = file.text.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| !is_comment(line)) {
            let code = line.split("//").next().unwrap_or_default();
            let opens = code.contains("unsafe {") || code.contains("unsafe impl");
            if opens && !lines[at.saturating_sub(8)..=at].iter().any(|near| near.contains("SAFETY")) {
                found.push(format!("{}:{}", file.path, at + 1));
            }
        }
    }
    report("an unsafe block without // SAFETY: above it:", &found);
}

#[test]
fn functions_and_files_stay_short() {
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.is_rust()) {
        let lines = file.text.lines().count();
        if lines > FILE_LINES_MAX {
            found.push(format!("{}: {lines} lines; what second thing does it do?", file.path));
        }
        if file.ships() {
            found.extend(long_functions(file));
        }
    }
    report(&format!("functions over {FUNCTION_LINES_MAX} or files over {FILE_LINES_MAX} lines:"), &found);
}

/// A function ends at the first closing brace on its own indentation (rustfmt sees to that).
fn long_functions(file: &File) -> Vec<String> {
    let mut found = Vec::new();
    let mut open: Vec<(usize, usize, String)> = Vec::new();
    for (at, line) in file.shipped_lines() {
        let indentation = line.len() - line.trim_start().len();
        let code = line.trim_start();
        let is_function = ["fn ", "pub fn ", "async fn ", "pub async fn ", "const fn ", "pub const fn ", "unsafe fn "]
            .iter()
            .any(|start| code.starts_with(start))
            || (code.starts_with("pub(") && code.contains(" fn "));
        if is_function && !code.ends_with('}') && !code.ends_with(';') {
            open.push((indentation, at, code.chars().take(60).collect()));
        } else if code.starts_with('}') && open.last().is_some_and(|(start, ..)| *start == indentation) {
            // `}` closes the body; a signature over several lines ends in `) {` or `) -> T {`, not in `}`.
            if let Some((_, start, name)) = open.pop()
                && at - start > FUNCTION_LINES_MAX
            {
                found.push(format!("{}:{start}: {} lines: {name}", file.path, at - start + 1));
            }
        }
    }
    found
}

#[test]
fn no_path_of_a_developers_machine() {
    // Spelled so that this file does not find itself.
    let words = [
        concat!("/wo", "rk/main"),
        concat!("/wo", "rk/shared"),
        concat!("/wo", "rk/."),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
    ];
    let mut found = Vec::new();
    for file in files() {
        for (at, line) in file.text.lines().enumerate() {
            if let Some(word) = words.iter().find(|word| begins_with_path(line, word)) {
                found.push(format!("{}:{}: {word}", file.path, at + 1));
            }
        }
    }
    report("a path that exists on one machine only:", &found);
}

/// The line holds this absolute path, and not as the tail of a longer one (`"$folder"/root/`).
fn begins_with_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].trim_end_matches(['"', '\'']);
        !before.ends_with(|last: char| last.is_alphanumeric() || "/.}$_-".contains(last))
    })
}

#[test]
fn decisions_are_numbered_without_gaps() {
    let mut numbers = BTreeMap::new();
    let mut found = Vec::new();
    for file in files().into_iter().filter(|file| file.path.starts_with("docs/adr/") && file.path.ends_with(".md")) {
        let name = file.path.trim_start_matches("docs/adr/");
        match name.get(..4).and_then(|digits| digits.parse::<usize>().ok()) {
            Some(number) => {
                if let Some(other) = numbers.insert(number, name.to_owned()) {
                    found.push(format!("{name} has the number of {other}"));
                }
                let title = file.text.lines().next().unwrap_or_default();
                if !title.contains(&number.to_string()) {
                    found.push(format!("{name}: its title does not bear its number: {title}"));
                }
            }
            None => found.push(format!("{name} does not begin with four digits")),
        }
    }
    let gaps = numbers.keys().zip(1..).filter(|(number, wanted)| **number != *wanted);
    found.extend(gaps.map(|(number, wanted)| format!("number {number} where {wanted} was due")));
    report("docs/adr:", &found);
}

#[test]
fn documents_name_files_that_exist() {
    let mut found = Vec::new();
    for file in files().into_iter().filter(|file| file.path.ends_with(".md")) {
        let folder = Path::new(&file.path).parent().unwrap_or(Path::new("")).to_owned();
        for (at, line) in file.text.lines().enumerate() {
            for named in links(line).into_iter().chain(paths_in_code(line)) {
                let exists = root().join(&named).exists() || root().join(&folder).join(&named).exists();
                if !exists {
                    found.push(format!("{}:{}: {named}", file.path, at + 1));
                }
            }
        }
    }
    report("a document names a file that does not exist:", &found);
}

/// Targets of `[text](target)` that are files.
fn links(line: &str) -> Vec<String> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let files = targets.map(|target| target.split('#').next().unwrap_or_default());
    files.filter(|target| !target.is_empty() && !target.contains("://")).map(str::to_owned).collect()
}

/// Words in backquotes that begin with a folder of this repository.
fn paths_in_code(line: &str) -> Vec<String> {
    let folders =
        ["core/", "coordinator/", "agent/", "cli/", "proto/", "sim/", "tests/", "deploy/", "systemd/", "docs/"];
    let quoted = line.split('`').skip(1).step_by(2);
    let plain = quoted.filter(|text| !text.contains([' ', '*', '{', '<', '$', '…', ':']) && !text.contains(".."));
    plain.filter(|text| folders.iter().any(|folder| text.starts_with(folder))).map(str::to_owned).collect()
}

#[test]
fn every_fault_names_tests_that_exist() {
    const FAULTS: usize = 28;
    let files = files();
    let table = files.iter().find(|file| file.path == "docs/faults.md").expect("the table of faults");
    let mut found = Vec::new();
    let mut numbers = BTreeMap::new();
    for line in table.text.lines() {
        let first = line.strip_prefix("| ").and_then(|rest| rest.split(" |").next()).filter(|cell| cell.len() == 2);
        let number = first.and_then(|cell| cell.parse::<usize>().ok());
        let named: Vec<(&str, &str)> =
            line.split('`').skip(1).step_by(2).filter_map(|text| text.split_once("::")).collect();
        for (path, name) in &named {
            // Commands name tests by a part of their path.
            if !path.contains('/') {
                continue;
            }
            let defined = [format!("fn {name}("), format!("def {name}(")];
            let file = files.iter().find(|file| file.path == *path);
            if !file.is_some_and(|file| defined.iter().any(|text| file.text.contains(text))) {
                found.push(format!("{path}::{name}"));
            }
        }
        if let Some(number) = number {
            numbers.insert(number, named.len());
        }
    }
    found.extend(
        (1..=FAULTS)
            .filter(|number| numbers.get(number).is_none_or(|tests| *tests == 0))
            .map(|number| format!("fault {number:02} has no test")),
    );
    report("docs/faults.md names a test that does not exist:", &found);
}

#[test]
fn every_file_says_what_it_decides() {
    let short = |file: &File| file.text.lines().count() < 15;
    let found: Vec<String> = files()
        .into_iter()
        .filter(|file| {
            file.is_rust() && !short(file) && !file.text.lines().take(10).any(|line| line.starts_with("//!"))
        })
        .map(|file| file.path)
        .collect();
    report("a Rust file opens with //! and what it decides:", &found);
}

#[test]
fn scripts_are_executable_and_stop_at_errors() {
    use std::os::unix::fs::PermissionsExt;
    let mut found = Vec::new();
    for file in files().into_iter().filter(|file| file.text.starts_with("#!")) {
        if file.is_rust() {
            continue;
        }
        let mode = fs::metadata(root().join(&file.path)).map_or(0, |data| data.permissions().mode());
        // Files that a guest gets are made executable there.
        if mode & 0o111 == 0 && !file.path.starts_with("deploy/guest/files/") {
            found.push(format!("{} is not executable", file.path));
        }
        let first = file.text.lines().next().unwrap_or_default();
        if first.contains("bash") && !file.text.contains("set -euo pipefail") && !file.text.contains("\nexec ") {
            found.push(format!("{} lacks `set -euo pipefail`", file.path));
        }
    }
    report("scripts:", &found);
}
