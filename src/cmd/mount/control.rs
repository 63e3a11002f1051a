//! What `vhd ctl` may ask a mount for.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use uuid::Uuid;
use vhd_core::chain::ChildOptions;
use vhd_core::{Disk, Error, ErrorKind, LiveDisk, Result};
use vhd_service::control::{Control, EXTENSION, Handler, Request};
use vhd_service::events::{Event, Events};
use vhd_service::metrics::Metrics;
use vhd_service::runtime;
use vhd_service::space::Watch;

use crate::cmd::service::{name_of, watch};

/// Events that are remembered: a process in the background has nobody to tell.
const EVENTS: usize = 32;

/// A mount's socket, counters and watch over free space; they end when this is dropped.
pub struct Service {
    _control: Option<Control>,
    pub socket: Option<PathBuf>,
}

struct Admin {
    name: String,
    live: LiveDisk,
    target: PathBuf,
    read_only: bool,
    metrics: Metrics,
    events: Events,
    told: Mutex<VecDeque<Event>>,
    inbox: Mutex<std::sync::mpsc::Receiver<Event>>,
    _watch: Watch,
}

/// Counts what is asked of the disk from now on. Returns the disk to use in its place, and the counters.
pub fn counted(live: &LiveDisk) -> (Disk, Metrics) {
    let metrics = Metrics::default();
    (metrics.watch(&name_of(&live.leaf()), &live.disk()), metrics)
}

/// Listens for commands. A mount without a socket, where there can be none, is a mount still.
pub fn start(live: &LiveDisk, metrics: Metrics, target: &Path, read_only: bool, low_space: u64) -> Result<Service> {
    let events = Events::default();
    let inbox = Mutex::new(events.subscribe());
    let image = live.leaf();
    let watch = watch(low_space, &events)?;
    if !read_only {
        watch.add(&live.disk());
    }
    let (name, target) = (name_of(&image), target.to_owned());
    let told = Mutex::default();
    let admin = Admin { name, live: live.clone(), target, read_only, metrics, events, told, inbox, _watch: watch };
    let bound = runtime::folder()
        .map(|folder| folder.join(format!("mount-{}.{EXTENSION}", std::process::id())))
        .and_then(|path| Control::bind(&path, Arc::new(admin)));
    match bound {
        Ok(control) => Ok(Service { socket: Some(control.path().to_owned()), _control: Some(control) }),
        Err(error) => {
            tracing::warn!("vhd ctl can't reach this mount: {error}");
            Ok(Service { socket: None, _control: None })
        }
    }
}

impl Handler for Admin {
    fn handle(&self, request: &Request) -> Result<Value> {
        match request.command.as_str() {
            "list" => Ok(self.list()),
            "snapshot" => self.snapshot(request),
            "metrics" => Ok(self.metrics.to_text().into()),
            "refresh" => {
                let message = "the size of a mount stays while it is mounted, as whoever has it open relies on it; unmount, resize \
                               the image, then mount it again";
                Err(Error::new(ErrorKind::Unsupported, message).at(&self.live.leaf()))
            }
            _ => Err(request.unknown(&["list", "snapshot", "metrics"])),
        }
    }
}

impl Admin {
    fn list(&self) -> Value {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.extend(self.inbox.lock().unwrap_or_else(PoisonError::into_inner).try_iter());
        while told.len() > EVENTS {
            told.pop_front();
        }
        let disk = self.live.disk();
        let export = json!({
            "name": self.name,
            "image": self.live.leaf().to_string_lossy(),
            "target": self.target.to_string_lossy(),
            "size": disk.capabilities().size,
            "read_only": self.read_only,
            "clients": 0,
        });
        json!({ "exports": [export], "clients": [], "events": *told })
    }

    fn snapshot(&self, request: &Request) -> Result<Value> {
        let name = request.text("name")?;
        if name != self.name {
            let message = format!("no disk of the name {name:?} is mounted here, only {:?}", self.name);
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let path = PathBuf::from(request.text("path")?);
        let created = self.live.snapshot(&path, &ChildOptions::new(Uuid::new_v4().into_bytes()))?;
        let before = self.live.disk().layer_path(1).unwrap_or_default();
        self.events.note("snapshot", &self.name, format!("{} is written from now on", path.display()));
        Ok(json!({
            "image": path.to_string_lossy(),
            "parent": before.to_string_lossy(),
            "notes": created.notes,
        }))
    }
}
