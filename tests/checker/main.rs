//! `muster-checker FILE...`: judges histories, one JSON line an observation.

use std::{fs, process::ExitCode};

use muster_checker::{History, judge};

fn main() -> ExitCode {
    let mut ok = true;
    let files: Vec<String> = std::env::args().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: muster-checker HISTORY...");
        return ExitCode::from(2);
    }
    for file in files {
        let read = fs::read_to_string(&file).map_err(|error| error.to_string());
        match read.and_then(|text| History::read(&text).map_err(|error| error.to_string())) {
            Ok(history) => {
                let violations = judge(&history);
                for violation in &violations {
                    println!("{file}: {violation}");
                }
                println!("{file}: {}, {} violations", history.summary(), violations.len());
                ok &= violations.is_empty();
            }
            Err(error) => {
                eprintln!("{file}: {error}");
                ok = false;
            }
        }
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
