//! A true history passes; each kind of lie in it is found, and nothing else with it.

use crate::{History, Rule, judge};

/// One at-least-once job whose first attempt was lost, and an exclusive one of one attempt.
const TRUE: &str = r#"{"kind":"asked","key":"a","delivery":"at_least_once","tasks":1}
{"kind":"failed","key":"a","maybe":true}
{"kind":"asked","key":"a","delivery":"at_least_once","tasks":1}
{"kind":"answered","key":"a","job":1,"existed":true}
{"kind":"conflict","key":"a","refused":true}
{"kind":"asked","key":"x","delivery":"exclusive","tasks":1}
{"kind":"answered","key":"x","job":2,"existed":false}
{"kind":"asked","key":"no","delivery":"at_most_once","tasks":1}
{"kind":"failed","key":"no","maybe":false}
{"kind":"fault","what":"kill spawner"}
{"kind":"seen","job":1,"task":0,"state":"running"}
{"kind":"seen","job":2,"task":0,"state":"exited(3)"}
{"kind":"start","key":"a","task":0,"epoch":"1.1","at_ms":1000}
{"kind":"beat","key":"a","task":0,"epoch":"1.1","at_ms":1100}
{"kind":"start","key":"a","task":0,"epoch":"2.2","at_ms":1500}
{"kind":"end","key":"a","task":0,"epoch":"2.2","at_ms":1900,"code":0}
{"kind":"start","key":"x","task":0,"epoch":"1.1","at_ms":1000}
{"kind":"beat","key":"x","task":0,"epoch":"1.1","at_ms":1400}
{"kind":"start","key":"x","task":0,"epoch":"1.2","at_ms":1400}
{"kind":"end","key":"x","task":0,"epoch":"1.2","at_ms":1800,"code":3}
{"kind":"job","job":1,"key":"a","tasks":1}
{"kind":"job","job":2,"key":"x","tasks":1}
{"kind":"record","job":1,"task":0,"state":"succeeded","attempts":[{"number":1,"end":"spawner_lost"},{"number":2,"end":"succeeded"}]}
{"kind":"record","job":2,"task":0,"state":"exited(3)","attempts":[{"number":1,"end":"spawner_lost"},{"number":2,"end":"exited(3)"}]}
{"kind":"closed"}"#;

fn rules_of(text: &str) -> Vec<Rule> {
    let mut rules: Vec<Rule> =
        judge(&History::read(text).expect("a history")).iter().map(|violation| violation.rule).collect();
    rules.sort_unstable();
    rules.dedup();
    rules
}

