//! What a control socket asks of a running server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhd_core::chain::{ChainOptions, ChildOptions};
use vhd_core::{Error, ErrorKind, Result};
use vhd_service::control::{Handler, Request};
use vhd_service::events::Events;
use vhd_service::metrics::Metrics;
use vhd_service::space::Watch;

use super::Server;
use crate::client::Phase;
use crate::export::Export;

const COMMANDS: [&str; 6] = ["list", "add", "remove", "snapshot", "refresh", "metrics"];

/// Answers the control socket of a server.
pub struct Admin {
    /// The server.
    pub server: Arc<Server>,
    /// How exports are opened that are added.
    pub open: ChainOptions,
    /// Where exports are counted.
    pub metrics: Metrics,
    /// Where it is told what happened.
    pub events: Events,
    /// Watches the volumes of exports, where someone wants that.
    pub watch: Option<Watch>,
}

/// How long the clients of an export that is removed by force have to take their replies.
const GRACE: Duration = Duration::from_secs(5);
/// How long they have altogether.
const PATIENCE: Duration = Duration::from_secs(30);

impl Handler for Admin {
    fn handle(&self, request: &Request) -> Result<Value> {
        match request.command.as_str() {
            "list" => Ok(self.list()),
            "add" => self.add(request),
            "remove" => self.remove(request.text("name")?, request.flag("force")?),
            "snapshot" => self.snapshot(request),
            "refresh" => self.refresh(request),
            "metrics" => Ok(self.metrics.to_text().into()),
            _ => Err(request.unknown(&COMMANDS)),
        }
    }
}

impl Admin {
    /// Opens an image and serves it.
    ///
    /// # Errors
    /// As [`Export::open`]; `Exists` when the name is taken.
    pub fn add_export(&self, name: &str, image: &Path, options: &ChainOptions) -> Result<Arc<Export>> {
        // Before it is opened: its counters would be those of the other one.
        if let Some(other) = self.server.table().all().iter().find(|other| other.name() == name) {
            let message =
                format!("would be an export of the name {name:?} like {}: give one of them another", other.leaf().display());
            return Err(Error::new(ErrorKind::Exists, message).at(image));
        }
        let table = self.server.table();
        let export = Export::open(name, image, options, &self.metrics).map_err(|error| table.explain(image, error))?;
        table.add(Arc::clone(&export)).inspect_err(|_| self.metrics.forget(name))?;
        if let Some(watch) = &self.watch {
            watch.add(export.disk());
        }
        Ok(export)
    }

    fn list(&self) -> Value {
        let exports: Vec<_> = self.server.table().all().iter().map(|export| show(export)).collect();
        let clients = self.server.clients().all();
        let clients: Vec<_> = clients
            .iter()
            .map(|client| {
                json!({
                    "id": client.id,
                    "peer": client.from,
                    "export": client.export(),
                    "tls": client.is_encrypted(),
                    "requests": client.requests(),
                    "seconds": client.age().as_secs(),
                })
            })
            .collect();
        json!({ "exports": exports, "clients": clients })
    }

    fn add(&self, request: &Request) -> Result<Value> {
        let image = Path::new(request.text("image")?);
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let name = request.optional_text("name")?.unwrap_or(&stem);
        let mut options = self.open.clone();
        options.image.writable &= !request.flag("read_only")?;
        let export = self.add_export(name, image, &options)?;
        self.events.note("added", name, format!("serves {}", image.display()));
        Ok(show(&export))
    }

    fn get(&self, name: &str) -> Result<Arc<Export>> {
        let found = self.server.table().get(name);
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no export of the name {name:?}")))
    }

    fn remove(&self, name: &str, force: bool) -> Result<Value> {
        let export = self.get(name)?;
        let clients = export.clients();
        if clients > 0 && !force {
            let message = format!("the export {name:?} has {clients} clients; --force ends their sessions");
            return Err(Error::new(ErrorKind::Refused, message).at(&export.leaf()));
        }
        let Some(export) = self.server.table().remove(export.name()) else { return self.get(name).map(|_| Value::Null) };
        export.mark_removed();
        let began = Instant::now();
        while export.clients() > 0 {
            let phase = if began.elapsed() < GRACE { Phase::Ending } else { Phase::Ended };
            self.server.clients().end_of(export.name(), phase);
            if began.elapsed() > PATIENCE {
                let message = "a client's request does not end; the image stays open until it does";
                return Err(Error::new(ErrorKind::Io, message).at(&export.leaf()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let leaf = export.leaf();
        if let Some(watch) = &self.watch {
            watch.remove(export.disk());
        }
        self.metrics.forget(export.name());
        export.disk().close()?;
        self.events.note("removed", export.name(), format!("closed {}", leaf.display()));
        Ok(json!({ "name": export.name(), "image": leaf.to_string_lossy() }))
    }

    fn snapshot(&self, request: &Request) -> Result<Value> {
        let export = self.get(request.text("name")?)?;
        let path = Path::new(request.text("path")?);
        let options = ChildOptions::new(uuid::Uuid::new_v4().into_bytes());
        let created = export.snapshot(path, &options)?;
        let parent = export.disk().layer_path(1).unwrap_or_default();
        self.events.note("snapshot", export.name(), format!("{} is written now, over {}", path.display(), parent.display()));
        let mut shown = show(&export);
        shown["parent"] = parent.to_string_lossy().into();
        shown["notes"] = created.notes.into();
        Ok(shown)
    }

    fn refresh(&self, request: &Request) -> Result<Value> {
        let export = self.get(request.text("name")?)?;
        let size = request.arguments.get("size").and_then(Value::as_u64);
        if size.is_some() && export.is_read_only() {
            // Replies that wait for their clients are pages of the file: nothing in it may move.
            let message =
                "is served read-only, so it is not made larger; end the server and use vhd resize, or serve it to be written";
            return Err(Error::new(ErrorKind::ReadOnly, message).at(&export.leaf()));
        }
        export.refresh(size)?;
        let shown = show(&export);
        self.events.note("refreshed", export.name(), format!("{} bytes", export.info().size));
        Ok(shown)
    }
}

fn show(export: &Export) -> Value {
    let info = export.info();
    json!({
        "name": export.name(),
        "image": export.leaf().to_string_lossy(),
        "size": info.size,
        "read_only": export.is_read_only(),
        "images": info.ancestors.len() + 1,
        "clients": export.clients(),
    })
}
