//! What goes through a coordinator and an agent: floods of output, strange
//! bytes, arguments. The fleet is started when the first such case runs.

use std::{fs, process::Command};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{Fleet, client::bytes, client::fresh_key, part::muster_binary};
use tokio::runtime::Runtime;
use tonic::Code;

use crate::{case::Attempt, stage::Tools};

const MIB: u64 = 1 << 20;
/// Of both outputs together.
const OUTPUT_LIMIT: u64 = MIB;
/// What may be kept past the limit: the block that reached it.
const OVER: u64 = MIB / 4;
/// The agent may grow by so much while a job floods it: buffers of a few outputs, never the output.
const AGENT_GROWTH_BYTES: u64 = 24 * MIB;
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(300);

/// A fleet of one node, once it is needed.
pub struct FleetStage {
    line_bytes: u64,
    started: Option<(Runtime, Fleet)>,
}

impl FleetStage {
    /// None is started yet.
    pub fn new(tools: &Tools) -> Self {
        // A guest that may be thrown away is an emulated one, and copies a hundred times slower.
        Self { line_bytes: if tools.destructive { 16 * MIB } else { 1_024 * MIB }, started: None }
    }

    fn get(&mut self) -> Result<(&Runtime, &mut Fleet), String> {
        if self.started.is_none() {
            let runtime = Runtime::new().map_err(|error| error.to_string())?;
            let fleet = runtime.block_on(Fleet::with_node());
            self.started = Some((runtime, fleet));
        }
        self.started.as_mut().map(|(runtime, fleet)| (&*runtime, fleet)).ok_or_else(|| "no fleet".to_owned())
    }
}

fn body(template: &mut v1::JobTemplate) -> &mut v1::JobBody {
    template.body.as_mut().expect("a template made here has a body")
}

fn resident_most(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1_024
}

fn agent_pid(fleet: &mut Fleet) -> u32 {
    fleet.node("n1").agent.as_ref().map_or(0, muster_tests::part::Part::pid)
}

/// P07: `yes` on both outputs for a while; little is kept, nobody else waits, the agent stays small.
pub fn flood(stage: &mut FleetStage) -> Result<Vec<Attempt>, String> {
    let (runtime, fleet) = stage.get()?;
    let agent = agent_pid(fleet);
    let fleet = &*fleet;
    runtime.block_on(async {
        // Once small, so that what is allocated once is.
        fleet.client.run(fleet.script("seq 1000")).await;
        let before = resident_most(agent);
        let mut template = fleet.script("timeout 15 yes & timeout 15 yes >&2; wait; exit 3");
        body(&mut template).output_limit_bytes = OUTPUT_LIMIT;
        let job = fleet.client.submit(template).await;
        fleet.client.running(job, 1).await;
        // Another job's output while that one floods.
        let quiet = fleet.client.run(fleet.script("echo quiet")).await;
        let still = fleet.client.summary(job).await.finished_ms.is_none();
        let said = fleet.client.output(quiet.summary.job, 0).await.0;
        let done = fleet.client.finished(job, DEADLINE).await;
        let (out, err) = fleet.client.output(job, 0).await;
        let kept = (out.len() + err.len()) as u64;
        let grown = resident_most(agent).saturating_sub(before);
        println!("       kept {kept} bytes of 15 s; the agent grew by {grown} bytes at most; the other job ran meanwhile: {still}");
        Ok(vec![
            Attempt::compare("verdict", &done.end(0), &Reason::Exited(3)),
            Attempt::holds("bounded", kept > 0 && kept <= OUTPUT_LIMIT + OVER, kept),
            Attempt::compare("truncated", &done.last_attempt(0).output_truncated, &true),
            Attempt::holds("kept-is-whole", out.chunks(2).all(|line| line == b"y\n" || line == b"y"), out.len()),
            Attempt::compare("other-jobs-output", &said, &b"quiet\n".to_vec()),
            Attempt::holds("agent-flat", grown <= AGENT_GROWTH_BYTES, grown),
        ])
    })
}

