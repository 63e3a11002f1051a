//! Which of the kernel's calls each kind of thread makes.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use libc as c;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs the guest, and answers what it asks of ports and registers.
    Vcpu,
    /// Serves a queue of a disk: reads and writes files that are open.
    Disk,
    /// Everything else: states, control, snapshots, saving, the end.
    Control,
}

/// What all threads do: memory, locks, clocks, signals, their end; and to say something.
const COMMON: &[c::c_long] = &[
    c::SYS_brk,
    c::SYS_clock_getres,
    c::SYS_clock_gettime,
    c::SYS_clock_nanosleep,
    c::SYS_close,
    c::SYS_exit,
    c::SYS_exit_group,
    c::SYS_futex,
    c::SYS_getpid,
    c::SYS_getrandom,
    c::SYS_gettid,
    c::SYS_gettimeofday,
    c::SYS_madvise,
    c::SYS_membarrier,
    c::SYS_mremap,
    c::SYS_munmap,
    c::SYS_nanosleep,
    c::SYS_poll,
    c::SYS_ppoll,
    c::SYS_restart_syscall,
    c::SYS_rseq,
    c::SYS_rt_sigaction,
    c::SYS_rt_sigprocmask,
    c::SYS_rt_sigreturn,
    c::SYS_sched_getaffinity,
    c::SYS_sched_yield,
    c::SYS_set_robust_list,
    c::SYS_sigaltstack,
    c::SYS_write,
    c::SYS_writev,
];

/// What reads and writes files that are open.
const FILES: &[c::c_long] = &[
    c::SYS_fadvise64,
    c::SYS_fallocate,
    c::SYS_fcntl,
    c::SYS_fdatasync,
    c::SYS_fstat,
    c::SYS_fstatfs,
    c::SYS_fsync,
    c::SYS_ftruncate,
    c::SYS_lseek,
    c::SYS_newfstatat,
    c::SYS_pread64,
    c::SYS_preadv,
    c::SYS_preadv2,
    c::SYS_pwrite64,
    c::SYS_pwritev,
    c::SYS_pwritev2,
    c::SYS_read,
    c::SYS_readv,
    c::SYS_statx,
    c::SYS_sync_file_range,
];

/// What opens files, waits for events and speaks with other processes. Which files, Landlock says.
const CONTROL: &[c::c_long] = &[
    c::SYS_accept4,
    c::SYS_access,
    c::SYS_bind,
    c::SYS_chmod,
    c::SYS_connect,
    c::SYS_copy_file_range,
    c::SYS_dup,
    c::SYS_dup2,
    c::SYS_dup3,
    c::SYS_epoll_create1,
    c::SYS_epoll_ctl,
    c::SYS_epoll_pwait,
    c::SYS_epoll_wait,
    c::SYS_eventfd2,
    c::SYS_faccessat,
    c::SYS_faccessat2,
    c::SYS_fchmod,
    c::SYS_fchmodat,
    c::SYS_fchown,
    c::SYS_flock,
    c::SYS_getcwd,
    c::SYS_getdents64,
    c::SYS_getegid,
    c::SYS_geteuid,
    c::SYS_getgid,
    c::SYS_getpeername,
    c::SYS_getppid,
    c::SYS_getrlimit,
    c::SYS_getrusage,
    c::SYS_getsockname,
    c::SYS_getsockopt,
    c::SYS_getuid,
    c::SYS_link,
    c::SYS_linkat,
    c::SYS_listen,
    c::SYS_lstat,
    c::SYS_memfd_create,
    c::SYS_open,
    c::SYS_openat,
    c::SYS_openat2,
    c::SYS_pipe2,
    c::SYS_readlink,
    c::SYS_readlinkat,
    c::SYS_recvfrom,
    c::SYS_recvmsg,
    c::SYS_rename,
    c::SYS_renameat,
    c::SYS_renameat2,
    c::SYS_seccomp,
    c::SYS_sendfile,
    c::SYS_sendmsg,
    c::SYS_setsockopt,
    c::SYS_shutdown,
    c::SYS_stat,
    c::SYS_statfs,
    c::SYS_sysinfo,
    c::SYS_umask,
    c::SYS_uname,
    c::SYS_unlink,
    c::SYS_unlinkat,
    c::SYS_utimensat,
];

const KVM_RUN: u64 = 0xAE80;
const KVM_GET_REGS: u64 = 0x8090_AE81;
/// The first byte but one says whose an `ioctl` is; this is KVM's.
const KVM: u64 = 0xAE00;
/// As [`KVM`], for block devices.
const BLOCK_DEVICE: u64 = 0x1200;
const WHOSE: u64 = 0xFF00;
/// Terminals as they are and shall be, flags of files. Nothing that puts keys into a terminal.
const CONTROL_IOCTLS: [u64; 8] =
    [c::TCGETS, c::TCSETS, c::TCSETSW, c::TCSETSF, c::TIOCGWINSZ, c::FIONBIO, 0x8008_6601, 0x4008_6602];

