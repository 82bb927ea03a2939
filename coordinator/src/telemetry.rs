//! Logs and metrics: how they are set up, and all metric names.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use muster_core::{end::End, fleet::Fleet};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Logs go to stderr; `MUSTER_LOG` filters them.
pub fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_env("MUSTER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second start in one process (tests) keeps the first.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// Counters of the process. What can be read from the fleet is not counted twice.
#[derive(Debug, Default)]
pub struct Metrics {
    commits: AtomicU64,
    rows: AtomicU64,
    batches: [AtomicU64; BUCKETS.len()],
    ended: Mutex<BTreeMap<String, u64>>,
}

const BUCKETS: [u64; 6] = [1, 4, 16, 64, 256, 1_024];

impl Metrics {
    /// A batch of so many rows was committed.
    pub fn committed(&self, rows: usize) {
        let rows = rows as u64;
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows, Ordering::Relaxed);
        for (bucket, count) in BUCKETS.iter().zip(&self.batches) {
            if rows <= *bucket {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// An attempt ended.
    pub fn ended(&self, end: &End) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner).entry(end.summary()).or_default() += 1;
    }

    /// All of it as Prometheus reads it.
    #[must_use]
    pub fn text(&self, gauges: &Gauges) -> String {
        let mut text = String::new();
        let mut line = |line: std::fmt::Arguments<'_>| {
            text.write_fmt(line).and_then(|()| text.write_char('\n')).expect("a String takes all that is written");
        };
        line(format_args!("# TYPE muster_tasks_waiting gauge\nmuster_tasks_waiting {}", gauges.waiting));
        line(format_args!("# TYPE muster_nodes gauge\nmuster_nodes {}", gauges.nodes.len()));
        line(format_args!("# TYPE muster_nodes_ready gauge\nmuster_nodes_ready {}", gauges.ready));
        line(format_args!("# TYPE muster_node_attempts gauge"));
        for node in &gauges.nodes {
            let name = escape(&node.name);
            line(format_args!("muster_node_attempts{{node=\"{name}\",phase=\"running\"}} {}", node.running));
            line(format_args!("muster_node_attempts{{node=\"{name}\",phase=\"queued\"}} {}", node.queued));
        }
        line(format_args!("# TYPE muster_attempts_ended_total counter"));
        for (end, count) in self.ended.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            line(format_args!("muster_attempts_ended_total{{end=\"{}\"}} {count}", escape(end)));
        }
        line(format_args!("# TYPE muster_commit_rows histogram"));
        for (bucket, count) in BUCKETS.iter().zip(&self.batches) {
            line(format_args!("muster_commit_rows_bucket{{le=\"{bucket}\"}} {}", count.load(Ordering::Relaxed)));
        }
        let commits = self.commits.load(Ordering::Relaxed);
        line(format_args!("muster_commit_rows_bucket{{le=\"+Inf\"}} {commits}"));
        line(format_args!("muster_commit_rows_sum {}", self.rows.load(Ordering::Relaxed)));
        line(format_args!("muster_commit_rows_count {commits}"));
        text
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// What is read from the fleet.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    waiting: u64,
    ready: u32,
    nodes: Vec<NodeGauge>,
}

#[derive(Clone, Debug)]
struct NodeGauge {
    name: String,
    running: u32,
    queued: u32,
}

impl Gauges {
    /// As it is now.
    #[must_use]
    pub fn read(fleet: &Fleet) -> Self {
        let nodes = fleet.nodes().filter_map(|(id, record)| {
            let view = fleet.node_view(id)?;
            Some(NodeGauge { name: record.name.clone(), running: view.running, queued: view.queued })
        });
        Self { waiting: fleet.tasks_waiting(), ready: fleet.node_counts().1, nodes: nodes.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_in_every_bucket_that_holds_it() {
        let metrics = Metrics::default();
        metrics.committed(5);
        metrics.ended(&End::Exited(3));
        let text = metrics.text(&Gauges::default());
        assert!(text.contains("muster_commit_rows_bucket{le=\"4\"} 0\n"), "{text}");
        assert!(text.contains("muster_commit_rows_bucket{le=\"16\"} 1\n"), "{text}");
        assert!(text.contains("muster_attempts_ended_total{end=\"exited(3)\"} 1\n"), "{text}");
    }
}
