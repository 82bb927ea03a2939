//! Several coordinators on one PostgreSQL: whatever happens to the leader or to
//! the data base, nothing is lost, nothing runs twice, and somebody leads again.

use std::{collections::BTreeSet, path::Path, time::Duration};

use muster_proto::v1::{self, end::Reason};
use muster_tests::{
    Client, HighlyAvailable, NodeOptions, WAIT,
    client::is_away,
    eventually,
    part::muster_binary,
    postgres::{Cluster, Proxy, Road},
    skip,
};
use nix::sys::signal::Signal;

const LONG: Duration = Duration::from_secs(180);

/// A job whose tasks each end with a code of their own after this many seconds.
fn sleepers(fleet: &muster_tests::Fleet, tasks: u32, seconds: u32) -> v1::JobTemplate {
    let mut template = fleet.script(&format!("sleep {seconds}; exit $((MUSTER_TASK + 10))"));
    template.tasks = tasks;
    template
}

/// Asks under this key until there is an answer: which job it is.
async fn submit_as(ha: &HighlyAvailable, key: &str) -> u64 {
    eventually("a submit is answered", WAIT, async || {
        match ha.fleet.client.try_submit(key, ha.fleet.script("exit 0")).await {
            Ok(answer) => Some(answer.job),
            Err(status) if is_away(&status) => None,
            Err(status) => panic!("{key}: {status}"),
        }
    })
    .await
}

/// Each task has ended as it would have without any fault, by its first and only attempt.
async fn ended_undisturbed(client: &Client, job: u64, tasks: u32) {
    let done = client.finished(job, LONG).await;
    for task in 0..tasks {
        let index = usize::try_from(task).expect("few");
        assert_eq!(done.tasks[index].attempts.len(), 1, "adopted, not restarted: {:?}", done.tasks[index]);
        assert_eq!(done.end(index), Reason::Exited(i32::try_from(task).expect("few") + 10));
    }
}

#[tokio::test]
async fn a_standby_takes_over_from_a_killed_postgres_leader_and_adopts_what_runs() {
    let Some(mut ha) = HighlyAvailable::start(3).await else { skip!("PostgreSQL is not installed") };
    ha.fleet.add_node("n1", &NodeOptions::default()).await;
    let job = ha.fleet.client.submit(sleepers(&ha.fleet, 4, 8)).await;
    ha.fleet.client.running(job, 4).await;
    let first = ha.leader().await;
    ha.kill(first);
    let second = ha.leader().await;
    assert_ne!(first, second);
    // Also the one that comes back finds its place.
    ha.launch(first).await;
    ha.kill(second);
    let third = ha.leader().await;
    assert_ne!(second, third);
    ended_undisturbed(&ha.fleet.client, job, 4).await;
    // A job that is new to all of them.
    assert_eq!(ha.fleet.client.run(ha.fleet.script("echo here")).await.end(0), Reason::Succeeded(v1::Empty {}));
}

#[tokio::test]
async fn what_a_postgres_leader_answered_is_known_to_the_next() {
    let Some(mut ha) = HighlyAvailable::start(2).await else { skip!("PostgreSQL is not installed") };
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(ha.fleet.client.submit(ha.fleet.script("echo here")).await);
        let leader = ha.leader().await;
        ha.kill(leader);
        ha.launch(leader).await;
        ha.leader().await;
    }
    for job in &jobs {
        assert_eq!(ha.fleet.client.summary(*job).await.state, "waiting");
    }
    assert_eq!(jobs.iter().collect::<BTreeSet<_>>().len(), jobs.len());
}

#[tokio::test]
async fn a_postgres_leader_that_was_stopped_for_longer_than_its_lease_ends_and_commands_nothing() {
    let Some(mut ha) = HighlyAvailable::start(2).await else { skip!("PostgreSQL is not installed") };
    ha.fleet.add_node("n1", &NodeOptions::default()).await;
    let job = ha.fleet.client.submit(sleepers(&ha.fleet, 3, 6)).await;
    ha.fleet.client.running(job, 3).await;
    let old = ha.leader().await;
    let old_client = ha.members[old].client.clone();
    ha.part(old).stop();
    // A request that the stopped one reads when it wakes: it must not be answered as by a leader.
    let template = ha.fleet.script("echo late");
    let late = tokio::spawn(async move { old_client.try_submit("late", template).await });
    let standby = 1 - old;
    eventually("the standby leads", WAIT, async || {
        let request = v1::StatusRequest {};
        ha.members[standby].client.fleet.clone().status(request).await.ok().map(|_| ())
    })
    .await;
    ha.fleet.client = ha.members[standby].client.clone();
    ha.part(old).signal(Signal::SIGCONT);
    let status = ha.part(old).wait(WAIT);
    assert!(!status.success(), "it leads no more, so it ends");
    let said = ha.part(old).log();
    assert!(said.contains("lead") && !said.contains("panicked"), "{said}");
    let refused = late.await.expect("the task").expect_err("not by the old leader");
    assert!(is_away(&refused), "maybe done, ask again by the key: {refused}");
    ended_undisturbed(&ha.fleet.client, job, 3).await;
    // The key names one job, whoever took it.
    let again = ha.fleet.client.try_submit("late", ha.fleet.script("echo late")).await.expect("a job");
    assert!(!again.existed, "nothing of the old leader's was written");
}

