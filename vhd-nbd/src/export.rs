//! Exports: disks under names.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::Semaphore;
use vhd_core::block::{BlockDevice, ZeroMode};
use vhd_core::chain::{Chain, ChainOptions, ChildOptions};
use vhd_core::image::Created;
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, Error, ErrorKind, LiveDisk, Result};
use vhd_service::metrics::Metrics;

use crate::codec::{MAX_EXTENTS, MAX_STRING, transmission_flag};
use crate::context::Context;
use crate::handshake::{Catalog, ExportInfo};
use crate::pace::Pace;
use crate::peer;

/// Bytes that CACHE reads at most: what comes after would push out what came before.
const CACHE_AT_MOST: u64 = 64 << 20;

/// Runs of a disk as a context sees them: lengths and states.
pub type Runs = Vec<(u64, u32)>;

/// A disk under a name.
#[derive(Debug)]
pub struct Export {
    name: String,
    live: LiveDisk,
    /// The same disk, counted.
    disk: Disk,
    read_only: bool,
    info: Mutex<ExportInfo>,
    /// How it answered so far.
    pub pace: Pace,
    /// What others go through, to the threads that work on the disk.
    pub gate: Arc<Semaphore>,
    clients: AtomicUsize,
    removed: AtomicBool,
}

impl Export {
    /// Serves an image under a name.
    ///
    /// # Errors
    /// `InvalidInput` when the name is none; as the image can't be opened.
    pub fn open(name: &str, image: &Path, options: &ChainOptions, metrics: &Metrics) -> Result<Arc<Self>> {
        if name.len() > MAX_STRING || name.contains(char::is_control) {
            let message =
                format!("{name:?} can't be an export's name: expected {MAX_STRING} bytes or less, no control characters");
            return Err(Error::new(ErrorKind::InvalidInput, message).at(image));
        }
        let live = LiveDisk::open(image, options)?;
        let disk = metrics.watch(name, &live.disk());
        let read_only = disk.capabilities().read_only;
        let info = Mutex::new(describe(name, &live, read_only)?);
        Ok(Arc::new(Self {
            name: name.to_owned(),
            live,
            disk,
            read_only,
            info,
            pace: Pace::default(),
            gate: peer::gate(),
            clients: AtomicUsize::new(0),
            removed: AtomicBool::new(false),
        }))
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// True when writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The file that is written to now.
    #[must_use]
    pub fn leaf(&self) -> PathBuf {
        self.live.leaf()
    }

    /// What clients are told.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        self.info.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connections that use it.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.load(Ordering::Relaxed)
    }

