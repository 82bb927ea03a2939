//! Which format a trace is of, by its first lines.

use super::{Format, Source, TraceError};

pub(super) fn detect(source: &Source<'_>) -> Result<Format, TraceError> {
    let first = source.text.lines().map(str::trim).find(|line| !line.is_empty());
    let first = first.ok_or_else(|| source.wrong_as_a_whole("it is empty"))?;
    let columns: Vec<String> = first.split(',').map(|column| column.trim().to_ascii_lowercase()).collect();
    let starts = |names: &[&str]| columns.len() >= names.len() && names.iter().zip(&columns).all(|(a, b)| a == b);
    if first.starts_with(';') || first.split_whitespace().count() == super::swf::FIELDS {
        return Ok(Format::Swf);
    }
    if starts(&["hashowner", "hashapp", "hashfunction", "trigger"]) {
        return Ok(Format::Invocations);
    }
    if starts(&["timestamp", "contexttokens", "generatedtokens"]) {
        return Ok(Format::Arrivals);
    }
    if starts(&["timestamp", "value"]) {
        return Ok(Format::Counts);
    }
    let shown: String = first.chars().take(60).collect();
    Err(source.wrong(
        1,
        format!(
            "no known format begins with `{shown}`; name it by --trace-format swf, invocations, arrivals or counts"
        ),
    ))
}
