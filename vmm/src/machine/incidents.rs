//! What happens to a machine by itself: the guest turns it off, fails, or a disk can't go on.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use vhd_core::{Error, ErrorKind};
use vhd_service::space::{Change, Watch};

use super::{Inner, Reason, Shared, State};
use crate::devices::Request;
use crate::life::Incident;
use crate::virtio::block::Stall;

/// How often a full volume is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// Bytes that must have become free before a request is tried again.
const WORTH_A_TRY: u64 = 1 << 20;

/// Listens from a thread of its own, until the machine is gone.
pub fn listen(shared: &Arc<Shared>, incidents: Receiver<(u64, Incident)>) -> Result<JoinHandle<()>, Error> {
    let weak = Arc::downgrade(shared);
    let thread = std::thread::Builder::new().name("machine".into());
    let listening = move || {
        loop {
            let incident = incidents.recv_timeout(LOOK_EVERY);
            let Some(shared) = Weak::upgrade(&weak) else { return };
            match incident {
                Ok((_, Incident::Over)) => return,
                Ok((life, incident)) => shared.happened(life, incident),
                Err(RecvTimeoutError::Timeout) => shared.look_for_space(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    };
    thread.spawn(listening).map_err(|error| Error::io(error, "a machine can't be listened to"))
}

/// Watches the volumes of the disks: warns, and pauses before they are full.
pub fn watch_space(shared: &Arc<Shared>) -> Result<Vec<Watch>, Error> {
    let low = shared.definition.low_space;
    let (warn, pause) = (Arc::downgrade(shared), Arc::downgrade(shared));
    let warnings = Watch::start(low, move |path, change, space| {
        if let (Change::Low, Some(shared)) = (change, warn.upgrade()) {
            let message = format!("{}: {} bytes are free on its volume, fewer than {low}", path.display(), space.free);
            shared.events.warn("low-space", &shared.definition.name, message);
        }
    })?;
    let pauses = Watch::start(low / 4, move |path, change, space| {
        let Some(shared) = pause.upgrade() else { return };
        let mut inner = shared.lock();
        match (change, &inner.state) {
            (Change::Low, State::Running) => {
                let found = format!("{}: {} bytes are free on its volume", path.display(), space.free);
                shared.pause(&mut inner, Reason::NoSpace(found));
            }
            // A request that did not fit is tried by whoever keeps it.
            (Change::Back, State::Paused(Reason::NoSpace(_))) if inner.full.is_none() => shared.resume(&mut inner),
            _ => {}
        }
    })?;
    for disk in &shared.definition.disks {
        warnings.add(&disk.live.disk());
        pauses.add(&disk.live.disk());
    }
    Ok(vec![warnings, pauses])
}

impl Shared {
    fn happened(&self, life: u64, incident: Incident) {
        let mut inner = self.lock();
        // An old life, or one that someone has ended meanwhile.
        if life != inner.lives || inner.life.is_none() {
            return;
        }
        match incident {
            Incident::Asked(Request::Off) => self.end(&mut inner),
            Incident::Asked(Request::Reset) => {
                if let Err(error) = self.begin(&mut inner, "reset") {
                    self.events.warn("off", &self.definition.name, format!("it can't be started again: {error}"));
                }
            }
            Incident::Fault(why) => {
                if let Some(life) = &inner.life {
                    life.pause();
                }
                self.events.warn("crash", &self.definition.name, format!("the guest can't go on: {why}"));
                self.set(&mut inner, State::Faulted(why));
            }
            Incident::Over => {}
            Incident::Stalled(disk, stall) => self.stalled(&mut inner, disk, &stall),
        }
    }

    fn stalled(&self, inner: &mut Inner, disk: usize, Stall(error): &Stall) {
        // A second request that does not fit changes nothing.
        if inner.state != State::Running {
            return;
        }
        let reason = if error.kind() == ErrorKind::NoSpace {
            inner.full = Some((disk, self.free(disk).unwrap_or(0)));
            Reason::NoSpace(error.to_string())
        } else {
            Reason::Failure(error.to_string())
        };
        self.pause(inner, reason);
    }

    fn free(&self, disk: usize) -> Option<u64> {
        Some(self.definition.disks.get(disk)?.live.disk().room()?.free)
    }

    /// Goes on once there is room again where there was none.
    fn look_for_space(&self) {
        let mut inner = self.lock();
        let (State::Paused(Reason::NoSpace(_)), Some((disk, was))) = (&inner.state, inner.full) else { return };
        if self.free(disk).is_some_and(|free| free >= was + WORTH_A_TRY) {
            self.resume(&mut inner);
        }
    }
}
