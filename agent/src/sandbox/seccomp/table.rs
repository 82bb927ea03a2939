//! The list: which system call a job may make, which it may make with some
//! arguments only, and which are refused, each with the reason. A number that
//! is not here does not exist for a job.
//!
//! What a job may do is what the usual engines for containers let theirs do,
//! minus what a job with an own uid and no capability has no use for. A call
//! that the kernel itself refuses to such a job may be allowed here when a
//! program asks with it what it can do (`setuid`, `sched_setscheduler`).

// The list names most of libc's numbers; naming them twice would be the larger risk.
#![allow(clippy::wildcard_imports, non_upper_case_globals)]

use libc::*;

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// It is made.
    Allow,
    /// "You may not": EPERM.
    Refuse,
    /// "This kernel does not have it": ENOSYS, upon which libraries fall back.
    Absent,
    /// It depends on an argument.
    Check(Check),
}

/// What is looked at in the arguments. Only the half of an argument that the
/// kernel itself reads is looked at, so the other half cannot hide anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// `clone`: no new namespaces.
    CloneFlags,
    /// `socket`, `socketpair`: three families.
    Family,
    /// `ioctl`: not those that type into a terminal or change its driver.
    Command,
    /// `mknod`, `mknodat`: no devices; the argument with this index is the mode.
    Mode(u32),
    /// `personality`: the harmless ones.
    Personality,
}

/// Calls with one rule and one reason.
pub struct Group {
    /// What happens.
    pub rule: Rule,
    /// Why.
    pub why: &'static str,
    /// Name in libc and number.
    pub calls: &'static [(&'static str, c_long)],
}

macro_rules! group {
    ($rule:expr, $why:literal: $($name:ident)+) => {
        Group { rule: $rule, why: $why, calls: &[$((stringify!($name), $name)),+] }
    };
}

// Numbers that libc does not name, or not for every C library; the same on all architectures (asm/unistd.h of 6.18).
// A constant here goes before the one of the same name in libc.
const SYS_cachestat: c_long = 451;
const SYS_fchmodat2: c_long = 452;
const SYS_map_shadow_stack: c_long = 453;
const SYS_futex_wake: c_long = 454;
const SYS_futex_wait: c_long = 455;
const SYS_futex_requeue: c_long = 456;
const SYS_statmount: c_long = 457;
const SYS_listmount: c_long = 458;
const SYS_lsm_get_self_attr: c_long = 459;
const SYS_lsm_set_self_attr: c_long = 460;
const SYS_lsm_list_modules: c_long = 461;
const SYS_mseal: c_long = 462;
const SYS_setxattrat: c_long = 463;
const SYS_getxattrat: c_long = 464;
const SYS_listxattrat: c_long = 465;
const SYS_removexattrat: c_long = 466;
const SYS_open_tree_attr: c_long = 467;
const SYS_file_getattr: c_long = 468;
const SYS_file_setattr: c_long = 469;
const SYS_listns: c_long = 470;
#[cfg(target_arch = "x86_64")]
const SYS_create_module: c_long = 174;
#[cfg(target_arch = "x86_64")]
const SYS_get_kernel_syms: c_long = 177;
#[cfg(target_arch = "x86_64")]
const SYS_query_module: c_long = 178;
#[cfg(target_arch = "x86_64")]
const SYS_uretprobe: c_long = 335;
#[cfg(target_arch = "x86_64")]
const SYS_uprobe: c_long = 336;

