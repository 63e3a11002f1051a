//! What is said when the kernel refuses a call.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Cursor, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use vmm_sys_util::signal::register_signal_handler;

/// Where the kernel puts the number of the call into what it tells of the signal (`si_syscall`).
const NUMBER_AT: u64 = 24;

/// This process's memory. What the kernel tells is read there as a file is, which needs no unsafe code.
static MEMORY: OnceLock<File> = OnceLock::new();

/// Has refused calls told from now on. Returns the descriptor from which the teller reads.
pub fn tell() -> io::Result<RawFd> {
    if let Some(memory) = MEMORY.get() {
        return Ok(memory.as_raw_fd());
    }
    let opened = File::open("/proc/self/mem")?;
    register_signal_handler(libc::SIGSYS, refused).map_err(io::Error::from)?;
    Ok(MEMORY.get_or_init(|| opened).as_raw_fd())
}

/// Says which thread was refused what, and ends the process: a call that was not made has no answer to go on with.
extern "C" fn refused(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    let mut number = [0; 4];
    let read = MEMORY.get().map(|memory| memory.read_exact_at(&mut number, info.addr() as u64 + NUMBER_AT));
    let number = if matches!(read, Some(Ok(()))) { i32::from_ne_bytes(number) } else { -1 };
    // In a signal handler nothing is allocated.
    let mut line = Cursor::new([0; 256]);
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("without a name");
    let _ = writeln!(
        line,
        "vhd: the sandbox refuses system call {number} to thread {thread:?}, and ends the machine; \
         if the guest is to be trusted, --no-sandbox runs it all the same"
    );
    let len = usize::try_from(line.position()).unwrap_or(0);
    let _ = io::stderr().write_all(&line.get_ref()[..len]);
    std::process::abort();
}
