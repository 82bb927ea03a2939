//! What came of the cases: a table for people, JSON for programs.

use serde_json::{Value, json};

use crate::case::Case;

/// How a case went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Passed,
    Failed,
    /// As documented for a host that lacks something: what.
    Differs(String),
    Skipped(String),
}

/// One row of the table.
#[derive(Debug)]
pub struct Report {
    pub id: &'static str,
    pub title: &'static str,
    pub verdict: String,
    pub tries: usize,
    pub refused: usize,
    pub control: String,
    /// Refusals that the control did not show to be the sandbox's.
    pub unproved: Vec<String>,
    pub problems: Vec<String>,
    pub status: Status,
    pub ms: u64,
    pub destructive: bool,
}

impl Report {
    /// Nothing is known of it yet.
    pub fn of(case: &Case) -> Self {
        Self {
            id: case.id,
            title: case.title,
            verdict: "-".to_owned(),
            tries: 0,
            refused: 0,
            control: "-".to_owned(),
            unproved: Vec::new(),
            problems: Vec::new(),
            status: Status::Passed,
            ms: 0,
            destructive: case.destructive,
        }
    }

    /// No more problems come.
    pub fn close(&mut self) {
        if !self.problems.is_empty() {
            self.status = Status::Failed;
        }
    }

    /// As a line of the table, and a line for each problem and remark.
    pub fn print(&self) {
        let status = match &self.status {
            Status::Passed => "PASS".to_owned(),
            Status::Failed => "FAIL".to_owned(),
            Status::Differs(what) => format!("differs: {what}"),
            Status::Skipped(why) => format!("SKIP: {why}"),
        };
        let refused = format!("{}/{}", self.refused, self.tries);
        println!(
            "{:4} {:52} {:14} {refused:>7} {:>6} ms  {:28} {status}",
            self.id, self.title, self.verdict, self.ms, self.control
        );
        for problem in &self.problems {
            println!("       {problem}");
        }
        if !self.unproved.is_empty() && self.status != Status::Failed {
            println!("       (not shown by the control on this host: {})", self.unproved.join(", "));
        }
    }

    fn json(&self) -> Value {
        let (status, why) = match &self.status {
            Status::Passed => ("pass", ""),
            Status::Failed => ("fail", ""),
            Status::Differs(what) => ("differs", what.as_str()),
            Status::Skipped(why) => ("skip", why.as_str()),
        };
        json!({
            "case": self.id, "title": self.title, "verdict": self.verdict, "tries": self.tries, "refused": self.refused,
            "control": self.control, "unproved": self.unproved, "problems": self.problems, "status": status,
            "reason": why, "ms": self.ms, "destructive": self.destructive,
        })
    }
}

/// The head of the table.
pub fn print_head() {
    println!(
        "{:4} {:52} {:14} {:>7} {:>9}  {:28} result",
        "case", "what the job does", "verdict", "refused", "time", "control"
    );
}

/// All cases as JSON.
pub fn json_of(reports: &[Report]) -> Value {
    json!({ "cases": reports.iter().map(Report::json).collect::<Vec<_>>() })
}