/// The list, as far as all architectures have it.
#[rustfmt::skip]
const COMMON: &[Group] = &[
    group!(Rule::Allow, "reading and writing what is open; the descriptor was granted when it was opened":
        SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2
        SYS_lseek SYS_close SYS_close_range SYS_dup SYS_dup3 SYS_fcntl SYS_flock SYS_fsync SYS_fdatasync SYS_ftruncate
        SYS_fallocate SYS_fadvise64 SYS_readahead SYS_sendfile SYS_copy_file_range SYS_splice SYS_tee SYS_vmsplice
        SYS_getdents64 SYS_pipe2 SYS_memfd_create SYS_memfd_secret SYS_cachestat),
    group!(Rule::Allow, "flushing; slow for others at worst, and databases and git need it":
        SYS_sync SYS_syncfs),
    group!(Rule::Allow, "files by name; the mounts, the uid and Landlock decide":
        SYS_openat SYS_openat2 SYS_mkdirat SYS_unlinkat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_readlinkat
        SYS_fchmod SYS_fchmodat SYS_fchmodat2 SYS_fchown SYS_fchownat SYS_faccessat SYS_faccessat2 SYS_fstat SYS_newfstatat
        SYS_statx SYS_statfs SYS_fstatfs SYS_truncate SYS_utimensat SYS_umask SYS_chdir SYS_fchdir SYS_getcwd
        SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch SYS_file_getattr SYS_file_setattr),
    group!(Rule::Allow, "attributes of its own files; tar and cp copy them":
        SYS_setxattr SYS_lsetxattr SYS_fsetxattr SYS_getxattr SYS_lgetxattr SYS_fgetxattr SYS_listxattr SYS_llistxattr
        SYS_flistxattr SYS_removexattr SYS_lremovexattr SYS_fremovexattr SYS_setxattrat SYS_getxattrat SYS_listxattrat
        SYS_removexattrat),
    group!(Rule::Allow, "its own memory":
        SYS_brk SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_process_madvise SYS_msync SYS_mincore SYS_mlock
        SYS_mlock2 SYS_munlock SYS_mlockall SYS_munlockall SYS_mseal SYS_remap_file_pages SYS_pkey_mprotect SYS_pkey_alloc
        SYS_pkey_free SYS_map_shadow_stack),
    group!(Rule::Allow, "where its own memory lies; numactl, Java and hwloc ask, and the cpuset still binds":
        SYS_mbind SYS_set_mempolicy SYS_get_mempolicy SYS_set_mempolicy_home_node),
    group!(Rule::Allow, "processes of its own; the PID namespace and the uid bound whom it reaches":
        SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_kill SYS_tkill SYS_tgkill SYS_pidfd_open
        SYS_pidfd_send_signal SYS_process_mrelease SYS_getpid SYS_getppid SYS_gettid SYS_setsid SYS_getsid SYS_setpgid
        SYS_getpgid SYS_set_tid_address SYS_set_robust_list SYS_get_robust_list SYS_rseq SYS_membarrier SYS_restart_syscall),
    group!(Rule::Allow, "threads wait for each other":
        SYS_futex SYS_futex_waitv SYS_futex_wake SYS_futex_wait SYS_futex_requeue),
    group!(Rule::Allow, "PR_SET_NAME and the like; what could do harm needs a capability":
        SYS_prctl),
    group!(Rule::Allow, "its own signals":
        SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigtimedwait SYS_rt_sigsuspend
        SYS_rt_sigqueueinfo SYS_rt_tgsigqueueinfo SYS_sigaltstack SYS_signalfd4),
    group!(Rule::Allow, "who it is; changing it takes a capability that it does not have":
        SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups SYS_setuid SYS_setgid
        SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setfsuid SYS_setfsgid SYS_setgroups SYS_capget SYS_capset),
    group!(Rule::Allow, "its own share of the processor; raising it takes a capability":
        SYS_sched_yield SYS_sched_setparam SYS_sched_getparam SYS_sched_setscheduler SYS_sched_getscheduler
        SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_rr_get_interval SYS_sched_setaffinity
        SYS_sched_getaffinity SYS_sched_setattr SYS_sched_getattr SYS_getpriority SYS_setpriority SYS_ioprio_set
        SYS_ioprio_get SYS_getcpu),
    group!(Rule::Allow, "limits and usage; a hard limit only goes down":
        SYS_prlimit64 SYS_getrusage SYS_times SYS_sysinfo SYS_uname),
    group!(Rule::Allow, "the time; adjtimex only reads without a capability":
        SYS_gettimeofday SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_adjtimex SYS_clock_adjtime
        SYS_getitimer SYS_setitimer SYS_timer_create SYS_timer_settime SYS_timer_gettime SYS_timer_getoverrun
        SYS_timer_delete SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime),
    group!(Rule::Allow, "waiting for descriptors":
        SYS_ppoll SYS_pselect6 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2),
    group!(Rule::Allow, "the older asynchronous input and output, of databases; no thread of the kernel acts for the job":
        SYS_io_setup SYS_io_destroy SYS_io_getevents SYS_io_submit SYS_io_cancel),
    group!(Rule::Allow, "sockets, once they are made; their family was checked then":
        SYS_connect SYS_accept SYS_accept4 SYS_bind SYS_listen SYS_shutdown SYS_getsockname SYS_getpeername SYS_sendto
        SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg SYS_setsockopt SYS_getsockopt),
    group!(Rule::Allow, "System V and POSIX queues, in an IPC namespace of its own":
        SYS_shmget SYS_shmat SYS_shmdt SYS_shmctl SYS_semget SYS_semop SYS_semtimedop SYS_semctl SYS_msgget SYS_msgsnd
        SYS_msgrcv SYS_msgctl SYS_mq_open SYS_mq_unlink SYS_mq_timedsend SYS_mq_timedreceive SYS_mq_notify SYS_mq_getsetattr),
    group!(Rule::Allow, "random numbers": SYS_getrandom),
    group!(Rule::Allow, "fencing itself further; a later filter or rule set can only take away":
        SYS_seccomp SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self),

    group!(Rule::Check(Check::CloneFlags), "threads and processes, but no namespaces, where it would have capabilities": SYS_clone),
    group!(Rule::Check(Check::Family), "unix and internet sockets; other families are code that few have looked at": SYS_socket SYS_socketpair),
    group!(Rule::Check(Check::Command), "devices' own commands, but none that types into a terminal (CVE-2017-5226)": SYS_ioctl),
    group!(Rule::Check(Check::Mode(2)), "fifos, sockets and plain files, but no devices": SYS_mknodat),
    group!(Rule::Check(Check::Personality), "fixed addresses for its own programs (sanitizers ask), and nothing else": SYS_personality),

    group!(Rule::Absent, "its flags lie in memory, where a filter cannot look; libc falls back to clone": SYS_clone3),
    group!(Rule::Absent, "a second way to make system calls, past this filter; libraries fall back to epoll":
        SYS_io_uring_setup SYS_io_uring_enter SYS_io_uring_register),

    group!(Rule::Refuse, "namespaces, in which it would have capabilities": SYS_unshare SYS_setns),
    group!(Rule::Refuse, "mounts: what it sees is decided before it runs":
        SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_move_mount SYS_open_tree SYS_open_tree_attr SYS_fsopen
        SYS_fsconfig SYS_fsmount SYS_fspick SYS_mount_setattr),
    group!(Rule::Refuse, "listing mounts, namespaces and security modules tells of the host":
        SYS_statmount SYS_listmount SYS_listns SYS_lsm_get_self_attr SYS_lsm_set_self_attr SYS_lsm_list_modules),
    group!(Rule::Refuse, "programs in the kernel, and counters that measure others": SYS_bpf SYS_perf_event_open),
    group!(Rule::Refuse, "stopping the kernel in mid-copy makes its races easy to win": SYS_userfaultfd),
    group!(Rule::Refuse, "keys outlive the job and are counted against a uid": SYS_add_key SYS_keyctl SYS_request_key),
    group!(Rule::Refuse, "looking into other processes; nothing that ends by itself needs it":
        SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_kcmp SYS_pidfd_getfd),
    group!(Rule::Refuse, "opening files past the folders that lead to them": SYS_open_by_handle_at SYS_name_to_handle_at),
    group!(Rule::Refuse, "watching whole file systems": SYS_fanotify_init SYS_fanotify_mark),
    group!(Rule::Refuse, "the kernel itself: its code, its end, its log":
        SYS_init_module SYS_finit_module SYS_delete_module SYS_kexec_load SYS_reboot SYS_syslog SYS_lookup_dcookie),
    group!(Rule::Refuse, "the host's accounts: swap, accounting, quotas": SYS_swapon SYS_swapoff SYS_acct SYS_quotactl SYS_quotactl_fd),
    group!(Rule::Refuse, "the host's clock, names and terminal":
        SYS_settimeofday SYS_clock_settime SYS_sethostname SYS_setdomainname SYS_vhangup),
    group!(Rule::Refuse, "moving other processes' memory": SYS_migrate_pages SYS_move_pages),
];