    /// One more client, until that is dropped. `None` when the export was removed.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Option<Visit> {
        // Counted first: who removes it looks at the count after marking it.
        self.clients.fetch_add(1, Ordering::SeqCst);
        let visit = Visit(Arc::clone(self));
        if self.removed.load(Ordering::SeqCst) { None } else { Some(visit) }
    }

    /// No client may come any more.
    pub fn mark_removed(&self) {
        self.removed.store(true, Ordering::SeqCst);
    }

    /// Puts a new leaf over the disk while clients go on.
    ///
    /// # Errors
    /// As [`LiveDisk::snapshot`].
    pub fn snapshot(&self, path: &Path, options: &ChildOptions) -> Result<Created> {
        let created = self.live.snapshot(path, options)?;
        self.describe_again()?;
        Ok(created)
    }

    /// Looks at the disk's files again, and then makes it so large where that is asked for; new clients see the size that it
    /// has then.
    ///
    /// # Errors
    /// As [`LiveDisk::refresh`] and [`LiveDisk::grow`].
    pub fn refresh(&self, size: Option<u64>) -> Result<()> {
        let refreshed = self.live.refresh().and_then(|()| size.map_or(Ok(()), |size| self.live.grow(size)));
        // Of what failed, a part may be done.
        refreshed.and(self.describe_again())
    }

    /// Refuses an image that both serve, where one of them writes it.
    fn refuse_shared(&self, other: &Self) -> Result<()> {
        let (own, others) = (self.live.identities()?, other.live.identities()?);
        let writes = |export: &Self, leaf: Option<&(u64, u64)>, of: &[(u64, u64)]| {
            !export.read_only && leaf.is_some_and(|leaf| of.contains(leaf))
        };
        if writes(self, own.first(), &others) || writes(other, others.first(), &own) {
            return Err(served_already(&self.leaf(), other));
        }
        Ok(())
    }

    fn describe_again(&self) -> Result<()> {
        let info = describe(&self.name, &self.live, self.read_only)?;
        *self.info.lock().unwrap_or_else(PoisonError::into_inner) = info;
        Ok(())
    }

    /// True when reads may be tried in the task that read their requests.
    #[must_use]
    pub fn reads_at_once(&self) -> bool {
        self.pace.is_fast() && !self.live.is_changing()
    }

    /// True when writes may be done in the task that read their requests.
    #[must_use]
    pub fn writes_at_once(&self) -> bool {
        self.pace.is_fast() && self.live.takes_writes_at_once()
    }

    /// True when the host makes any range zero without writing it.
    #[must_use]
    pub fn zeroes_fast(&self, keep: bool) -> bool {
        self.live.with_chain(|chain| Ok(chain.zeroes_fast(mode_of(keep)))).unwrap_or(false)
    }

    /// Makes a range zero.
    ///
    /// # Errors
    /// As the disk fails.
    pub fn zero(&self, range: Range<u64>, keep: bool) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.disk.zero(range, mode_of(keep))
    }

    /// Has the host read a range, so that the next to read it need not wait.
    ///
    /// # Errors
    /// As the disk fails.
    pub fn cache(&self, range: Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let mut at = range.start;
        let end = range.end.min(range.start.saturating_add(CACHE_AT_MOST));
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            self.disk.read_at(&mut buffer[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }

    /// What contexts say of a range: runs, neighbours alike made one, from its start on and as far as the limits allow.
    ///
    /// # Errors
    /// As the chain's metadata can't be read.
    pub fn status(&self, range: Range<u64>, contexts: &[&Context], one_extent: bool) -> Result<Vec<Runs>> {
        self.live.with_chain(|chain| status(chain, range, contexts, if one_extent { 1 } else { MAX_EXTENTS }))
    }
}

fn served_already(image: &Path, by: &Export) -> Error {
    let message = format!("is an image of the export {:?} already, and is not written by one while another has it", by.name);
    Error::new(ErrorKind::Locked, message).at(image)
}

fn mode_of(keep: bool) -> ZeroMode {
    if keep { ZeroMode::Keep } else { ZeroMode::Free }
}

/// A client of an export.
#[derive(Debug)]
pub struct Visit(Arc<Export>);

impl Visit {
    /// The export.
    #[must_use]
    pub fn export(&self) -> &Arc<Export> {
        &self.0
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::SeqCst);
    }
}

fn describe(name: &str, live: &LiveDisk, read_only: bool) -> Result<ExportInfo> {
    live.with_chain(|chain| {
        let layers = chain.layers();
        let file = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut description = format!("{}, {} bytes", file(layers[0].path()), chain.capabilities().size);
        if layers.len() > 1 {
            description.push_str(&format!(", {} images", layers.len()));
        }
        let mut flags = transmission_flag::HAS_FLAGS
            | transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::CAN_MULTI_CONN
            | transmission_flag::SEND_CACHE;
        if read_only {
            flags |= transmission_flag::READ_ONLY;
        } else {
            flags |= transmission_flag::SEND_TRIM | transmission_flag::SEND_WRITE_ZEROES | transmission_flag::SEND_FAST_ZERO;
        }
        // A context's name is a string of the protocol, which has no longer ones.
        let ancestors = layers[1..].iter().map(|layer| file(layer.path())).filter(|name| name.len() < MAX_STRING / 2);
        Ok(ExportInfo {
            name: name.to_owned(),
            description,
            size: chain.capabilities().size,
            flags,
            ancestors: ancestors.collect(),
        })
    })
}

