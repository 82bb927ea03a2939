//! Tables for people, JSON for programs: one list, shown in the form that was
//! asked. Data goes to stdout, talk to stderr.
//!
//! On a terminal times are relative and colour may be used; in a pipe columns
//! are stable and times are RFC 3339. JSON carries its version, snake_case
//! names, RFC 3339 UTC times, and bytes and milliseconds as integers.

use std::io::{self, IsTerminal, Write};

use serde_json::{Map, Value, json};

use crate::{escape, exit::Failure};

/// The version that JSON output carries.
pub const API_VERSION: &str = "muster.v1";

/// The form of a command's answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// With columns that do not fit everywhere.
    Wide,
    /// One document.
    Json,
    /// One object a line.
    Jsonl,
    /// Only names, one a line.
    Name,
}

/// When colour is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How answers are shown.
#[derive(Clone, Debug)]
pub struct Output {
    /// The form.
    pub format: Format,
    /// Only these columns, in this order; empty: all.
    pub columns: Vec<String>,
    /// Without the line of column names.
    pub no_headers: bool,
    /// Say less on stderr.
    pub quiet: bool,
    /// Say more on stderr.
    pub verbose: bool,
    /// Colour on stdout.
    pub color: bool,
    /// stdout is a terminal.
    pub terminal: bool,
    /// Now, for relative times.
    pub now_ms: u64,
}

impl Output {
    /// From the command line and the environment.
    pub fn new(format: Format, columns: Vec<String>, no_headers: bool, color: Color) -> Self {
        let terminal = io::stdout().is_terminal();
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        };
        Self { format, columns, no_headers, quiet: false, verbose: false, color, terminal, now_ms: now_ms() }
    }

    /// A word to the person, unless `-q`.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            // Nobody listens on stderr: nothing to be done about it.
            drop(writeln!(io::stderr(), "{text}"));
        }
    }

    /// How long ago, on a terminal; the time itself in a pipe.
    pub fn time(&self, ms: u64) -> String {
        match (ms, self.terminal) {
            (0, _) => String::from("-"),
            (ms, true) => format!("{} ago", span(self.now_ms.saturating_sub(ms))),
            (ms, false) => rfc3339(ms),
        }
    }

    /// A state's word with its colour.
    pub fn state(&self, word: &str) -> Cell {
        let code = match word {
            "ready" | "succeeded" | "live" | "ok" => 32,
            "running" | "joining" | "placed" => 36,
            "draining" | "cordoned" | "drained" | "waiting" | "cancelling" | "stopping" | "silent" | "cooling"
            | "disk-full" | "warn" | "unknown" => 33,
            "lost" | "failed" | "gone" | "missing" => 31,
            _ => 0,
        };
        Cell { text: escape::text(word), color: code }
    }

    /// Shows a list.
    pub fn list(&self, list: &List) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let shown = match self.format {
            Format::Table | Format::Wide => self.table(&mut out, list),
            Format::Json => {
                let document = json!({ "apiVersion": API_VERSION, "kind": list.kind, "items": list.values });
                writeln!(out, "{document:#}")
            }
            Format::Jsonl => list.values.iter().try_for_each(|value| writeln!(out, "{}", with_version(value, None))),
            Format::Name => list
                .rows
                .iter()
                .try_for_each(|row| writeln!(out, "{}", row.first().map_or("", |cell| cell.text.as_str()))),
        };
        ignore_broken_pipe(shown.and_then(|()| out.flush()))?;
        Ok(())
    }

    /// Shows one thing: JSON as asked, or the given lines of text.
    pub fn one(&self, kind: &str, value: &Value, text: &str, name: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let shown = match self.format {
            Format::Table | Format::Wide => write!(out, "{text}"),
            Format::Json => writeln!(out, "{:#}", with_version(value, Some(kind))),
            Format::Jsonl => writeln!(out, "{}", with_version(value, Some(kind))),
            Format::Name => writeln!(out, "{name}"),
        };
        ignore_broken_pipe(shown.and_then(|()| out.flush()))?;
        Ok(())
    }

    fn table(&self, out: &mut impl Write, list: &List) -> io::Result<()> {
        let chosen = self.chosen_columns(list)?;
        let mut widths: Vec<usize> = chosen.iter().map(|at| list.columns[*at].name.len()).collect();
        for row in &list.rows {
            for (width, at) in widths.iter_mut().zip(&chosen) {
                *width = (*width).max(row[*at].text.chars().count());
            }
        }
        if !self.no_headers {
            let names: Vec<Cell> = chosen.iter().map(|at| Cell::from(list.columns[*at].name)).collect();
            self.row(out, names.iter(), &widths)?;
        }
        for row in &list.rows {
            self.row(out, chosen.iter().map(|at| &row[*at]), &widths)?;
        }
        Ok(())
    }

    fn row<'a>(&self, out: &mut impl Write, cells: impl Iterator<Item = &'a Cell>, widths: &[usize]) -> io::Result<()> {
        let mut line = String::new();
        let mut padding = 0;
        for (cell, width) in cells.zip(widths) {
            line.extend(std::iter::repeat_n(' ', padding));
            if self.color && cell.color != 0 {
                line.push_str(&format!("\x1b[{}m{}\x1b[0m", cell.color, cell.text));
            } else {
                line.push_str(&cell.text);
            }
            padding = width - cell.text.chars().count() + 2;
        }
        writeln!(out, "{}", line.trim_end())
    }

    fn chosen_columns(&self, list: &List) -> io::Result<Vec<usize>> {
        if self.columns.is_empty() {
            let wide = self.format == Format::Wide;
            return Ok((0..list.columns.len()).filter(|at| wide || !list.columns[*at].wide).collect());
        }
        self.columns
            .iter()
            .map(|asked| {
                list.columns.iter().position(|column| column.name.eq_ignore_ascii_case(asked)).ok_or_else(|| {
                    let names: Vec<&str> = list.columns.iter().map(|column| column.name).collect();
                    io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!("there is no column {}; there are {}", escape::text(asked), names.join(", ")),
                    )
                })
            })
            .collect()
    }
}

