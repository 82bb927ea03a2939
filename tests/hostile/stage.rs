//! Runs one case: a canary beside it, the job, the invariants, the control
//! outside, and the judgement over all of it.

use std::{
    fs::File,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use muster_agent::spawner::protocol::{AttemptKey, Running, Verdict};
use muster_tests::{WAIT, eventually_blocking, host};

use crate::{
    case::{self, Attempt, Body, Case, Control, Place, Rule, Wants, verdict_text},
    differences::{self, Difference, ROOT},
    fleet::FleetStage,
    invariants::{self, Base},
    outside::Outside,
    report::{Report, Status},
    spawner::{Life, Spawner},
};

/// The sum of the squares up to a million, modulo 1,000,003: what an undisturbed canary finds.
const CANARY_SUM: &str = "999998";
/// For the longest case on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// The spawner's word on a job's CPU time, as a try of a case that has a rule about it.
pub const USED_CPU: &str = "used-cpu-ms";

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Tools {
    pub muster: PathBuf,
    pub probe: PathBuf,
    /// A copy of the probe that belongs to root and is set-uid, if this host may have one.
    pub setuid: Option<PathBuf>,
    /// Our own unit's cgroup, for the spawner; none: it makes one.
    pub cgroup: Option<PathBuf>,
    pub destructive: bool,
}

/// A spawner with all that surrounds its jobs.
pub struct Stage {
    pub tools: Tools,
    pub spawner: Spawner,
    pub outside: Outside,
    /// The canary of the case that runs now.
    pub canary: Option<Running>,
    /// The uid of that canary.
    pub canary_uid: u32,
    /// The slowest canary so far.
    pub canary_slowest: Duration,
    base: Option<Base>,
}

struct Canary {
    key: AttemptKey,
    input: Option<OwnedFd>,
}

impl Stage {
    /// Starts a spawner; `broken` names the fence that it is to claim and not raise.
    pub fn start(tools: &Tools, broken: Option<&str>) -> Result<Self, String> {
        let outside = Outside::make(&tools.probe)?;
        let mut environment = vec![("MUSTER_HOSTILE_SECRET".into(), outside.secret.clone().into())];
        environment.extend(broken.map(|fence| ("MUSTER_BREAK_FENCE".into(), fence.into())));
        let spawner = Spawner::start(&tools.probe, environment, tools.cgroup.clone())?;
        std::fs::write(spawner.folder.path().join("state/secret"), &outside.secret)
            .map_err(|error| error.to_string())?;
        let mut stage = Self {
            tools: tools.clone(),
            spawner,
            outside,
            canary: None,
            canary_uid: 0,
            canary_slowest: Duration::ZERO,
            base: None,
        };
        // Two at once, as in each case, so that what is made once or kept ready is there.
        for _ in 0..2 {
            let (one, other) = (stage.start_canary()?, stage.start_canary()?);
            stage.end_canary(one)?;
            stage.end_canary(other)?;
        }
        stage.spawner.settle()?;
        stage.base = Some(Base::of(&stage.spawner, &stage.tools.muster)?);
        Ok(stage)
    }

    fn start_canary(&mut self) -> Result<Canary, String> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| errno.to_string())?;
        let start = self.spawner.order(&["canary"]);
        let key = self.spawner.begin(start, Some(read), &[])?;
        self.spawner.wait_for_output(key, "\n").map_err(|why| format!("I1: the canary does not run: {why}"))?;
        self.canary = Some(self.spawner.running(key)?);
        let said = self.spawner.output_so_far(key);
        self.canary_uid = said.trim().strip_prefix("ready ").and_then(|uid| uid.parse().ok()).ok_or(said)?;
        Ok(Canary { key, input: Some(write) })
    }

    fn end_canary(&mut self, mut canary: Canary) -> Result<(), String> {
        let since = Instant::now();
        drop(canary.input.take());
        let life = self.spawner.end(canary.key, PATIENCE)?;
        self.canary_slowest = self.canary_slowest.max(since.elapsed());
        self.spawner.forget(canary.key);
        self.canary = None;
        let said = String::from_utf8_lossy(&life.stdout).into_owned();
        if life.end.verdict == Verdict::Exited(0) && said.lines().last() == Some(CANARY_SUM) {
            return Ok(());
        }
        Err(format!("I1: the canary ended as {} and said {said:?}", verdict_text(&life.end.verdict)))
    }

    /// Runs a case and judges it.
    pub fn run(&mut self, case: &Case, fleet: &mut FleetStage) -> Report {
        let since = Instant::now();
        let mut report = Report::of(case);
        if let Some(status) = self.reason_to_skip(case) {
            report.status = status;
            return report;
        }
        match self.play(case, fleet, &mut report) {
            Ok(attempts) => self.judge(case, &attempts, &mut report),
            Err(why) => report.problems.push(why),
        }
        report.ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        report.close();
        report
    }

    fn reason_to_skip(&self, case: &Case) -> Option<Status> {
        if case.destructive && !self.tools.destructive {
            return Some(Status::Skipped("destructive: only in a throw-away guest".to_owned()));
        }
        let lacking = case.needs.iter().find(|fence| self.lacks(fence))?;
        self.difference(case).is_none().then(|| match differences::why_not_run(lacking) {
            Some(why) if !host::is_root() => Status::Differs(format!("without {lacking}, {why}")),
            Some(_) | None => Status::Skipped(format!("there is no {lacking} here")),
        })
    }

    fn lacks(&self, fence: &str) -> bool {
        self.spawner.missing.iter().any(|missing| missing == fence) || (fence == ROOT && !host::is_root())
    }

    fn difference(&self, case: &Case) -> Option<&'static Difference> {
        differences::of(case, |fence| self.lacks(fence))
    }

    fn play(&mut self, case: &Case, fleet: &mut FleetStage, report: &mut Report) -> Result<Vec<Attempt>, String> {
        if let Body::Fleet(act) = case.body {
            // The harness waits with a deadline and panics at it: the other cases run all the same.
            let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(fleet)));
            return played.unwrap_or_else(|_| Err("it panicked; the lines above say where".to_owned()));
        }
        let canary = self.start_canary()?;
        let played = match case.body {
            Body::Probe { command, facts, shape } => {
                let facts = facts(self, Place::Inside);
                let words: Vec<&str> = std::iter::once(command).chain(facts.iter().map(String::as_str)).collect();
                let mut start = self.spawner.order(&words);
                shape(&mut start);
                self.spawner.begin(start, None, &[]).and_then(|key| self.live_through(key)).map(|life| {
                    let verdict = verdict_text(&life.end.verdict);
                    if !case.ends.contains(&verdict.as_str()) {
                        let said = String::from_utf8_lossy(&life.stderr).trim().to_owned();
                        report
                            .problems
                            .push(format!("I5: ended as {verdict}, wanted {} {said}", case.ends.join(" or ")));
                    }
                    report.verdict = verdict;
                    let mut attempts = case::attempts(&life.stdout);
                    if case.rules.iter().any(|rule| rule.tries == USED_CPU) {
                        let usage = format!("{} of {}", life.end.usage.cpu_ms, life.end.wall_ms);
                        attempts.push(Attempt::of(USED_CPU, Ok(usage)));
                    }
                    attempts
                })
            }
            Body::Acts(act) => act(self),
            Body::Fleet(_) => Err("it was played above".to_owned()),
        };
        if let Err(why) = self.end_canary(canary) {
            report.problems.push(why);
        }
        let ends = self.spawner.settle()?;
        let wrong = ends.iter().filter(|(_, ends)| **ends != 1);
        report.problems.extend(wrong.map(|(key, ends)| format!("I5: attempt {} has ended {ends} times", key.task)));
        self.check_secrets(report);
        if let Some(base) = self.base.take() {
            report.problems.extend(base.broken(&mut self.spawner, &self.tools.muster));
            self.base = Some(base);
        }
        played
    }

    /// From a start to its end, with nothing of it left; forgets it.
    pub fn live_through(&mut self, key: AttemptKey) -> Result<Life, String> {
        let life = self.spawner.end(key, PATIENCE)?;
        // Told as ended: so nothing of it runs at this moment (FL-5).
        let canary =
            if host::is_root() { Some(self.canary_uid) } else { self.canary.as_ref().map(|canary| canary.init_pid) };
        let left: Vec<_> = invariants::processes_of_jobs(&self.spawner)
            .into_iter()
            .filter(|(_, sandbox)| Some(*sandbox) != canary)
            .collect();
        self.spawner.forget(key);
        if !left.is_empty() {
            return Err(format!("I3: it is told as ended, and these run: {left:?}"));
        }
        if let Some(cgroup) = &life.cgroup {
            eventually_blocking(WAIT, || (!cgroup.exists()).then_some(()))
                .ok_or_else(|| format!("I3: its cgroup is still there: {}", cgroup.display()))?;
        }
        if life.ends != 1 {
            return Err(format!("I5: its end was told {} times", life.ends));
        }
        Ok(life)
    }

    fn check_secrets(&mut self, report: &mut Report) {
        let folder = self.spawner.folder.path().to_string_lossy().into_owned();
        for said in self.spawner.spoken.drain(..) {
            for (what, text) in [("the secret", &self.outside.secret), ("the spawner's folder", &folder)] {
                if invariants::holds(&said, text) {
                    report.problems.push(format!("I6: {what} is in a job's output"));
                }
            }
        }
    }

    fn judge(&self, case: &Case, attempts: &[Attempt], report: &mut Report) {
        let rules = self.rules(case);
        for attempt in attempts {
            match rules.iter().find(|rule| rule.is_about(&attempt.name)) {
                Some(rule) => report.problems.extend(rule.broken_by(attempt, self)),
                None => report.problems.push(format!("no rule is about the try {}", attempt.name)),
            }
        }
        self.judge_difference(case, attempts, report);
        for rule in case.rules.iter().filter(|rule| !matches!(rule.wants, Wants::Never)) {
            if !attempts.iter().any(|attempt| rule.is_about(&attempt.name)) {
                report.problems.push(format!("{} was never tried", rule.tries));
            }
        }
        report.tries = attempts.len();
        report.refused = attempts.iter().filter(|attempt| attempt.outcome.is_err()).count();
        self.judge_control(case, report);
    }

    /// What holds here: a documented difference comes before the case's own rules.
    fn rules(&self, case: &Case) -> Vec<&'static Rule> {
        let differing = self.difference(case).map_or(&[] as &[Rule], |difference| difference.rules);
        differing.iter().chain(case.rules).collect()
    }

    /// What is documented as different must be different, else the document is wrong.
    fn judge_difference(&self, case: &Case, attempts: &[Attempt], report: &mut Report) {
        let Some(difference) = self.difference(case) else { return };
        report.status = Status::Differs(format!("without {}, {}", difference.lacks, difference.means));
        let differs = |rule: &&Rule| {
            attempts.iter().filter(|attempt| rule.is_about(&attempt.name)).any(|attempt| {
                let own = case.rules.iter().find(|rule| rule.is_about(&attempt.name));
                own.is_some_and(|own| own.broken_by(attempt, self).is_some())
            })
        };
        if !difference.rules.is_empty() && !difference.rules.iter().any(|rule| differs(&rule)) {
            report.problems.push("it ends as everywhere: its documented difference is none".to_owned());
        }
    }

    /// A rule is proved if the same program breaks it outside.
    fn judge_control(&self, case: &Case, report: &mut Report) {
        let (pen, command, facts) = match (&case.control, &case.body) {
            (Control::Runs(pen), Body::Probe { command, facts, .. }) => (*pen, *command, facts(self, Place::Outside)),
            (Control::None(why), _) => return report.control = format!("none: {why}"),
            (Control::Runs(_), Body::Acts(_) | Body::Fleet(_)) => return,
        };
        let outside = match self.run_outside(pen, command, &facts) {
            Ok(attempts) => attempts,
            Err(why) => return report.problems.push(format!("the control: {why}")),
        };
        let rules = self.rules(case);
        let breaks = |rule: &Rule| {
            outside.iter().any(|attempt| {
                let first = rules.iter().find(|rule| rule.is_about(&attempt.name));
                first.is_some_and(|first| std::ptr::eq(*first, rule)) && rule.broken_by(attempt, self).is_some()
            })
        };
        let proved = rules.iter().filter(|rule| breaks(rule)).count();
        report.unproved =
            rules.iter().filter(|rule| rule.is_refusal() && !breaks(rule)).map(|rule| rule.tries.to_owned()).collect();
        let worked = outside.iter().filter(|attempt| attempt.outcome.is_ok()).count();
        report.control = format!("{worked} of {} work outside", outside.len());
        let documented = self.difference(case).is_some_and(|difference| difference.unproved);
        if documented && proved > 0 {
            report.problems.push("the control is refused no more: its documented difference is none".to_owned());
        } else if proved == 0 && !documented && report.problems.is_empty() {
            report.status = Status::Skipped("it proves nothing: the same program does no better outside".to_owned());
        }
    }

    fn run_outside(
        &self,
        pen: &'static [&'static str],
        command: &str,
        facts: &[String],
    ) -> Result<Vec<Attempt>, String> {
        let told = |error: std::io::Error| error.to_string();
        let folder = tempfile::Builder::new().prefix("muster-hostile-").tempdir().map_err(told)?;
        let output = folder.path().join("output");
        // As a job might inherit one.
        let forgotten = File::open("/dev/null").map_err(told)?;
        let mut program = Command::new(&self.tools.probe);
        program.arg(command).args(facts).current_dir(folder.path()).stdin(Stdio::null());
        program.stdout(File::create(&output).map_err(told)?).stderr(Stdio::null());
        let number = forgotten.as_raw_fd();
        let maps = pen_maps();
        let enter = move || enter_pen(pen, number, &maps);
        // SAFETY: between fork and exec only system calls are made, none of which takes memory.
        unsafe { program.pre_exec(enter) };
        let mut child = program.spawn().map_err(told)?;
        let ended = eventually_blocking(PATIENCE, || child.try_wait().ok().flatten());
        if ended.is_none() {
            let _our_own_unreaped_child = child.kill();
            let _reaped = child.wait();
            return Err(format!("{command} did not end outside"));
        }
        Ok(case::attempts(&std::fs::read(&output).map_err(told)?))
    }
}