/// The true history with one line changed; an empty `to` takes the line out.
fn doctored(from: &str, to: &str) -> String {
    let lines: Vec<&str> = TRUE.lines().collect();
    let found = lines.iter().filter(|line| line.contains(from)).count();
    assert_eq!(found, 1, "{from} names one line");
    let changed =
        lines.iter().map(|line| if line.contains(from) { line.replace(from, to) } else { (*line).to_owned() });
    changed.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

/// The true history with lines before its last.
fn with(more: &str) -> String {
    TRUE.replace("{\"kind\":\"closed\"}", &format!("{more}\n{{\"kind\":\"closed\"}}"))
}

fn without(start: &str) -> String {
    let lines: Vec<&str> = TRUE.lines().filter(|line| !line.starts_with(start)).collect();
    assert!(lines.len() < TRUE.lines().count());
    lines.join("\n")
}

#[test]
fn a_true_history_passes() {
    assert_eq!(judge(&History::read(TRUE).expect("a history")), []);
}

#[test]
fn a_lost_job_is_found() {
    let text = without(r#"{"kind":"job","job":2"#);
    assert_eq!(rules_of(&text), [Rule::NothingLost, Rule::OneEnd]);
}

#[test]
fn lost_tasks_are_found() {
    let text = doctored(r#""job":2,"key":"x","tasks":1"#, r#""job":2,"key":"x","tasks":0"#);
    assert!(rules_of(&text).contains(&Rule::NothingLost));
}

#[test]
fn a_doubled_job_is_found() {
    let again = r#"{"kind":"job","job":3,"key":"x","tasks":1}
{"kind":"record","job":3,"task":0,"state":"exited(3)","attempts":[{"number":1,"end":"exited(3)"}]}"#;
    assert_eq!(rules_of(&with(again)), [Rule::NothingDoubled]);
    let other = r#"{"kind":"asked","key":"x","delivery":"exclusive","tasks":1}
{"kind":"answered","key":"x","job":1,"existed":true}"#;
    assert!(rules_of(&with(other)).contains(&Rule::NothingDoubled));
    let anew = r#"{"kind":"asked","key":"x","delivery":"exclusive","tasks":1}
{"kind":"answered","key":"x","job":2,"existed":false}"#;
    assert_eq!(rules_of(&with(anew)), [Rule::NothingDoubled]);
    assert_eq!(rules_of(&doctored(r#""refused":true"#, r#""refused":false"#)), [Rule::NothingDoubled]);
}

#[test]
fn an_error_that_says_too_much_is_found() {
    let done = r#"{"kind":"job","job":3,"key":"no","tasks":0}"#;
    assert!(rules_of(&with(done)).contains(&Rule::ErrorsTrue));
    // The first answer says that it existed: only a question without a true answer can have made it.
    assert_eq!(rules_of(&doctored(r#""maybe":true"#, r#""maybe":false"#)), [Rule::ErrorsTrue]);
}

#[test]
fn a_job_that_nobody_asked_for_is_found() {
    assert!(rules_of(&with(r#"{"kind":"job","job":3,"key":"ghost","tasks":0}"#)).contains(&Rule::Complete));
    let ran = r#"{"kind":"start","key":"no","task":0,"epoch":"1.1","at_ms":5}"#;
    assert_eq!(rules_of(&with(ran)), [Rule::NothingLost]);
}

#[test]
fn a_task_without_an_end_is_found() {
    let under_way = doctored(
        r#"{"kind":"record","job":1,"task":0,"state":"succeeded""#,
        r#"{"kind":"record","job":1,"task":0,"state":"running""#,
    );
    assert_eq!(rules_of(&under_way), [Rule::OneEnd]);
    assert_eq!(rules_of(&without(r#"{"kind":"record","job":1"#)), [Rule::OneEnd]);
    let open = doctored(
        r#"{"number":1,"end":"spawner_lost"},{"number":2,"end":"exited(3)"}"#,
        r#"{"number":1,"end":""},{"number":2,"end":"exited(3)"}"#,
    );
    assert_eq!(rules_of(&open), [Rule::OneEnd]);
}

#[test]
fn a_second_end_is_found() {
    let line = TRUE.lines().find(|line| line.contains(r#""kind":"record","job":1"#)).expect("it is there");
    assert_eq!(rules_of(&with(line)), [Rule::OneEnd]);
    let twice = doctored(
        r#"{"number":1,"end":"spawner_lost"},{"number":2,"end":"succeeded"}"#,
        r#"{"number":2,"end":"succeeded"},{"number":2,"end":"succeeded"}"#,
    );
    assert!(rules_of(&twice).contains(&Rule::OneEnd));
    let both = doctored(
        r#"{"number":1,"end":"spawner_lost"},{"number":2,"end":"succeeded"}"#,
        r#"{"number":1,"end":"succeeded"},{"number":2,"end":"succeeded"}"#,
    );
    assert!(rules_of(&both).contains(&Rule::OneEnd));
}

#[test]
fn an_end_that_changes_is_found() {
    let changed = doctored(
        r#"{"kind":"seen","job":2,"task":0,"state":"exited(3)"}"#,
        r#"{"kind":"seen","job":2,"task":0,"state":"succeeded"}"#,
    );
    assert_eq!(rules_of(&changed), [Rule::EndsStay]);
    let revived = with(r#"{"kind":"seen","job":2,"task":0,"state":"running"}"#);
    assert_eq!(rules_of(&revived), [Rule::EndsStay]);
}

#[test]
fn a_record_that_its_process_contradicts_is_found() {
    assert_eq!(rules_of(&doctored(r#""at_ms":1800,"code":3"#, r#""at_ms":1800,"code":4"#)), [Rule::RecordsTrue]);
    // It is said to have succeeded and never came to its end.
    assert_eq!(rules_of(&without(r#"{"kind":"end","key":"a""#)), [Rule::RecordsTrue]);
    let unknown = with(r#"{"kind":"start","key":"a","task":0,"epoch":"2.3","at_ms":2000}"#);
    assert_eq!(rules_of(&unknown), [Rule::RecordsTrue]);
    // A later one stands for it only where it may be repeated.
    let passed_over = TRUE.replace(
        r#"{"number":1,"end":"spawner_lost"},{"number":2,"end":"succeeded"}"#,
        r#"{"number":2,"end":"succeeded"}"#,
    );
    assert_eq!(rules_of(&passed_over), []);
    let exclusive = TRUE.replace(
        r#"{"number":1,"end":"spawner_lost"},{"number":2,"end":"exited(3)"}"#,
        r#"{"number":2,"end":"exited(3)"}"#,
    );
    assert_eq!(rules_of(&exclusive), [Rule::RecordsTrue]);
    let nobody = TRUE.replace(r#""state":"exited(3)""#, r#""state":"cancelled""#);
    assert_eq!(rules_of(&nobody), [Rule::RecordsTrue]);
    let somebody =
        nobody.replace("{\"kind\":\"closed\"}", "{\"kind\":\"cancelled\",\"job\":2,\"task\":0}\n{\"kind\":\"closed\"}");
    assert_eq!(rules_of(&somebody), []);
}

#[test]
fn an_end_that_no_fault_explains_is_found() {
    let refused = TRUE.replace(
        r#"{"number":1,"end":"spawner_lost"},{"number":2,"end":"s"#,
        r#"{"number":1,"end":"refused(limits.cpu)"},{"number":2,"end":"s"#,
    );
    assert_eq!(rules_of(&refused), [Rule::EndsExplained]);
}

#[test]
fn an_attempt_that_starts_twice_is_found() {
    let twice = with(r#"{"kind":"start","key":"a","task":0,"epoch":"3.2","at_ms":2000}"#);
    assert_eq!(rules_of(&twice), [Rule::AttemptsOnce]);
}

#[test]
fn a_second_start_of_at_most_once_is_found() {
    let once = TRUE.replace("at_least_once", "at_most_once");
    assert_eq!(rules_of(&once), [Rule::AtMostOnce]);
}

#[test]
fn an_overlap_of_exclusive_attempts_is_found() {
    assert_eq!(
        rules_of(&doctored(r#""epoch":"1.2","at_ms":1400"#, r#""epoch":"1.2","at_ms":1399"#)),
        [Rule::Exclusive]
    );
    // Also where the older one runs on behind the newer one.
    let longer = with(r#"{"kind":"beat","key":"x","task":0,"epoch":"1.1","at_ms":9000}"#);
    assert_eq!(rules_of(&longer), [Rule::Exclusive]);
}

#[test]
fn what_is_left_is_found() {
    assert_eq!(rules_of(&with(r#"{"kind":"left","what":"pid 7"}"#)), [Rule::NothingLeft]);
}

#[test]
fn a_history_that_breaks_off_is_found() {
    assert_eq!(rules_of(&without(r#"{"kind":"closed""#)), [Rule::Complete]);
    assert!(rules_of("{\"kind\":\"closed\"}").contains(&Rule::Complete));
    assert!(History::read("{\"kind\":\"news\"}").is_err());
    assert!(History::read("{\"kind\":\"start\",\"key\":\"a\"").is_err(), "a line cut short");
}
