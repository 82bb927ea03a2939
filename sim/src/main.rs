//! `muster-sim FIRST [COUNT]`: plays seeds and says what occurred; a seed that breaks a promise is named.

use std::process::ExitCode;

use muster_sim::{Setup, play_all, shrink, trace};

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let first = numbers.first().copied().unwrap_or(1);
    let count = numbers.get(1).copied().unwrap_or(1);
    let threads = numbers.get(2).copied().unwrap_or(1) as usize;
    let summary = play_all(first, count, threads, Setup::default(), &|_| {});
    if let Some(failure) = &summary.failure {
        eprintln!("seed {}: {}", failure.seed, failure.violation);
        let small = if std::env::var_os("SHRINK").is_some() { shrink(failure) } else { failure.clone() };
        let lines = std::env::var("LINES").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
        let (lines, _, _) = trace(small.seed, small.setup, lines);
        for line in lines {
            eprintln!("{line}");
        }
        eprintln!("{}\n{:?} {}", small.violation, small.setup, small.setup.faults);
        return ExitCode::FAILURE;
    }
    println!("{count} seeds from {first}: every promise held; {} starts, {} steps", summary.starts, summary.steps);
    for (what, times) in summary.coverage.lines() {
        println!("{times:>9}  {what}");
    }
    ExitCode::SUCCESS
}
