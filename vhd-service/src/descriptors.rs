//! How many descriptors this process may have: files, sockets and pipes.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors of a process of which it can't be seen how many it has.
const UNSEEN: usize = 64;

/// Raises the limit to the most that this user may have, which is more than most programs are given.
pub fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!("the number of open files stays limited as it is: {error}");
    }
}

/// The limit.
#[must_use]
pub fn limit() -> usize {
    // Where there is none that is known, some thousand will do.
    let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(4096, |(soft, _)| soft);
    usize::try_from(soft).unwrap_or(usize::MAX)
}

/// How many more this process may have.
#[must_use]
pub fn left() -> usize {
    // One is that of the listing itself.
    let used = std::fs::read_dir("/proc/self/fd").map_or(UNSEEN, |open| open.count() - 1);
    limit().saturating_sub(used)
}