/// What a dirty context compares with: the ancestor's depth, and where it, or a smaller image above it, ends.
fn ancestor(chain: &Chain, context: &Context) -> (usize, u64) {
    let Context::Dirty(name) = context else { return (0, u64::MAX) };
    let layers = chain.layers();
    let named = |path: &Path| path.file_name().is_some_and(|file| file.to_string_lossy() == **name);
    // One that is not there any more has nothing: all that is held changed since.
    match layers.iter().skip(1).position(|layer| named(layer.path())) {
        Some(above) => (above + 1, layers[..above + 2].iter().map(|layer| layer.size()).min().unwrap_or(0)),
        None => (usize::MAX, 0),
    }
}

fn status(chain: &Chain, range: Range<u64>, contexts: &[&Context], most: usize) -> Result<Vec<Runs>> {
    let ancestors: Vec<_> = contexts.iter().map(|context| ancestor(chain, context)).collect();
    let mut runs = vec![Runs::new(); contexts.len()];
    let push = |runs: &mut Runs, len: u64, state: u32| match runs.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.1 == state => last.0 += len,
        _ => runs.push((len, state)),
    };
    let mut full = false;
    let walked = chain.extents(range, &mut |extent| {
        for ((context, (depth, shown)), runs) in contexts.iter().zip(&ancestors).zip(&mut runs) {
            if runs.len() > most {
                continue;
            }
            let state = context.state(&extent, *depth);
            // What a smaller ancestor never had changed, whatever holds it.
            let split = (*shown).clamp(extent.range.start, extent.range.end);
            push(runs, split - extent.range.start, state);
            let beyond = if matches!(context, Context::Dirty(_)) { 1 } else { state };
            push(runs, extent.range.end - split, beyond);
        }
        full = runs.iter().all(|runs| runs.len() > most);
        // An error is the way to end a walk early.
        if full { Err(Error::new(ErrorKind::Cancelled, "enough")) } else { Ok(()) }
    });
    if !full {
        walked?;
    }
    runs.iter_mut().for_each(|runs| runs.truncate(most));
    Ok(runs)
}

/// The exports of a server, in order; the first is the default. A cheap clone.
#[derive(Clone, Debug, Default)]
pub struct Table {
    exports: Arc<RwLock<Vec<Arc<Export>>>>,
    /// Held by who adds one, so that two of one image are not added at once. Those who look for one don't wait for that.
    adding: Arc<Mutex<()>>,
}

impl Table {
    /// All.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Export>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One by its name; the empty name is the first.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        let exports = self.exports.read().unwrap_or_else(PoisonError::into_inner);
        let named = exports.iter().find(|export| export.name == name);
        named.or(exports.first().filter(|_| name.is_empty())).cloned()
    }

    /// One more.
    ///
    /// # Errors
    /// `Exists` when there is one of this name; `Locked` when there is one of an image that only one may have.
    pub fn add(&self, export: Arc<Export>) -> Result<()> {
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let others = self.all();
        if let Some(other) = others.iter().find(|other| other.name == export.name) {
            let message =
                format!("would be an export of the name {:?} like {}; name one of them", export.name, other.leaf().display());
            return Err(Error::new(ErrorKind::Exists, message).at(&export.leaf()));
        }
        others.iter().try_for_each(|other| export.refuse_shared(other))?;
        self.exports.write().unwrap_or_else(PoisonError::into_inner).push(export);
        Ok(())
    }

    /// Says which export it is that has an image open, for who may not have it.
    pub(crate) fn explain(&self, image: &Path, error: Error) -> Error {
        let path = error.path().unwrap_or(image).to_owned();
        let found = FileStorage::identity_at(&path).filter(|_| error.kind() == ErrorKind::Locked);
        let has =
            |export: &Arc<Export>| found.is_some_and(|found| export.live.identities().is_ok_and(|own| own.contains(&found)));
        self.all().iter().find(|export| has(export)).map_or(error, |export| served_already(&path, export))
    }

    /// Takes one out.
    #[must_use]
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        let at = exports.iter().position(|export| export.name == name)?;
        Some(exports.remove(at))
    }
}

impl Catalog for Table {
    fn list(&self) -> Vec<ExportInfo> {
        self.all().iter().map(|export| export.info()).collect()
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.get(name).map(|export| export.info())
    }
}
