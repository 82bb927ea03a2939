//! A sandbox serves the next job of its owner if, and only if, nothing at all was
//! left in it: each kind of thing that a job can leave is left once.

use muster_agent::spawner::protocol::{AttemptKey, Ended, Event, Request, Running, Start, Verdict};

use crate::spawner::Spawner;

/// What can be left, each by a few words of Perl, which every Debian host has. They end with `die` if it cannot.
const TRACES: [(&str, &str); 13] = [
    ("a file in the working folder", "open(my $f, '>', '/work/left') or die"),
    ("a hidden folder", "mkdir '.left' or die"),
    ("a file in /tmp", "open(my $f, '>', '/tmp/left') or die"),
    ("a file in /dev/shm", "open(my $f, '>', '/dev/shm/left') or die"),
    ("another mode of the working folder", "chmod 0755, '/work' or die"),
    ("shared memory", "shmget(77, 4096, 0600 | 512) // die"),
    ("semaphores", "semget(77, 1, 0600 | 512) // die"),
    ("a queue of System V", "msgget(77, 0600 | 512) // die"),
    // Landlock lets nobody open one, after it was made.
    ("a message queue", "my $q = 'left'; syscall(240, $q, 66, 0600, 0) >= 0 or $! == 13 or die"),
    (
        "a connection that waits for its time to pass",
        "use Socket; socket(my $l, PF_INET, SOCK_STREAM, 0) or die; bind($l, sockaddr_in(7777, INADDR_LOOPBACK)) or die; \
         listen($l, 1) or die; socket(my $c, PF_INET, SOCK_STREAM, 0) or die; \
         connect($c, sockaddr_in(7777, INADDR_LOOPBACK)) or die; accept(my $s, $l) or die; close $c; close $s",
    ),
    ("a process", "defined(my $child = fork) or die; $child or do { close STDOUT; close STDERR; sleep 1000 }"),
    ("a daemon", "defined(my $a = fork) or die; $a or do { fork and exit; close STDOUT; close STDERR; sleep 1000 }"),
    ("a stopped process", "defined(my $child = fork) or die; $child or do { kill 'STOP', $$ }"),
];

/// Says whatever it finds that a fresh sandbox does not have.
const LOOK: &str = "for my $d ('/work', '/tmp', '/dev/shm') { opendir(my $h, $d) or die; \
     print \"$d/$_ \" for grep { !/^[.][.]?$/ } readdir $h } \
     printf 'mode %o ', (stat '/work')[2] & 07777 unless ((stat '/work')[2] & 07777) == 0700; \
     print 'memory ' if defined shmget(77, 4096, 0); print 'semaphores ' if defined semget(77, 1, 0); \
     print 'messages ' if defined msgget(77, 0); my $n = 'left'; print 'queue ' if syscall(240, $n, 0, 0, 0) >= 0 || $! == 13; \
     open(my $t, '<', '/proc/self/net/tcp') or die; my @rows = <$t>; print 'socket ' if @rows > 1; \
     print 'process ' if grep { $_ != $$ && $_ != 1 } map { m{/proc/(\\d+)$} } glob '/proc/[0-9]*';";

/// An owner's jobs, one after the other.
struct Jobs {
    spawner: Spawner,
    owner: u32,
    job: u64,
}

impl Jobs {
    fn perl(&mut self, script: &str) -> (Running, Ended, String) {
        self.run(&["/usr/bin/perl", "-e", script], |_| {})
    }

    fn run(&mut self, arguments: &[&str], change: impl FnOnce(&mut Start)) -> (Running, Ended, String) {
        self.job += 1;
        let mut start = self.spawner.script("");
        start.attempt = AttemptKey { job: self.job, task: 0, number: 1, term: 1 };
        start.owner = if self.owner == 0 { Vec::new() } else { format!("owner {}", self.owner).into_bytes() };
        start.arguments = arguments.iter().map(|word| word.as_bytes().to_vec()).collect();
        change(&mut start);
        let key = start.attempt;
        self.spawner.ask(&Request::Start(Box::new(start)), &[]);
        let (running, pipes) = match self.spawner.hear() {
            (Event::Started { attempt, running }, pipes) if attempt == key => (running, pipes),
            other => panic!("it did not start: {other:?}"),
        };
        let end = self.spawner.ended(key);
        let [mut stdout, mut stderr] = crate::spawner::pipes_of(pipes);
        let mut said = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut said).expect("text");
        std::io::Read::read_to_string(&mut stderr, &mut said).expect("text");
        self.spawner.ask(&Request::Forget { attempt: key }, &[]);
        (running, end, said)
    }

    /// The next owner, with a sandbox that a job has left as it was. Returns its init.
    fn next_owner(&mut self) -> u32 {
        self.owner += 1;
        self.perl("").0.init_pid
    }
}

/// None where jobs have no uid of their own: such a job could change what the next inherits from the init.
fn jobs(test: &str) -> Option<Jobs> {
    jobs_of(test, Spawner::start())
}

