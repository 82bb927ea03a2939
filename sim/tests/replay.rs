//! A small trace through the whole replay, with exact figures: what a change of a rule does to real work reads as a
//! text diff. `RECORD=1 cargo test -p muster-sim --test replay` writes them anew.

use std::{fmt::Write as _, fs, path::Path, sync::Mutex};

use muster_core::{
    ids::PoolName,
    policy::{HostTemplate, PlacementOrder, PoolPolicy, Preset, ProviderKind},
    time::{Millis, Timestamp},
};
use muster_sim::replay::{
    Assumptions, Bounds, Conditions, Files, Format, RIVALS, Report, Shape, Source, WHOLE, Workload, compare, html,
    read, svg, synthetic,
};

/// A Monday.
const BEGINS: Timestamp = Timestamp(1_704_067_200_000);

fn policy() -> PoolPolicy {
    let host =
        HostTemplate { cpu_milli: 4_000, memory_bytes: 16 << 30, disk_bytes: 40 << 30, labels: Default::default() };
    PoolPolicy {
        preset: Preset::Demand,
        placement: PlacementOrder::BinPack,
        ..PoolPolicy::fixed(PoolName("replay".into()), ProviderKind::Local, 0, 1_000, host)
    }
}

fn conditions() -> Conditions {
    Conditions {
        boot: Millis::from_secs(45),
        boot_spread_permille: 300,
        stop: Millis::from_secs(5),
        seed: 1,
        split_permille: 500,
        begins: BEGINS,
    }
}

fn llm() -> Workload {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/traces/azure_llm_2023_code.csv");
    let text = fs::read_to_string(path).expect("the trace");
    let files = Files { trace: Source { name: "llm", text: &text }, durations: None, memory: None };
    let trace = read(&files, None, &Assumptions::default()).expect("a trace");
    assert_eq!(trace.format, Format::Arrivals);
    trace.workload
}

fn played(workload: &Workload, rivals: &[&str]) -> Report {
    let rivals: Vec<String> = rivals.iter().map(|name| (*name).to_owned()).collect();
    compare(workload, &policy(), &rivals, conditions(), 2, &|_, _| {}).expect("every rule serves every task")
}

fn figures(report: &Report) -> String {
    let mut text = String::new();
    for (part, name) in [(0, "first"), (1, "second"), (2, "whole")] {
        for row in &report.rows {
            let figures = &row.figures[part];
            writeln!(
                text,
                "{name:<6} {:<17} billed {:>9} ms, idle {:>4}, waits {:>6} {:>6} {:>6}, changes {:>3}, hosts {:>3}, peak {:>3}",
                row.name,
                figures.billed_ms,
                figures.idle_permille,
                figures.waits.p50.0,
                figures.waits.p99.0,
                figures.waits.max.0,
                figures.changes,
                figures.ordered,
                figures.peak_hosts,
            )
            .expect("a string takes all");
        }
    }
    text
}

#[test]
fn a_recorded_hour_comes_to_the_same_figures() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/replay_llm.txt");
    let now = figures(&played(&llm(), &RIVALS));
    if std::env::var_os("RECORD").is_some() {
        fs::write(&path, &now).expect("the figures are writable");
    }
    let recorded = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(now, recorded, "RECORD=1 writes them anew");
}

#[test]
fn every_task_is_counted_once_whoever_decides() {
    let workload = synthetic(Shape::Batches, 3, 1_000, 256);
    let report = played(&workload, &RIVALS);
    for row in &report.rows {
        let [first, second, whole] = &row.figures;
        assert_eq!(whole.waits.tasks, workload.tasks(), "{}", row.name);
        assert_eq!(first.waits.tasks + second.waits.tasks, whole.waits.tasks, "{}", row.name);
        assert_eq!(first.billed_ms + second.billed_ms, whole.billed_ms, "{}", row.name);
        assert_eq!(whole.lost_ms, 0, "{}: only idle hosts go", row.name);
    }
}

#[test]
fn hosts_for_the_peak_let_nobody_wait_and_cost_more_than_foresight() {
    let report = played(&synthetic(Shape::OnOff, 1, 1_000, 256), &["fixed-peak"]);
    let fixed = &report.rows[1];
    assert_eq!((fixed.figures[2].waits.max, fixed.figures[2].changes), (Millis(0), 0));
    assert!(report.ratio(fixed, 2) > 1.0);
}

#[test]
fn bounds_that_are_broken_are_named() {
    let report = played(&synthetic(Shape::Batches, 1, 1_000, 256), &[]);
    assert!(report.broken(&Bounds::default(), 2).is_empty());
    let bounds = Bounds {
        p99_wait: Some(Millis(1)),
        node_hours_ratio: Some(1.0),
        changes_per_hour: Some(0.1),
        work_lost: Some(Millis(0)),
    };
    assert_eq!(report.broken(&bounds, 2).len(), 3, "{:?}", report.broken(&bounds, 2));
}

#[test]
fn a_pool_that_never_grows_is_an_error_and_no_endless_replay() {
    let mut closed = policy();
    closed.preset = Preset::None;
    let workload = synthetic(Shape::Batches, 1, 1_000, 256);
    let refused = compare(&workload, &closed, &[], conditions(), 1, &|_, _| {}).expect_err("nobody serves them");
    assert!(refused.contains("policy") && refused.contains("not grow"), "{refused}");
}

#[test]
fn progress_grows_from_nothing_to_the_whole_of_each_rule() {
    let workload = synthetic(Shape::Batches, 1, 1_000, 256);
    let told = [Mutex::new(Vec::new()), Mutex::new(Vec::new())];
    let tell = |rule: usize, played| told[rule].lock().expect("nobody panicked").push(played);
    compare(&workload, &policy(), &["fixed-peak".to_owned()], conditions(), 2, &tell).expect("both serve every task");
    for told in told.map(|told| told.into_inner().expect("nobody panicked")) {
        assert!(told.is_sorted_by(|one, next| one < next), "{told:?}");
        assert_eq!((told.first(), told.last()), (Some(&0), Some(&WHOLE)));
        assert!(told.len() > 100, "a trace is told in more than {} steps", told.len());
    }
}

#[test]
fn a_page_of_plots_needs_nothing_from_elsewhere() {
    let report = played(&synthetic(Shape::Batches, 1, 1_000, 256), &["fixed-peak"]);
    let page = html(&report, "a <title>", &[vec!["RULE".into()], vec!["policy".into()]]);
    assert!(page.contains("a &lt;title&gt;") && page.contains("<svg") && page.ends_with("</html>\n"));
    assert!(!page.contains("<script") && page.matches("http").count() == 1, "but for the name of SVG");
    assert!(svg(&report, "x").matches("<path").count() > 4);
}
