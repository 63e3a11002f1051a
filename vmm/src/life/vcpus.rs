//! The threads of vCPUs, which run, stand still and end together.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::Devices;
use super::{Incident, Reporter};
use crate::kvm::{Exit, KvmError, Vcpu, VcpuState};
use crate::sandbox::{self, Kind};

/// How often vCPUs that are to stop are called again: a signal that comes before the guest is entered is lost.
const CALL_EVERY: Duration = Duration::from_millis(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Stand,
    End,
}

#[derive(Debug)]
struct Gate {
    state: Mutex<(Wanted, usize)>,
    changed: Condvar,
    /// Looked at before each entry, where a lock would cost.
    stop: AtomicBool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, (Wanted, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        let mut state = self.lock();
        // The end is for good.
        if state.0 == Wanted::End {
            return;
        }
        state.0 = wanted;
        self.stop.store(wanted != Wanted::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits where it is told to. False at the end.
    fn pass(&self) -> bool {
        if !self.stop.load(Ordering::SeqCst) {
            return true;
        }
        let mut state = self.lock();
        state.1 += 1;
        self.changed.notify_all();
        while state.0 == Wanted::Stand {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.1 -= 1;
        state.0 == Wanted::Run
    }
}

/// The threads. They end when this is dropped.
pub struct Vcpus {
    gate: Arc<Gate>,
    /// Each is its thread's while that runs; they are there for others while all stand still.
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Vec<JoinHandle<()>>,
}

extern "C" fn called(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// What ends a thread's stay in the guest; nobody else uses it.
fn call_signal() -> i32 {
    SIGRTMIN() + 3
}

impl Vcpus {
    /// Starts the threads; they stand still.
    pub fn start(vcpus: Vec<Vcpu>, devices: &Arc<Devices>, reporter: &Reporter, sandbox: bool) -> io::Result<Self> {
        register_signal_handler(call_signal(), called).map_err(io::Error::from)?;
        let gate = Gate { state: Mutex::new((Wanted::Stand, 0)), changed: Condvar::new(), stop: true.into() };
        let mut all = Self { gate: Arc::new(gate), vcpus: Vec::new(), threads: Vec::new() };
        for vcpu in vcpus {
            let (gate, devices, reporter) = (Arc::clone(&all.gate), Arc::clone(devices), reporter.clone());
            let thread = std::thread::Builder::new().name(format!("vcpu {}", vcpu.number()));
            let vcpu = Arc::new(Mutex::new(vcpu));
            all.vcpus.push(Arc::clone(&vcpu));
            all.threads.push(thread.spawn(move || {
                if sandbox && let Err(error) = sandbox::enter(Kind::Vcpu) {
                    return reporter.tell(Incident::Fault(format!("a vCPU has no sandbox: {error}")));
                }
                run(&vcpu, &gate, &devices, &reporter);
            })?);
        }
        Ok(all)
    }

    /// The states of all; they stand still.
    pub fn save(&self) -> Result<Vec<VcpuState>, KvmError> {
        self.vcpus.iter().map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner).save()).collect()
    }

    /// Lets them run.
    pub fn go(&self) {
        self.gate.want(Wanted::Run);
    }

    /// Makes them stand still, and waits until all do.
    pub fn park(&self) {
        self.gate.want(Wanted::Stand);
        let mut state = self.gate.lock();
        // A thread that has ended, by a mistake of ours, is not waited for.
        while state.1 < self.threads.iter().filter(|thread| !thread.is_finished()).count() {
            self.call();
            state = self.gate.changed.wait_timeout(state, CALL_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn call(&self) {
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            let _ = thread.kill(call_signal());
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.want(Wanted::End);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.call();
            std::thread::sleep(CALL_EVERY);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn run(vcpu: &Mutex<Vcpu>, gate: &Gate, devices: &Devices, reporter: &Reporter) {
    while gate.pass() {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        while !gate.stop.load(Ordering::SeqCst) {
            let incident = match vcpu.run(devices) {
                Ok(Exit::Nothing) => continue,
                Ok(Exit::Asked(request)) => Incident::Asked(request),
                Ok(Exit::Fault(why)) => Incident::Fault(why),
                Err(error) => Incident::Fault(error.to_string()),
            };
            // Whoever hears of it ends this life, or lets it go on; until then the guest does nothing more.
            gate.want(Wanted::Stand);
            reporter.tell(incident);
        }
        if let Err(error) = vcpu.settle() {
            tracing::warn!("{error}");
        }
    }
}