fn with_version(value: &Value, kind: Option<&str>) -> Value {
    let mut object = Map::new();
    object.insert(String::from("apiVersion"), json!(API_VERSION));
    if let Some(kind) = kind {
        object.insert(String::from("kind"), json!(kind));
    }
    match value {
        Value::Object(fields) => object.extend(fields.clone()),
        other => {
            object.insert(String::from("value"), other.clone());
        }
    }
    Value::Object(object)
}

/// A reader that went away (`| head`) has all that it wants.
fn ignore_broken_pipe(shown: io::Result<()>) -> Result<(), Failure> {
    match shown {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Failure::usage(error.to_string())),
        other => Ok(other?),
    }
}

/// A column of a list.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Its name, in capitals.
    pub name: &'static str,
    /// Shown only with `-o wide`.
    pub wide: bool,
}

/// Columns from names; a leading `+` marks one for `-o wide`.
pub fn columns(names: &[&'static str]) -> Vec<Column> {
    names
        .iter()
        .map(|name| match name.strip_prefix('+') {
            Some(name) => Column { name, wide: true },
            None => Column { name, wide: false },
        })
        .collect()
}

/// One field of a table's row.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    color: u8,
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: escape::text(text.as_ref()), color: 0 }
    }
}

/// What a command lists, for people and for programs.
#[derive(Debug)]
pub struct List {
    kind: &'static str,
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
    values: Vec<Value>,
}

impl List {
    /// An empty list; see [`columns`] for the names.
    pub fn new(kind: &'static str, names: &[&'static str]) -> Self {
        Self { kind, columns: columns(names), rows: Vec::new(), values: Vec::new() }
    }

    /// Adds one thing: a cell for each column, and the value for programs.
    pub fn push(&mut self, row: Vec<Cell>, value: Value) {
        debug_assert_eq!(row.len(), self.columns.len());
        self.rows.push(row);
        self.values.push(value);
    }
}

/// Milliseconds since the Unix epoch by this machine's clock.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// A span as a person says it.
pub fn span(ms: u64) -> String {
    muster_core::time::Millis(ms).to_string()
}

/// RFC 3339, UTC.
pub fn rfc3339(ms: u64) -> String {
    i64::try_from(ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| String::from("-"), |time| format!("{time:.3}"))
}

/// A time for JSON; null when there is none.
pub fn time_value(ms: Option<u64>) -> Value {
    match ms {
        Some(ms) if ms > 0 => json!(rfc3339(ms)),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(format: Format) -> Output {
        let mut output = Output::new(format, Vec::new(), false, Color::Never);
        output.terminal = false;
        output
    }

    fn sample() -> List {
        let mut list = List::new("NodeList", &["NODE", "STATE", "+KERNEL"]);
        list.push(vec!["web-01".into(), "ready".into(), "6.1".into()], json!({"name": "web-01"}));
        list.push(vec!["a\nb".into(), "lost".into(), "".into()], json!({"name": "a\nb"}));
        list
    }

    fn shown(output: &Output, list: &List) -> String {
        let mut bytes = Vec::new();
        output.table(&mut bytes, list).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_table_is_aligned_and_one_line_a_row() {
        assert_eq!(shown(&plain(Format::Table), &sample()), "NODE    STATE\nweb-01  ready\na\\nb    lost\n");
    }

    #[test]
    fn columns_are_chosen_in_the_order_asked() {
        let mut output = plain(Format::Table);
        output.columns = vec!["kernel".into(), "node".into()];
        output.no_headers = true;
        assert_eq!(shown(&output, &sample()), "6.1     web-01\n        a\\nb\n");
        output.columns = vec!["nope".into()];
        assert!(output.table(&mut Vec::new(), &sample()).is_err());
    }

    #[test]
    fn times_are_rfc_3339_in_a_pipe() {
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(plain(Format::Table).time(0), "-");
    }
}
