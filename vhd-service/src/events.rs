//! What happened: told to the log, and to whoever asked.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// Events that wait for one subscriber at most.
pub const MAX_WAITING: usize = 1024;

/// Something that happened to a disk, a mount, an export or a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// What sort of thing, as a word with dashes: `low-space`, `snapshot`, `paused`.
    pub kind: &'static str,
    /// To what: an image, an export, a virtual machine.
    pub subject: String,
    /// One sentence for people.
    pub message: String,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} [{}]", self.subject, self.message, self.kind)
    }
}

/// Where events go. A cheap clone.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Mutex<Vec<SyncSender<Event>>>>);

impl Events {
    /// Tells an event that someone should look at.
    pub fn warn(&self, kind: &'static str, subject: impl Into<String>, message: impl Into<String>) {
        let event = Event { kind, subject: subject.into(), message: message.into() };
        tracing::warn!("{event}");
        self.send(&event);
    }

    /// Tells an event that is in order.
    pub fn note(&self, kind: &'static str, subject: impl Into<String>, message: impl Into<String>) {
        let event = Event { kind, subject: subject.into(), message: message.into() };
        tracing::info!("{event}");
        self.send(&event);
    }

    /// All events from now on, in order, until the receiver is dropped. Who does not take them misses those that come when
    /// [`MAX_WAITING`] wait already: a guest, say, can make as many as it likes.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = sync_channel(MAX_WAITING);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }

    fn send(&self, event: &Event) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|sender| !matches!(sender.try_send(event.clone()), Err(TrySendError::Disconnected(_))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_nobody_takes_are_not_kept_without_end() {
        let events = Events::default();
        let slow = events.subscribe();
        for number in 0..MAX_WAITING + 7 {
            events.note("reset", number.to_string(), "again");
        }
        assert_eq!(slow.try_iter().map(|event| event.subject).last(), Some((MAX_WAITING - 1).to_string()));
        events.note("off", "the last", "it goes on");
        assert_eq!(slow.try_recv().unwrap().kind, "off");
    }

    #[test]
    fn each_subscriber_gets_each_event_once() {
        let events = Events::default();
        let (first, gone) = (events.subscribe(), events.subscribe());
        drop(gone);
        events.warn("low-space", "disk.vhd", "512 bytes are left");
        let second = events.subscribe();
        events.note("snapshot", "disk.vhd", "leaf.vhd is written now");
        assert_eq!(first.try_iter().map(|event| event.kind).collect::<Vec<_>>(), ["low-space", "snapshot"]);
        assert_eq!(
            second.try_iter().map(|event| event.to_string()).collect::<Vec<_>>(),
            ["disk.vhd: leaf.vhd is written now [snapshot]"]
        );
    }
}
