//! The limits that several parts or operators meet, with their defaults. Sizes are bytes.

use crate::time::Millis;

/// Between two heartbeats of a node.
pub const HEARTBEAT_INTERVAL: Millis = Millis::from_secs(3);
/// A node's lease: the greater of this and four intervals.
pub const LEASE_MIN: Millis = Millis::from_secs(15);
/// Percent that both clocks together may drift, added to the coordinator's side of a lease.
pub const LEASE_DRIFT_PERCENT: u64 = 15;
/// Time for the host to end what its lease covered.
pub const LEASE_KILL: Millis = Millis::from_secs(2);
/// A leader may grant leases for this long after it sent its last renewal.
pub const LEADERSHIP_LEASE: Millis = Millis::from_secs(3);
/// Between two renewals of the leadership.
pub const LEADERSHIP_RENEWAL: Millis = Millis::from_secs(1);
/// A standby waits this much longer than a leadership lease and its drift.
pub const TAKEOVER_MARGIN: Millis = Millis(500);
/// A node that has been silent this long is lost.
pub const LOST_AFTER: Millis = Millis::from_secs(120);
/// A lost host that a provider made is given back after this much longer: time for a person to look at it, and for
/// the network to heal, before what it holds goes with it.
pub const LOST_HOST_KEPT: Millis = Millis::from_secs(15 * 60);
/// A coordinator's leadership, counted on its own clock from the sending of a renewal.
pub const LEADER_LEASE: Millis = Millis::from_secs(3);
/// Between two renewals of it.
pub const LEADER_RENEW: Millis = Millis::from_secs(1);
/// A standby takes over when it has seen no renewal for this long by its own clock: the lease and the drift of both.
pub const LEADER_TAKEOVER: Millis = Millis(3_500);
/// A leader that has not renewed for this long is not named any more: who asks waits for what comes of it.
pub const LEADER_DOUBT: Millis = Millis(1_500);
/// Between two looks of a standby at the leadership.
pub const LEADER_POLL: Millis = Millis(200);
/// Calls to a standby wait at most this long for somebody to lead.
pub const LEADER_AWAITED: Millis = Millis::from_secs(4);
/// Terms of leaders that are remembered with where they began.
pub const TERMS_KEPT: usize = 64;
/// With this many live nodes or more, the brake on evictions works.
pub const BRAKE_NODES_MIN: usize = 5;
/// The brake holds evictions for this long.
pub const BRAKE_HOLD: Millis = Millis::from_secs(15 * 60);
/// For as long again after a brake, nodes are given up one at a time, with this pause between two.
pub const BRAKE_PAUSE: Millis = Millis::from_secs(10);
/// Faults of a host in a row, on which it cools down.
pub const FAULTS_BEFORE_COOLING: u32 = 5;
/// How long it cools down; one more fault after that, and it does so again.
pub const COOLING: Millis = Millis::from_secs(60);
/// Faults of a host in a row, on which it is drained: it would eat the queue.
pub const FAULTS_BEFORE_DRAIN: u32 = 8;
/// A task that was running on this many nodes when they were lost is held.
pub const POISON_NODES: usize = 3;
/// The same for a task that was running so many times when its node was lost, on however few nodes: a bad host would
/// show on its other tasks too, so one node may fall more often than several.
pub const POISON_FALLS: u32 = 5;
/// Numbers of attempts that a store can have lost of one task, as far as it believes a host.
pub const NUMBERS_PASSED_MAX: u32 = 16;
/// A timer that is overdue by this much shows that the coordinator itself was stopped.
pub const ABSENCE: Millis = Millis::from_secs(5);
/// Ask again for a drain's proof, or evict again, after this.
pub const DRAIN_ASK_AGAIN: Millis = Millis::from_secs(2);
/// Deadline of a drain that names none and is not told to have none.
pub const DRAIN_DEADLINE: Millis = Millis::from_secs(30 * 60);
/// A provider's word that a host may be deleted is good for this long.
pub const PREFLIGHT_CLEARED: Millis = Millis::from_secs(60);
/// A host that its provider keeps is no victim for this long; then it is asked again.
pub const PREFLIGHT_KEPT: Millis = Millis::from_secs(5 * 60);
/// Rolling drains that go on at the same time.
pub const ROLLINGS_MAX: usize = 64;
/// A host that is being woken and says nothing is woken again after this: it may still have been going down, or the
/// packet may have been lost.
pub const WAKE_ASK_AGAIN: Millis = Millis::from_secs(60);
/// A released host that has not confirmed by then is asked again.
pub const DELETE_ASK_AGAIN: Millis = Millis::from_secs(10);
/// What a provider's program has to make or end a host.
pub const PROVIDER_CHANGE_TIME: Millis = Millis::from_secs(120);
/// What a provider's program has to list hosts, or to describe one.
pub const PROVIDER_LOOK_TIME: Millis = Millis::from_secs(30);
/// A provider's program is asked for its list this often.
pub const PROVIDER_LIST_EVERY: Millis = Millis::from_secs(15);

/// A pool's size is decided on at most once in this time.
pub const POOL_LOOK: Millis = Millis::from_secs(1);
/// A node's figures count as long as it was heard within this time.
pub const SAMPLE_FRESH: Millis = Millis::from_secs(10);
/// A pool whose hosts keep failing tries one after this, and after twice as long for each that fails again.
pub const PAUSE_MIN: Millis = Millis::from_secs(60);
/// Longest time between two trials of such a pool.
pub const PAUSE_MAX: Millis = Millis::from_secs(30 * 60);
/// A provider that has not confirmed a deletion for this long is silent: the pool does not shrink.
pub const PROVIDER_SILENT: Millis = Millis::from_secs(60);