/// What only x86-64 has: the calls that its first years left behind, and its own.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const NATIVE: &[Group] = &[
    group!(Rule::Allow, "older forms of calls that are allowed; libc still makes them":
        SYS_open SYS_creat SYS_stat SYS_lstat SYS_access SYS_poll SYS_select SYS_pipe SYS_dup2 SYS_pause SYS_alarm
        SYS_fork SYS_vfork SYS_getdents SYS_rename SYS_renameat SYS_mkdir SYS_rmdir SYS_link SYS_unlink SYS_symlink
        SYS_readlink SYS_chmod SYS_chown SYS_lchown SYS_utime SYS_utimes SYS_futimesat SYS_time SYS_getpgrp SYS_getrlimit
        SYS_setrlimit SYS_epoll_create SYS_epoll_wait SYS_eventfd SYS_signalfd SYS_inotify_init SYS_sync_file_range),
    group!(Rule::Allow, "where a thread's own data is": SYS_arch_prctl),
    group!(Rule::Allow, "made by the kernel's own probes in a traced program; any other caller gets SIGILL":
        SYS_uretprobe SYS_uprobe),
    group!(Rule::Check(Check::Mode(1)), "fifos, sockets and plain files, but no devices": SYS_mknod),
    group!(Rule::Refuse, "segments and ports of the processor": SYS_modify_ldt SYS_iopl SYS_ioperm),
    group!(Rule::Refuse, "the kernel itself: its code": SYS_kexec_file_load),
    group!(Rule::Refuse, "left over; they tell of the host's file systems": SYS_uselib SYS_ustat SYS_sysfs),
    group!(Rule::Refuse, "no kernel has them any more; refused like their neighbours, which saves the search some steps":
        SYS__sysctl SYS_create_module SYS_get_kernel_syms SYS_query_module SYS_nfsservctl SYS_getpmsg SYS_putpmsg
        SYS_afs_syscall SYS_tuxcall SYS_security),
];

/// What only this architecture has.
#[cfg(target_arch = "aarch64")]
#[rustfmt::skip]
const NATIVE: &[Group] = &[
    group!(Rule::Allow, "an older form of a call that is allowed": SYS_renameat SYS_sync_file_range),
    group!(Rule::Refuse, "the kernel itself: its code": SYS_kexec_file_load),
];

/// All groups, in no order.
pub fn groups() -> impl Iterator<Item = &'static Group> {
    COMMON.iter().chain(NATIVE)
}
