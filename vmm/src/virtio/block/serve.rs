//! Answers the requests of a queue.

use std::sync::atomic::Ordering;

use vhd_core::block::{SharedBytes, ZeroMode};
use vhd_core::{Error, ErrorKind};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::policy::{Policy, Stall};
use super::request::{Action, Request, Status, Unanswerable};
use super::{Block, SECTOR};
use crate::memory::{Memory, Outside};
use crate::virtio::block::config::MAX_SEGMENTS;

/// Whom a queue is served for.
pub trait QueueOwner {
    /// Whether to leave the rest of the requests for later; asked before each.
    fn stopped(&self) -> bool;
    /// Requests were answered, and the driver wants to know.
    fn used(&self);
}

/// How it stands with a queue.
#[derive(Debug)]
pub enum Served {
    /// Every request was answered, or it was told to stop.
    Answered,
    /// A request is kept for later: it was not taken from the queue.
    Stalled(Stall),
}

/// The driver broke the rules of the queue in a way that can't be answered: the device fails until it is reset.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

impl From<virtio_queue::Error> for Broken {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<Unanswerable> for Broken {
    fn from(error: Unanswerable) -> Self {
        Self(error.to_string())
    }
}

impl Block {
    /// Takes the features that the driver agreed to.
    pub fn set_features(&self, features: u64) {
        self.write_through.store(features & 1 << VIRTIO_BLK_F_FLUSH == 0, Ordering::Relaxed);
    }

    /// Answers the requests that are there, in order, and those that come meanwhile.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn serve(&self, memory: &Memory, queue: &mut Queue, owner: &dyn QueueOwner) -> Result<Served, Broken> {
        let mapped = memory.as_mapped();
        if !queue.is_valid(mapped) {
            return Err(Broken("a queue is not in memory".into()));
        }
        loop {
            // With notifications off, the driver is spared one for each request.
            queue.disable_notification(mapped)?;
            while !owner.stopped() {
                // An index that is too far ahead is an error here, and none to be read as an empty queue.
                let Some(mut chain) = queue.iter(mapped)?.next() else { break };
                let head = chain.head_index();
                let mut descriptors = Vec::with_capacity(4);
                // What is too long is refused; it need not be read to its end.
                descriptors.extend(chain.by_ref().take(MAX_SEGMENTS as usize + 3));
                let whole = descriptors.last().is_some_and(|last| !last.has_next());
                let request = Request::parse(memory, &descriptors, whole)?;
                match self.answer(memory, &request) {
                    Ok(written) => queue.add_used(mapped, head, written)?,
                    Err(stall) => {
                        queue.go_to_previous_position();
                        return Ok(Served::Stalled(stall));
                    }
                }
                if queue.needs_notification(mapped)? {
                    owner.used();
                }
            }
            if !queue.enable_notification(mapped)? || owner.stopped() {
                return Ok(Served::Answered);
            }
        }
    }

    /// Does a request and writes its status. Returns how many bytes of the guest's memory were written.
    fn answer(&self, memory: &Memory, request: &Request) -> Result<u32, Stall> {
        let mut written = 0;
        let status = match self.perform(memory, request) {
            Ok(()) => {
                if matches!(request.action, Action::Read(_) | Action::GetId) {
                    written = request.data.iter().map(|segment| segment.len).sum();
                }
                Status::Ok
            }
            Err(Failure::Answer(status)) => status,
            Err(Failure::Host(error)) if self.policies.of(&error) == Policy::Pause => return Err(Stall(error)),
            Err(Failure::Host(error)) => {
                tracing::debug!("a guest's request failed: {error}");
                Status::IoError
            }
        };
        // It was there when the request was read, and memory does not go away.
        let _ = memory.write(request.status, &[status as u8]);
        Ok(written + 1)
    }

    fn perform(&self, memory: &Memory, request: &Request) -> Result<(), Failure> {
        match &request.action {
            Action::Refuse(status) => return Err(Failure::Answer(*status)),
            Action::Read(offset) => self.disk.read_shared_at(&memory.run_of(&request.data)?, *offset)?,
            Action::Write(offset) => {
                self.refuse_read_only()?;
                self.disk.write_shared_at(&memory.run_of(&request.data)?, *offset)?;
                self.write_through()?;
            }
            Action::Flush => self.disk.flush()?,
            Action::Zero(ranges) => {
                self.refuse_read_only()?;
                if ranges.iter().any(|(range, _)| range.end > self.disk.size()) {
                    return Err(Failure::Answer(Status::IoError));
                }
                for (range, free) in ranges {
                    self.disk.zero(range.clone(), if *free { ZeroMode::Free } else { ZeroMode::Keep })?;
                }
                self.write_through()?;
            }
            Action::GetId => {
                let (to, id) = (memory.run_of(&request.data)?, &self.serial);
                let failed = |_| Failure::Answer(Status::IoError);
                to.put(0, id).and_then(|()| to.put_zeros(id.len() as u64..to.len())).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn refuse_read_only(&self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Answer(Status::IoError)) } else { Ok(()) }
    }

    fn write_through(&self) -> Result<(), Failure> {
        if self.write_through.load(Ordering::Relaxed) {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.disk.size() / SECTOR
    }
}

/// Why a request was not done.
enum Failure {
    /// The guest's fault.
    Answer(Status),
    /// The host's.
    Host(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if error.kind() == ErrorKind::OutOfRange { Self::Answer(Status::IoError) } else { Self::Host(error) }
    }
}

impl From<Outside> for Failure {
    fn from(_: Outside) -> Self {
        Self::Answer(Status::IoError)
    }
}
