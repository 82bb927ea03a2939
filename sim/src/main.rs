//! `muster-sim FIRST [COUNT]`: plays seeds and says what occurred; a seed that breaks a promise is named.

use std::process::ExitCode;

use muster_sim::{Setup, run};

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let first = numbers.first().copied().unwrap_or(1);
    let count = numbers.get(1).copied().unwrap_or(1);
    let mut counts = std::collections::BTreeMap::new();
    let (mut starts, mut hours) = (0, 0.0);
    for seed in first..first + count {
        match run(seed, Setup::default()) {
            Ok(report) => {
                starts += report.starts;
                hours += report.elapsed.0 as f64 / 3_600_000.0;
                for (what, times) in report.counts {
                    *counts.entry(what).or_insert(0) += times;
                }
            }
            Err(violation) => {
                eprintln!("seed {seed}: {violation}\nreplay: cargo run --release -p muster-sim -- {seed}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{count} seeds from {first}: every promise held; {starts} starts, {hours:.1} simulated hours");
    for (what, times) in counts {
        println!("{times:>9}  {what}");
    }
    ExitCode::SUCCESS
}
