//! The long run of one target, and the replay of one input.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Parser;
use muster_fuzz::{Ahead, Bounds, Target, targets};

/// Stack of the thread that takes the inputs: what a thread of the coordinator has.
const STACK_BYTES: usize = 2 << 20;

/// Mutated input for one decoder or parser.
#[derive(Debug, Parser)]
#[command(name = "muster-fuzz")]
struct Options {
    /// Which; without it, all are listed.
    target: Option<String>,
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// So many inputs instead.
    #[arg(long, conflicts_with = "seconds")]
    inputs: Option<u64>,
    /// Equal seeds give equal inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Takes this one input.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Writes the corpora anew, as this version encodes.
    #[arg(long)]
    make_corpus: bool,
    /// The process that takes the inputs, with its file of the one under way.
    #[arg(long, hide = true)]
    ahead: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    if options.make_corpus {
        for target in targets::ALL {
            println!("{}: {} inputs", target.name, muster_fuzz::write_seeds(target)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let Some(name) = &options.target else {
        targets::ALL.iter().for_each(|target| println!("{}", target.name));
        return Ok(ExitCode::SUCCESS);
    };
    let Some(target) = targets::ALL.iter().find(|target| target.name == name) else {
        bail!("there is no target {name}; without a name all are listed");
    };
    match (&options.ahead, &options.replay) {
        (Some(ahead), Some(file)) => on_a_small_stack(|| replay(target, file, ahead)),
        (Some(ahead), None) => on_a_small_stack(|| search(target, &options, ahead)),
        (None, _) => supervise(target),
    }
}

/// The inputs are taken by another process, whose death tells something too.
fn supervise(target: &Target) -> anyhow::Result<ExitCode> {
    let ahead = std::env::temp_dir().join(format!("muster-fuzz-{}-{}", target.name, std::process::id()));
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut worker = Command::new(program);
    worker.args(std::env::args_os().skip(1)).arg("--ahead").arg(&ahead);
    let status = worker.status().context("cannot start this program again")?;
    if status.code().is_some() {
        return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let input = Ahead::read(&ahead).context("cannot read the input under way")?;
    fs::remove_file(&ahead).context("cannot remove the file of the input under way")?;
    tell(target, &input, &format!("the process ended: {status}"))
}

fn on_a_small_stack(work: impl FnOnce() -> anyhow::Result<ExitCode> + Send) -> anyhow::Result<ExitCode> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work)?;
        worker.join().unwrap_or_else(|_| bail!("the thread that takes the inputs panicked"))
    })
}

fn search(target: &Target, options: &Options, ahead: &Path) -> anyhow::Result<ExitCode> {
    let corpus = muster_fuzz::load(target)?;
    let mut ahead = Ahead::begin(ahead)?;
    let _until_the_end = muster_fuzz::watch(&ahead);
    muster_fuzz::limit_memory()?;
    let bounds = options.inputs.map_or(Bounds::Time(Duration::from_secs(options.seconds)), Bounds::Inputs);
    let begun = Instant::now();
    let found = muster_fuzz::run(target, &corpus, options.seed, bounds, &mut ahead);
    let seconds = begun.elapsed().as_secs_f64();
    match found {
        Ok(figures) => {
            println!(
                "{}: {} inputs in {seconds:.1} s, {:.0}/s, {:.1} % taken, {} signs, {} kept, slowest {:.1} ms, no failure",
                target.name,
                figures.inputs,
                figures.inputs as f64 / seconds,
                figures.accepted as f64 * 100.0 / figures.inputs as f64,
                figures.signs,
                figures.kept,
                figures.slowest.as_secs_f64() * 1_000.0,
            );
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            let why = format!("{} (input {}, seed {})", failure.why, failure.after, options.seed);
            tell(target, &failure.input, &why)
        }
    }
}

fn replay(target: &Target, file: &Path, ahead: &Path) -> anyhow::Result<ExitCode> {
    let input = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let ahead = Ahead::begin(ahead)?;
    let _until_the_end = muster_fuzz::watch(&ahead);
    muster_fuzz::limit_memory()?;
    match muster_fuzz::play(target, &input) {
        Ok(signs) => {
            println!("{}: no failure; {}", target.name, if signs.accepted { "taken" } else { "refused" });
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            println!("{}: {why}", target.name);
            Ok(ExitCode::FAILURE)
        }
    }
}

fn tell(target: &Target, input: &[u8], why: &str) -> anyhow::Result<ExitCode> {
    let kept = muster_fuzz::keep(target, input)?;
    println!("{}: {why}", target.name);
    println!("{} bytes: {}", input.len(), input.escape_ascii());
    println!("again: cargo run -p muster-fuzz --release -- {} --replay {}", target.name, kept.display());
    Ok(ExitCode::FAILURE)
}