fn jobs_of(test: &str, spawner: Spawner) -> Option<Jobs> {
    if spawner.missing.iter().any(|fence| fence == "uid.own") {
        println!("SKIP {test}: without uid.own no sandbox is used again");
        return None;
    }
    Some(Jobs { spawner, owner: 0, job: 1_000 })
}

#[test]
fn a_sandbox_without_a_trace_serves_the_next_job_of_its_owner_and_of_no_other() {
    let Some(mut jobs) = jobs("a_sandbox_without_a_trace_serves_the_next_job_of_its_owner_and_of_no_other") else {
        return;
    };
    let init = jobs.next_owner();
    for code in [0, 7, 255] {
        let (running, end, said) = jobs.perl(&format!("print 'job '; exit {code}"));
        assert_eq!((running.init_pid, end.verdict), (init, Verdict::Exited(code)));
        assert_eq!(said, "job ", "each has pipes of its own");
    }
    let (killed, end, _) = jobs.perl("kill 'KILL', $$");
    assert_eq!((killed.init_pid, end.verdict), (init, Verdict::Signaled(9)));
    let other = jobs.next_owner();
    assert_ne!(other, init, "another owner");
    jobs.owner = 0;
    let [first, second] = [jobs.perl("").0.init_pid, jobs.perl("").0.init_pid];
    assert_ne!(first, second, "of an owner nobody knows");
}

#[test]
fn whatever_a_job_leaves_the_next_of_its_owner_does_not_find() {
    let Some(mut jobs) = jobs("whatever_a_job_leaves_the_next_of_its_owner_does_not_find") else { return };
    for (what, script) in TRACES {
        let init = jobs.next_owner();
        let (running, end, said) = jobs.perl(script);
        assert_eq!((running.init_pid, end.verdict), (init, Verdict::Exited(0)), "{what}: {said}");
        let (next, end, said) = jobs.perl(LOOK);
        assert_eq!((end.verdict, said.as_str()), (Verdict::Exited(0), ""), "{what} was found");
        assert_ne!(next.init_pid, init, "{what} was not noticed");
    }
}

#[test]
fn what_was_left_is_seen_by_the_same_job() {
    // The control of the test above: LOOK finds each trace where there is one.
    let Some(mut jobs) = jobs("what_was_left_is_seen_by_the_same_job") else { return };
    for (what, script) in TRACES {
        let (_, end, said) = jobs.perl(&format!("{script}; {LOOK}"));
        let is_parent = end.verdict == Verdict::Exited(0);
        assert!(is_parent && !said.is_empty(), "{what} is not found by its own job: {end:?} {said}");
    }
}

/// More than the spawner keeps.
const SHAPES: u32 = 160;

#[test]
fn an_owner_of_ever_new_shapes_does_not_lose_the_one_that_serves_again() {
    let test = "an_owner_of_ever_new_shapes_does_not_lose_the_one_that_serves_again";
    let Some(mut jobs) = jobs_of(test, Spawner::start_with("", 4 * SHAPES)) else { return };
    jobs.owner = 1;
    for pages in 1..=SHAPES {
        let (_, end, _) = jobs.run(&["/bin/true"], |start| start.limits.disk_bytes += u64::from(pages) * 4_096);
        assert_eq!(end.verdict, Verdict::Exited(0));
    }
    let init = jobs.perl("").0.init_pid;
    assert_eq!(jobs.perl("").0.init_pid, init, "those that nobody asks for again made no room");
}

#[test]
fn usage_of_an_earlier_job_is_not_the_next_ones() {
    let Some(mut jobs) = jobs("usage_of_an_earlier_job_is_not_the_next_ones") else { return };
    let init = jobs.next_owner();
    let (burning, end, _) = jobs.perl("my $t = (times)[0]; 1 while (times)[0] - $t < 0.3; my $m = 'x' x 50_000_000");
    assert_eq!(burning.init_pid, init);
    assert!(end.usage.cpu_ms >= 300 && end.usage.memory_peak_bytes > 50_000_000, "{:?}", end.usage);
    let (idle, end, _) = jobs.perl("");
    assert_eq!(idle.init_pid, init);
    assert!(end.usage.cpu_ms < 300 && end.usage.memory_peak_bytes < 50_000_000, "{:?}", end.usage);
}

#[test]
fn each_job_has_the_limits_and_the_stop_of_its_own() {
    let Some(mut jobs) = jobs("each_job_has_the_limits_and_the_stop_of_its_own") else { return };
    let init = jobs.next_owner();
    let (limited, end, _) = jobs.run(&["/bin/sleep", "1000"], |start| start.time_limit_ms = 100);
    assert_eq!((limited.init_pid, end.verdict), (init, Verdict::TimedOut));
    // Told to end, it ended with its sandbox.
    let (next, end, _) = jobs.perl("");
    assert_ne!(next.init_pid, init);
    assert_eq!(end.verdict, Verdict::Exited(0));
}