/// P08: 1 GiB (in an emulated guest 16 MiB), cut by size and not by line; bytes stay bytes, up to the command line.
pub fn strange_bytes(stage: &mut FleetStage) -> Result<Vec<Attempt>, String> {
    let line_bytes = stage.line_bytes;
    let (runtime, fleet) = stage.get()?;
    let fleet = &*fleet;
    runtime.block_on(async {
        let mut template = fleet.script(&format!("head -c {line_bytes} /dev/zero | tr '\\0' x"));
        body(&mut template).output_limit_bytes = OUTPUT_LIMIT;
        let line = fleet.client.submit(template).await;
        let cut = fleet.client.finished(line, DEADLINE).await;
        let (long, _) = fleet.client.output(line, 0).await;
        // Every byte value and NUL bytes, none of it text, without a line's end at its end.
        let script = "i=0; while [ $i -lt 64 ]; do printf '\\000\\000\\377\\376\\200\\303\\050\\355\\240\\200\\033[31m\\r'; i=$((i+1)); done";
        let odd = fleet.client.run(fleet.script(script)).await.summary.job;
        let due: Vec<u8> = b"\0\0\xff\xfe\x80\xc3\x28\xed\xa0\x80\x1b[31m\r".repeat(64);
        let (bytes, _) = fleet.client.output(odd, 0).await;
        let mut tries = vec![
            Attempt::holds("line-is-cut", !long.is_empty() && long.len() as u64 <= OUTPUT_LIMIT + OVER, long.len()),
            Attempt::holds("line-is-whole", long.iter().all(|byte| *byte == b'x'), long.len()),
            Attempt::compare("truncated", &cut.last_attempt(0).output_truncated, &true),
            Attempt::holds("bytes-stay-bytes", bytes == due, bytes.len()),
        ];
        for (name, job, length) in [("line", line, long.len()), ("bytes", odd, due.len())] {
            let server = format!("unix:{}", fleet.data().join("operator.sock").display());
            let shown = Command::new(muster_binary())
                .args(["--server", &server, "job", "logs", &muster_core::ids::JobId(job).to_string()])
                .output()
                .map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&shown.stderr).into_owned();
            tries.push(Attempt::holds(format!("cli-{name}"), shown.status.success() && !said.contains("panicked"), said));
            tries.push(Attempt::compare(format!("cli-{name}-length"), &shown.stdout.len(), &length));
        }
        Ok(tries)
    })
}

/// P41: refused at submit with a sentence, or passed byte for byte; the agent lives and tries nothing twice.
pub fn arguments(stage: &mut FleetStage) -> Result<Vec<Attempt>, String> {
    let (runtime, fleet) = stage.get()?;
    let agent = agent_pid(fleet);
    let shared = &*fleet;
    let mut tries: Vec<Attempt> = runtime.block_on(async {
        let mut tries = Vec::new();
        let long = "x".repeat(200 << 10);
        let many: Vec<Vec<u8>> =
            std::iter::once(b"/bin/true".to_vec()).chain((0..32).map(|_| vec![b'x'; 98_304])).collect();
        let refusals: [(&str, Vec<Vec<u8>>); 5] = [
            ("3-mib", many),
            ("200-kib", vec![b"/bin/true".to_vec(), long.into_bytes()]),
            ("nothing", Vec::new()),
            ("empty-program", vec![Vec::new()]),
            ("nul", vec![b"/bin/true".to_vec(), b"a\0b".to_vec()]),
        ];
        for (name, words) in refusals {
            let mut template = shared.job(["/bin/true"]);
            body(&mut template).arguments = words.into_iter().map(bytes).collect();
            let answer = shared.client.try_submit(&fresh_key(), template).await;
            let code = answer.as_ref().err().map(tonic::Status::code);
            tries.push(Attempt::holds(
                format!("refused-{name}"),
                code == Some(Code::InvalidArgument) && answer.as_ref().is_err_and(|status| status.message().len() > 20),
                answer.map(|answer| answer.job).map_err(|status| status.to_string()),
            ));
        }
        let words: [&[u8]; 9] =
            [b"--help", b"-rf", b"../x", b"", b"\xff\xfe\x80", b"a b\nc", b"$(id)", b"'\"", b"\x1b[2J"];
        let mut template = shared.job(["/bin/sh", "-c", "printf '[%s]' \"$@\"", "--"]);
        body(&mut template).arguments.extend(words.map(bytes));
        let done = shared.client.run(template).await;
        let due: Vec<u8> = words.iter().flat_map(|word| [b"[", *word, b"]"].concat()).collect();
        let (out, _) = shared.client.output(done.summary.job, 0).await;
        tries.push(Attempt::holds("byte-exact", out == due, String::from_utf8_lossy(&out)));
        tries.push(Attempt::compare("one-attempt", &done.tasks[0].attempts.len(), &1));
        // As large as is allowed at all: the kernel must take it, too.
        let large: Vec<u8> = vec![b'y'; (128 << 10) - 1];
        let mut template = shared.job(["/bin/sh", "-c", "printf %s \"$1\" | wc -c", "--"]);
        body(&mut template).arguments.push(bytes(&large));
        let answer = shared.client.try_submit(&fresh_key(), template).await;
        let job = answer.map_err(|status| format!("the largest argument is refused: {status}"))?.job;
        let done = shared.client.finished(job, DEADLINE).await;
        let (out, err) = shared.client.output(job, 0).await;
        let said = (done.end(0), String::from_utf8_lossy(&out).trim().to_owned(), err.len());
        tries.push(Attempt::compare("largest", &said, &(Reason::Succeeded(v1::Empty {}), large.len().to_string(), 0)));
        Ok::<_, String>(tries)
    })?;
    tries.push(Attempt::compare("agent-is-the-same", &agent_pid(fleet), &agent));
    let lives = fleet.node("n1").agent.as_mut().is_some_and(muster_tests::part::Part::is_running);
    tries.push(Attempt::compare("agent-lives", &lives, &true));
    Ok(tries)
}