/// What an ordinary user writes to be root in a pen of its own; empty as root.
fn pen_maps() -> Vec<(&'static std::ffi::CStr, String)> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if uid.is_root() {
        return Vec::new();
    }
    vec![
        (c"/proc/self/setgroups", "deny".to_owned()),
        (c"/proc/self/uid_map", format!("0 {uid} 1")),
        (c"/proc/self/gid_map", format!("0 {gid} 1")),
    ]
}

/// Away from what the control would change for others.
fn enter_pen(pen: &[&str], forgotten: i32, maps: &[(&std::ffi::CStr, String)]) -> std::io::Result<()> {
    use nix::{
        fcntl::{FcntlArg, FdFlag, fcntl},
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    // SAFETY: its owner outlives the spawn.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(forgotten) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    if !pen.is_empty() && !maps.is_empty() {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        for (path, text) in maps {
            let file = nix::fcntl::open(*path, nix::fcntl::OFlag::O_WRONLY, nix::sys::stat::Mode::empty())?;
            nix::unistd::write(&file, text.as_bytes())?;
        }
    }
    for name in pen {
        let flag = match *name {
            "mount" => CloneFlags::CLONE_NEWNS,
            "uts" => CloneFlags::CLONE_NEWUTS,
            other => return Err(std::io::Error::other(other.to_owned())),
        };
        unshare(flag)?;
        if flag == CloneFlags::CLONE_NEWNS {
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        }
    }
    Ok(())
}
