//! Job files: TOML of people, made into the template that is sent, which the
//! coordinator then checks.

use muster::template::Draft;
use muster_core::ids::Actor;
use muster_proto::convert;

use crate::target::{Shape, Signs, Target};

pub(super) const TARGET: Target = Target {
    name: "job_file",
    shape: Shape::Text,
    words: &[
        "name = ",
        "command = [",
        "array = \"",
        "cpu = ",
        "memory = ",
        "disk = ",
        "pids = ",
        "time_limit = \"",
        "grace = \"",
        "output_limit = ",
        "[retries]\n",
        "failed = ",
        "lost = ",
        "priority = ",
        "[constraints]\n",
        "[env]\n",
        "stdin = ",
        "inputs = [",
        "{ path = ",
        "outputs = [",
        "working_folder = ",
        "network = \"host\"",
        "profile = \"shared\"",
        "without = [",
        "best_effort = true",
        "delivery = \"exclusive\"",
        "on_drain = \"requeue\"",
        "key = ",
        "\"",
        "]",
        "0-999",
        "500m",
        "1.5G",
        "1h30m",
        "\n",
        "..",
        "\\u0000",
    ],
    inputs_in_ci: 6_000,
    take,
    seeds,
};

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(input) else { return Ok(()) };
    let draft = match Draft::from_toml(text) {
        Ok(draft) => draft,
        Err(sentence) if sentence.contains('\n') => return Err(format!("not one sentence: {sentence:?}")),
        Err(sentence) => {
            signs.note("file", &sentence);
            return Ok(());
        }
    };
    signs.accepted = true;
    let template = draft.template();
    signs.result("template", &template);
    if let Ok(template) = template {
        let tasks = template.tasks;
        let checked = convert::template(template, &Actor("ana".into()), None);
        signs.result("check", &checked);
        if checked.is_ok_and(|checked| checked.spec.tasks != tasks) {
            return Err("the coordinator sees another number of tasks".into());
        }
    }
    Ok(())
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let all = r#"name = "sums"
command = ["sh", "-c", "exit {}"]
array = "1-30"
cpu = "500m"
memory = "1.5G"
disk = 1048576
pids = 64
time_limit = "1h30m"
grace = "10s"
output_limit = "4M"
priority = -5
pool = "batch"
stdin = "in.txt"
inputs = ["a", { path = "b", name = "c" }]
outputs = ["out.gz", "log/all"]
working_folder = "w/x"
network = "host"
profile = "shared"
without = ["limits"]
best_effort = true
delivery = "exclusive"
on_drain = "requeue"
key = "nightly 7"
[retries]
failed = 2
lost = 3
drained = 4
[env]
A = "1"
[constraints]
zone = "north"
"#;
    let lines =
        "command = [\"wc\"]\neach_line = \"list.txt\"\ncpu = 0.5\nnetwork = \"none\"\ndelivery = \"at_most_once\"\n";
    vec![
        ("all", all.as_bytes().to_vec()),
        ("lines", lines.as_bytes().to_vec()),
        ("small", b"command = [\"true\"]\n".to_vec()),
    ]
}