/// An argument must be this, where the mask has ones.
fn masked(argument: u8, mask: u64, value: u64) -> Option<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value & mask);
    SeccompRule::new(vec![condition.ok()?]).ok()
}

/// The lower half of an argument must be this: an `int`.
fn is(argument: u8, value: u64) -> Option<SeccompRule> {
    masked(argument, 0xFFFF_FFFF, value)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A rule that can't be made is not there, and its call refused.
fn allow(rules: &mut Rules, call: c::c_long, conditions: impl IntoIterator<Item = Option<SeccompRule>>) {
    let conditions: Vec<_> = conditions.into_iter().flatten().collect();
    // A call without conditions would be allowed as it comes.
    if !conditions.is_empty() {
        rules.insert(call, conditions);
    }
}

/// What may be called, by the kind of thread. `memory` is the descriptor that a refusal is read from.
fn rules(kind: Kind, memory: RawFd) -> Rules {
    let mut rules: Rules = COMMON.iter().map(|call| (*call, Vec::new())).collect();
    let process = u64::from(std::process::id());
    // Threads of this process and nothing else; no memory that holds code; no signal for others.
    allow(&mut rules, c::SYS_tgkill, [is(0, process)]);
    let no_code = || [masked(2, c::PROT_EXEC as u64, 0)];
    allow(&mut rules, c::SYS_mmap, no_code());
    allow(&mut rules, c::SYS_mprotect, no_code());
    // To a peer that is connected already.
    allow(&mut rules, c::SYS_sendto, [masked(4, u64::MAX, 0)]);
    if kind == Kind::Vcpu {
        allow(&mut rules, c::SYS_ioctl, [is(1, KVM_RUN), is(1, KVM_GET_REGS)]);
        allow(&mut rules, c::SYS_pread64, [is(0, memory as u64)]);
        return rules;
    }
    rules.extend(FILES.iter().map(|call| (*call, Vec::new())));
    allow(&mut rules, c::SYS_prctl, [is(0, c::PR_SET_NAME as u64)]);
    if kind == Kind::Disk {
        allow(&mut rules, c::SYS_ioctl, [masked(1, WHOSE, BLOCK_DEVICE)]);
        return rules;
    }
    rules.extend(CONTROL.iter().map(|call| (*call, Vec::new())));
    let named = CONTROL_IOCTLS.iter().map(|number| is(1, *number));
    allow(&mut rules, c::SYS_ioctl, named.chain([masked(1, WHOSE, KVM), masked(1, WHOSE, BLOCK_DEVICE)]));
    allow(&mut rules, c::SYS_prctl, [is(0, c::PR_SET_NAME as u64), is(0, c::PR_SET_NO_NEW_PRIVS as u64)]);
    allow(&mut rules, c::SYS_prlimit64, [is(0, 0)]);
    for call in [c::SYS_socket, c::SYS_socketpair] {
        allow(&mut rules, call, [is(0, c::AF_UNIX as u64)]);
    }
    rules
}

/// Calls that fail with an error instead of ending the process: libraries try them and can do without, or make them with
/// signals blocked, so that the refusal could not be told.
fn failing(kind: Kind) -> Vec<(Rules, i32)> {
    let any = |calls: &[c::c_long]| calls.iter().map(|call| (*call, Vec::new())).collect::<Rules>();
    // Its arguments are in memory, where a filter can't look; the older call is tried then.
    let mut failing = vec![(any(&[c::SYS_clone3]), c::ENOSYS)];
    if kind != Kind::Control {
        failing.push((any(&[c::SYS_open, c::SYS_openat, c::SYS_openat2]), c::EACCES));
    }
    let mut clone = any(&[c::SYS_clone]);
    if kind != Kind::Vcpu {
        // Threads may be: a disk has one that flushes, which is started when it is first written to.
        allow(&mut clone, c::SYS_clone, [masked(0, c::CLONE_THREAD as u64, 0)]);
    }
    failing.push((clone, c::EPERM));
    failing
}

/// The programs that the kernel runs before each call. The strictest of their answers counts.
pub fn filters(kind: Kind, memory: RawFd) -> io::Result<Vec<BpfProgram>> {
    let compile = |rules, otherwise, matched| {
        let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64).map_err(io::Error::other)?;
        BpfProgram::try_from(filter).map_err(io::Error::other)
    };
    let mut allowed = rules(kind, memory);
    let mut programs = Vec::new();
    for (rules, error) in failing(kind) {
        // To fail it must not be refused.
        allowed.extend(rules.keys().map(|call| (*call, Vec::new())));
        programs.push(compile(rules, SeccompAction::Allow, SeccompAction::Errno(error as u32))?);
    }
    programs.push(compile(allowed, SeccompAction::Trap, SeccompAction::Allow)?);
    Ok(programs)
}
