//! One request a line, with the tokens that it brought and those that were made for it: `TIMESTAMP,ContextTokens,
//! GeneratedTokens`, as the Azure LLM inference traces have it (Patel and others, "Splitwise", ISCA 2024). How long a
//! request runs is not in the trace: it is so much for each token.

use muster_core::time::{Millis, Timestamp};

use super::{
    Assumptions, Source, TraceError,
    fields::{amount, column, time},
};
use crate::replay::workload::{Arrival, Workload};

pub(super) fn read(
    source: &Source<'_>,
    assumptions: &Assumptions,
) -> Result<(Workload, Option<Timestamp>), TraceError> {
    let mut requests = Vec::new();
    for (at, line) in source.text.lines().enumerate().skip(1).map(|(at, line)| (at + 1, line.trim())) {
        if line.is_empty() {
            continue;
        }
        let columns: Vec<&str> = line.split(',').collect();
        let when = time(source, at, column(source, at, &columns, 0, "TIMESTAMP")?)?;
        let input = amount(source, at, column(source, at, &columns, 1, "ContextTokens")?, "ContextTokens")?;
        let output = amount(source, at, column(source, at, &columns, 2, "GeneratedTokens")?, "GeneratedTokens")?;
        let micros = input * assumptions.input_token_us as f64 + output * assumptions.output_token_us as f64;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
        let run = Millis((micros / 1_000.0) as u64);
        requests.push((when, run));
    }
    let first = requests.iter().map(|(when, _)| *when).min().unwrap_or(0);
    let mut scale = super::counts::Scale::new(assumptions.scale_permille);
    let arrivals = requests.into_iter().map(|(when, run)| Arrival {
        at: Millis(when - first),
        run,
        cpu_milli: assumptions.cpu_milli,
        memory_mib: assumptions.memory_mib,
        tasks: scale.of(1),
    });
    Ok((Workload::new(arrivals.collect()), Some(Timestamp(first))))
}