#[tokio::test]
async fn postgres_may_crash_and_come_back_under_running_jobs() {
    let Some(mut ha) = HighlyAvailable::start(2).await else { skip!("PostgreSQL is not installed") };
    ha.fleet.add_node("n1", &NodeOptions::default()).await;
    let job = ha.fleet.client.submit(sleepers(&ha.fleet, 3, 10)).await;
    ha.fleet.client.running(job, 3).await;
    let leader = ha.leader().await;
    ha.cluster.crash();
    // It cannot renew, so it ends, before anybody else could lead.
    let status = ha.part(leader).wait(WAIT);
    assert!(!status.success());
    ha.kill(leader);
    ha.cluster.launch();
    ha.leader().await;
    // Its service manager starts it again.
    ha.launch(leader).await;
    ended_undisturbed(&ha.fleet.client, job, 3).await;
}

#[tokio::test]
async fn a_postgres_connection_that_breaks_under_load_loses_and_doubles_nothing() {
    let Some(cluster) = Cluster::start() else { skip!("PostgreSQL is not installed") };
    let proxy = Proxy::to(&cluster);
    let store = proxy.url();
    let mut ha = HighlyAvailable::start_on(cluster, store, 1).await;
    ha.fleet.add_node("n1", &NodeOptions::default()).await;
    let mut template = ha.fleet.script("sleep 0.1; exit $((MUSTER_TASK + 10))");
    template.tasks = 60;
    let job = ha.fleet.client.submit(template).await;
    for (round, road) in [Road::CutAnswer, Road::CutQuestion].into_iter().cycle().take(10).enumerate() {
        let wanted = u32::try_from(round).expect("few") * 4 + 1;
        eventually("the array goes on", LONG, async || {
            (ha.fleet.client.summary(job).await.counts.unwrap_or_default().failed >= wanted).then_some(())
        })
        .await;
        proxy.set(road);
    }
    ended_undisturbed(&ha.fleet.client, job, 60).await;
    assert!(ha.part(0).is_running(), "a cut within the lease is no reason to end");
}

#[tokio::test]
async fn answers_survive_a_failover_of_postgres_to_its_synchronous_standby() {
    let Some(pair) = Cluster::start_pair() else { skip!("PostgreSQL is not installed") };
    let store = Cluster::url_of(&pair);
    let [primary, standby] = pair;
    let mut ha = HighlyAvailable::start_on(primary, store, 2).await;
    ha.fleet.add_node("n1", &NodeOptions::default()).await;
    let job = ha.fleet.client.submit(sleepers(&ha.fleet, 3, 12)).await;
    ha.fleet.client.running(job, 3).await;
    let mut answered = Vec::new();
    for number in 0..20 {
        answered.push((format!("before-{number}"), submit_as(&ha, &format!("before-{number}")).await));
    }
    // In the middle of a submit that nobody has answered yet.
    let (client, template) = (ha.fleet.client.clone(), ha.fleet.script("exit 0"));
    let open = tokio::spawn(async move { client.try_submit("meanwhile", template).await });
    ha.cluster.crash();
    standby.promote();
    // Whoever ended is started again by its service manager.
    let leader = eventually("a coordinator leads on the new primary", LONG, async || {
        for number in 0..ha.members.len() {
            if !ha.part(number).is_running() {
                ha.start_member(number);
            }
        }
        ha.leads_now().await
    })
    .await;
    ha.fleet.client = ha.members[leader].client.clone();
    for (key, known) in answered {
        assert_eq!(submit_as(&ha, &key).await, known, "{key} is the job that it was");
    }
    if let Ok(Ok(answer)) = open.await {
        assert_eq!(submit_as(&ha, "meanwhile").await, answer.job);
    }
    ended_undisturbed(&ha.fleet.client, job, 3).await;
    let status = ha.fleet.client.fleet.clone().status(v1::StatusRequest {}).await.expect("a status").into_inner();
    assert!(!status.alarms.iter().any(|alarm| alarm.contains("accept-loss")), "{:?}", status.alarms);
    assert_eq!(ha.fleet.client.run(ha.fleet.script("exit 0")).await.end(0), Reason::Succeeded(v1::Empty {}));
}

#[tokio::test]
async fn the_command_line_finds_the_postgres_leader_among_several_addresses() {
    let Some(mut ha) = HighlyAvailable::start(2).await else { skip!("PostgreSQL is not installed") };
    let leader = ha.leader().await;
    let pki = ha.pki();
    let ask = |server: String| {
        let mut command = std::process::Command::new(muster_binary());
        command.args(["status", "--server", &server, "--ca"]).arg(pki.join("ca.pem"));
        command.arg("--cert").arg(pki.join("admin.pem")).output().expect("an executable")
    };
    let (one, other) = (ha.members[leader].address.clone(), ha.members[1 - leader].address.clone());
    // The standby first: it names the leader.
    let done = ask(format!("{other},{one}"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let refused = ask(other.clone());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(6), "{said}");
    assert!(said.contains(&one), "a standby alone says who leads: {said}");
    ha.kill(leader);
    let done = ask(format!("{one},{other}"));
    assert!(done.status.success(), "it waits for the takeover: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn the_set_up_of_three_coordinators_on_postgres_works_as_it_is_shipped() {
    if Cluster::start().is_none() {
        skip!("PostgreSQL is not installed");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/ha/try");
    let mut command = std::process::Command::new(script);
    let free = || std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let ports = [free(), free(), free()].map(|port| port.local_addr().expect("it is bound").port().to_string());
    command.arg(folder.path().join("ha")).arg("--check").env("MUSTER", muster_binary()).env("PORTS", ports.join(" "));
    let done = command.output().expect("a script that can be executed");
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && out.contains("leads now"), "{out}\n{err}");
}
