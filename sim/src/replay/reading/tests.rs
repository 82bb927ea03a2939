//! Traces as they should be, and what is said of those that are not.

use super::*;

const SWF: &str = "; UnixStartTime: 749458803\n1 10 -1 1451 3 -1 -1 -1 -1 -1 -1 1 1 -1 -1 -1 -1 -1\n\
                   2 70 -1 -1 3 -1 -1 -1 -1 -1 -1 1 1 -1 -1 -1 -1 -1\n";
const INVOCATIONS: &str = "HashOwner,HashApp,HashFunction,Trigger,480,481\na,b,c,http,2,1\na,b,d,http,0,5\n";
const DURATIONS: &str = "HashOwner,HashApp,HashFunction,Average,Count,percentile_Average_0,percentile_Average_50,percentile_Average_100\n\
                         a,b,c,100,9,100,100,900\n";
const MEMORY: &str = "HashFunction,HashOwner,HashApp,SampleCount,AverageAllocatedMb\nc,a,b,7,300.5\n";

fn source<'a>(name: &'a str, text: &'a str) -> Source<'a> {
    Source { name, text }
}

fn alone(text: &str, format: Option<Format>) -> Result<Trace, TraceError> {
    let files = Files { trace: source("t", text), durations: None, memory: None };
    read(&files, format, &Assumptions::default())
}

fn invocations(text: &str, durations: &str, memory: &str) -> Result<Trace, TraceError> {
    let files =
        Files { trace: source("t", text), durations: Some(source("d", durations)), memory: Some(source("m", memory)) };
    read(&files, None, &Assumptions::default())
}

fn why(read: Result<Trace, TraceError>) -> String {
    read.expect_err("it is malformed").to_string()
}

#[test]
fn a_batch_log_becomes_arrays() {
    let trace = alone(SWF, None).unwrap();
    assert_eq!((trace.format, trace.begins), (Format::Swf, Some(Timestamp(749_458_813_000))));
    let [job] = trace.workload.arrivals[..] else { panic!("one job can be played") };
    assert_eq!((job.at, job.run, job.tasks, job.cpu_milli), (Millis(0), Millis::from_secs(1_451), 3, 1_000));
    assert_eq!(trace.workload.skipped, [(String::from("jobs without run time or processors"), 1)]);
    let files = Files { trace: source("t", SWF), durations: None, memory: None };
    let large = read(&files, None, &Assumptions { task_cores: 2, ..Assumptions::default() }).unwrap();
    assert_eq!((large.workload.arrivals[0].tasks, large.workload.arrivals[0].cpu_milli), (2, 2_000));
}

#[test]
fn invocations_fall_into_their_minutes_and_run_as_their_function_does() {
    let trace = invocations(INVOCATIONS, DURATIONS, MEMORY).unwrap();
    let arrivals = &trace.workload.arrivals;
    assert_eq!((trace.format, arrivals.len()), (Format::Invocations, 3));
    assert!(arrivals[..2].iter().all(|arrival| arrival.at < Millis(60_000)) && arrivals[2].at >= Millis(60_000));
    assert!(arrivals.iter().all(|arrival| arrival.run == Millis(100) && arrival.memory_mib == 512));
    assert_eq!(trace.workload.skipped, [(String::from("invocations of functions without a duration"), 5)]);
}

#[test]
fn requests_run_for_their_tokens() {
    let text =
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9,4000,10\r\n2023-11-16 18:17:04.4,0,2\r\n";
    let trace = alone(text, None).unwrap();
    let runs: Vec<(u64, u64)> = trace.workload.arrivals.iter().map(|arrival| (arrival.at.0, arrival.run.0)).collect();
    assert_eq!((trace.format, runs), (Format::Arrivals, vec![(0, 1_000), (500, 100)]));
}

#[test]
fn counts_fall_into_their_intervals_and_may_be_scaled() {
    let text = "timestamp,value\n2014-04-10 00:04:00,3.0\n2014-04-10 00:09:00,1\n";
    let files = Files { trace: source("t", text), durations: None, memory: None };
    let trace = read(&files, None, &Assumptions { scale_permille: 2_500, ..Assumptions::default() }).unwrap();
    assert_eq!((trace.format, trace.workload.tasks()), (Format::Counts, 10));
    assert!(trace.workload.arrivals.iter().all(|arrival| arrival.at < Millis(600_000)));
}

#[test]
fn what_is_wrong_is_named_with_its_file_and_line() {
    let cases = [
        (why(alone("", None)), "t: it is empty"),
        (why(alone("hello\n", None)), "t:1: no known format begins with `hello`"),
        (why(alone("; only a header\n", None)), "t: it names no work"),
        (why(alone("1 2 3\n", Some(Format::Swf))), "t:1: a job has 18 fields, and the line has 3"),
        (why(alone(&SWF.replace("1451", "long"), None)), "t:2: field 4 (run time) is `long`: that is no number"),
        (why(alone(&SWF.replace(" 10 -1", " -5 -1"), None)), "t:2: field 2 (submit time) is -5"),
        (why(alone(&SWF.replace("1451", "9999999999"), None)), "longer than 50 years"),
        (why(alone(INVOCATIONS, None)), "t: how long its functions run is in another file"),
        (
            why(invocations(&INVOCATIONS.replace("2,1", "2"), DURATIONS, MEMORY)),
            "t:2: the header has 6 columns, and the line has 5",
        ),
        (why(invocations(&INVOCATIONS.replace("2,1", "2,-1"), DURATIONS, MEMORY)), "t:2: column 6 is `-1`"),
        (why(invocations(INVOCATIONS, "x,y\n1,2\n", MEMORY)), "d:1: the header has no column HashOwner"),
        (
            why(invocations(INVOCATIONS, &DURATIONS.replace("9,100,100", "9,100,50"), MEMORY)),
            "d:2: percentile_Average_50 is 50: less than",
        ),
        (
            why(invocations(INVOCATIONS, DURATIONS, &MEMORY.replace("300.5", "much"))),
            "m:2: AverageAllocatedMb is `much`",
        ),
        (why(alone("timestamp,value\n2014-04-10 00:04:00,3\nsoon,4\n", None)), "t:3: the time is `soon`"),
        (
            why(alone("timestamp,value\n2014-04-10 00:04:00,3\n2014-04-10 00:03:00,4\n", None)),
            "t:3: its time is not later",
        ),
        (
            why(alone("timestamp,value\n2014-04-10 00:04:00,-3\n", None)),
            "t:2: value is `-3`: it must be a number from 0 up",
        ),
        (why(alone("timestamp,value\n2014-04-10 00:04:00,3\n", None)), "two intervals at least"),
        (
            why(alone("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", None)),
            "t:2: column 3 (GeneratedTokens) is missing",
        ),
        (
            why(alone("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,NaN,1\n", None)),
            "t:2: ContextTokens is `NaN`",
        ),
        (why(alone("timestamp,value\n2014-04-10 00:04:00,1e12\n2014-04-10 00:05:00,1\n", None)), "use --scale"),
    ];
    for (said, expected) in cases {
        assert!(said.contains(expected), "{said}\n  should say: {expected}");
    }
}

#[test]
fn the_same_seed_reads_the_same_work() {
    let one = invocations(INVOCATIONS, DURATIONS, MEMORY).unwrap().workload;
    assert_eq!(one, invocations(INVOCATIONS, DURATIONS, MEMORY).unwrap().workload);
}