/// Prefill covers this much of a node's work by its mean task time.
pub const PREFILL_HORIZON: Millis = Millis(100);
/// A task counts as at least this long there: what starting it takes comes on top of its own
/// time, and one node must not be sent what others could do now.
pub const PREFILL_TASK_MIN: Millis = Millis(5);
/// Sent to one node and not started, at most.
pub const PREFILL_MAX: u32 = 256;
/// Attempts in one Start message.
pub const START_BATCH_MAX: usize = 512;
/// Nodes looked at for one placement before the next wake-up.
pub const PLACEMENT_CANDIDATES_MAX: usize = 512;
/// First wait before a failed task is placed again; doubles up to the most.
pub const RETRY_BACKOFF_MIN: Millis = Millis(250);
/// Longest wait before a failed task is placed again.
pub const RETRY_BACKOFF_MAX: Millis = Millis::from_secs(60);

/// Tasks in one job.
pub const TASKS_MAX: u32 = 10_000_000;
/// Jobs that are not finished.
pub const OPEN_JOBS_MAX: usize = 100_000;
/// Nodes in one fleet.
pub const NODES_MAX: usize = 20_000;
/// Priority, from minus this to this.
pub const PRIORITY_MAX: i32 = 1_000;
/// Idempotency key, in characters.
pub const KEY_LEN_MAX: usize = 128;
/// Names of jobs, nodes and pools, in bytes.
pub const NAME_LEN_MAX: usize = 128;
/// A reason given by an operator, in bytes.
pub const REASON_LEN_MAX: usize = 1_024;
/// Labels of a node, or constraints of a job.
pub const LABELS_MAX: usize = 64;

/// Arguments and environment of one attempt together.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;
/// One argument or environment entry: the kernel's own limit (MAX_ARG_STRLEN).
pub const ARGUMENT_BYTES_MAX: usize = 128 << 10;
/// Input files of one task.
pub const INPUT_FILES_MAX: usize = 10_000;
/// Output patterns of one job.
pub const OUTPUT_FILES_MAX: usize = 1_000;
/// Their paths together: a spawner keeps them beside what it holds.
pub const OUTPUT_PATHS_BYTES_MAX: usize = 16 << 10;
/// A path below the working folder.
pub const PATH_BYTES_MAX: usize = 4_095;
/// A file up to this travels inside messages; a larger one through the blob store.
pub const INLINE_FILE_BYTES_MAX: usize = 64 << 10;
/// Output that has not been uploaded at the end and still travels with the end's report.
pub const INLINE_TAIL_BYTES_MAX: usize = 16 << 10;
/// A stored blob.
pub const BLOB_BYTES_MAX: u64 = 64 << 30;
/// One chunk of a blob or log.
pub const CHUNK_BYTES: usize = 256 << 10;
/// One gRPC message.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Default of stdout and stderr of one attempt together; past it they are cut.
pub const OUTPUT_LIMIT: u64 = 64 << 20;
/// Default of processes and threads of one attempt.
pub const PIDS_LIMIT: u32 = 1_024;
/// Default request: one core.
pub const CPU_REQUEST_MILLI: u64 = 1_000;
/// Default request of memory.
pub const MEMORY_REQUEST_BYTES: u64 = 512 << 20;
/// Default request of disk: the size of the working folder.
pub const DISK_REQUEST_BYTES: u64 = 256 << 20;
/// Default grace between SIGTERM and the end.
pub const GRACE: Millis = Millis::from_secs(10);

/// The last of a coordinator's disk, kept for what is under way: so much, or this part of it if that is less.
pub const DISK_RESERVE_BYTES: u64 = 256 << 20;
/// As above: a twentieth.
pub const DISK_RESERVE_PART: u64 = 20;

/// With less than this free on its disk a host gets nothing new, or with less than this part of it if that is less;
/// with twice as much it does again.
pub const HOST_DISK_FLOOR_BYTES: u64 = 128 << 20;
/// As above: a twentieth.
pub const HOST_DISK_FLOOR_PART: u64 = 20;

/// Events that the driver applies and commits together.
pub const BATCH_EVENTS_MAX: usize = 4_096;
/// Of new jobs and of what came with ends in one commit, before what goes over it: a data base's message has an end.
pub const COMMIT_BYTES_MAX: usize = 64 << 20;
/// Events waiting for the driver.
pub const DRIVER_QUEUE_MAX: usize = 16_384;
/// Messages waiting for one agent's stream.
pub const SESSION_QUEUE_MAX: usize = 1_024;
/// A reader of the history that takes nothing for so long is let go, and told where to go on.
pub const WATCH_PATIENCE: Millis = Millis::from_secs(60);
/// Streams of one HTTP/2 connection.
pub const HTTP2_STREAMS_MAX: u32 = 256;
/// Handshakes must be done by then.
pub const HANDSHAKE_TIMEOUT: Millis = Millis::from_secs(10);
/// A node certificate's life.
pub const NODE_CERTIFICATE_LIFE: Millis = Millis::from_secs(24 * 3_600);
/// The same of a node whose pool lets it sleep and wakes it: it cannot renew meanwhile. The last third is left of it when it
/// is renewed, so that it may sleep for a month at least.
pub const SLEEPER_CERTIFICATE_LIFE: Millis = Millis::from_secs(90 * 24 * 3_600);
/// A join token's life.
pub const TOKEN_LIFE: Millis = Millis::from_secs(3_600);
