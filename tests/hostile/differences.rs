//! What a job can do where a fence is missing: for each case that ends otherwise
//! there, what it is that ends otherwise. A run holds each difference against what
//! happened, so that `docs/sandbox.md`, which shows this table, cannot be wrong.

use nix::unistd::geteuid;

use crate::{
    case::{Case, Rule, Wants, value, works},
    stage::Stage,
};

/// Not a fence: what only root may do, the suite as well as its jobs.
pub const ROOT: &str = "root";

/// What an ordinary user without a delegated cgroup lacks on every host.
const LACKING: [&str; 7] = ["uid.own", "kill.cgroup", "limits.cpu", "limits.memory", "limits.pids", "limits.io", ROOT];

/// How one case ends where something is missing.
pub struct Difference {
    case: &'static str,
    /// A fence, or [`ROOT`].
    pub lacks: &'static str,
    /// What the job can do because of it, or what stands there instead.
    pub means: &'static str,
    /// In the place of the case's own rules about the same tries.
    pub rules: &'static [Rule],
    /// The control must fail, too: what nobody may do there is not shown to be the sandbox's doing.
    pub unproved: bool,
}

fn is_the_users(text: &str, _: &Stage) -> bool {
    let own = geteuid().as_raw();
    !text.is_empty() && text.split(',').all(|uid| uid.parse() == Ok(own))
}

fn is_the_users_group(text: &str, _: &Stage) -> bool {
    let own = nix::unistd::getegid().as_raw();
    !text.is_empty() && text.split(',').all(|gid| gid.parse() == Ok(own))
}

const BY_NAMESPACE: &str =
    "counted by the limit of processes of its own user namespace (RLIMIT_NPROC) instead of its group";

const fn by_namespace(case: &'static str) -> Difference {
    Difference { case, lacks: "limits.pids", means: BY_NAMESPACE, rules: &[], unproved: false }
}

/// All of them.
pub static DIFFERENCES: [Difference; 7] = [
    by_namespace("P01"),
    by_namespace("P02"),
    Difference {
        case: "P11",
        lacks: ROOT,
        means: "refused, as to any process of the user: what the sandbox adds to that is not shown",
        rules: &[],
        unproved: true,
    },
    by_namespace("P14"),
    Difference {
        case: "P24",
        lacks: "uid.own",
        means: "has the user's uid and groups: what else keeps it from the user's processes and files are its namespaces \
                and its root",
        rules: &[
            value("Uid|own", "the user's", is_the_users),
            value("Gid", "the user's", is_the_users_group),
            // Those that are not mapped into its namespace are shown as one number.
            value("Groups", "the user's, whatever they are", |_, _| true),
            Rule {
                tries: "made-runs-as|installed-runs-as",
                wants: Wants::RefusedOr(&["EPERM", "EACCES"], "the user's uid", is_the_users),
            },
        ],
        unproved: false,
    },
    Difference {
        case: "P30",
        lacks: ROOT,
        means: "refused, as to any process of the user: what the sandbox adds to that is not shown",
        rules: &[],
        unproved: true,
    },
    Difference {
        case: "P45",
        lacks: "uid.own",
        means: "may slow its own init (priority, limits, processors), which has its uid; signals to it are without \
                effect, memory and descriptors closed",
        rules: &[works(
            "init-signal|init-priority|init-limit|init-affinity|init-kill-by-pidfd|init-stop|init-terminate|init-kill",
        )],
        unproved: false,
    },
];

/// How the case ends where `lacks` says what is missing; none: as everywhere.
pub fn of(case: &Case, lacks: impl Fn(&str) -> bool) -> Option<&'static Difference> {
    DIFFERENCES.iter().find(|difference| difference.case == case.id && lacks(difference.lacks))
}

/// Why a case that needs this is not run for an ordinary user; none: every user has it, or should.
pub fn why_not_run(missing: &str) -> Option<&'static str> {
    match missing {
        ROOT => Some("not run: the suite itself must be root for it"),
        missing => LACKING.contains(&missing).then_some("not run: nothing would stop it"),
    }
}

/// As `docs/sandbox.md` has it: every case that does not simply pass for an ordinary user.
pub fn print_table(cases: &[&'static Case]) {
    println!("| case | what the job does | missing | as an ordinary user |");
    println!("| --- | --- | --- | --- |");
    for case in cases {
        let difference = of(case, |fence| LACKING.contains(&fence));
        let needed = case.needs.iter().find_map(|fence| Some((*fence, why_not_run(fence)?)));
        if let Some((missing, means)) = difference.map(|known| (known.lacks, known.means)).or(needed) {
            println!("| {} | {} | `{missing}` | {means} |", case.id, case.title);
        }
    }
}
