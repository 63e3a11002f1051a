//! What disks were asked for, and how long it took, in the words of Prometheus.

use std::fmt::Write as _;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use vhd_core::block::{BlockDevice, Capabilities, Extent, Found, SharedBytes, Spliced, ZeroMode};
use vhd_core::storage::Room;
use vhd_core::{Disk, Error, ErrorKind, Result};

use self::counts::{Kind, Requests, Watched};
use crate::places::{Place, Places};

mod counts;

type Labels = Vec<(&'static str, String)>;

/// Bytes of a request for metrics at most.
const MAX_REQUEST: usize = 8 << 10;
/// How long who asks for metrics may take to ask, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Who may ask at once.
pub const MAX_CLIENTS: usize = 8;
/// How long to wait when no client can be taken, as where there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// Counters of all disks of a process. A cheap clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Mutex<Registry>,
    requests: Arc<Requests>,
    size: Family<Labels, Gauge>,
    allocated: Family<Labels, Gauge>,
    free: Family<Labels, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let inner = Inner {
            registry: Mutex::new(Registry::with_prefix("vhd")),
            requests: Arc::default(),
            size: Family::default(),
            allocated: Family::default(),
            free: Family::default(),
        };
        let mut registry = inner.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register_collector(Box::new(Arc::clone(&inner.requests)));
        registry.register_with_unit("size", "Size of the disk", Unit::Bytes, inner.size.clone());
        registry.register_with_unit("allocated", "What the leaf's file takes", Unit::Bytes, inner.allocated.clone());
        registry.register_with_unit("volume_free", "Room on the leaf's volume", Unit::Bytes, inner.free.clone());
        drop(registry);
        Self(Arc::new(inner))
    }
}

impl Metrics {
    /// A disk that counts what it is asked for, under this name.
    #[must_use]
    pub fn watch(&self, name: &str, disk: &Disk) -> Disk {
        let watched = self.0.requests.watch(name, disk);
        Disk::new(Counted { disk: disk.clone(), watched })
    }

    /// Forgets the disk of this name.
    pub fn forget(&self, name: &str) {
        self.0.requests.forget(name);
        let labels = vec![("disk", name.to_owned())];
        self.0.size.remove(&labels);
        self.0.allocated.remove(&labels);
        self.0.free.remove(&labels);
    }

    /// For counters of a service's own: they get the prefix `vhd`.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.0.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// All counters as text, in the format that Prometheus reads.
    #[must_use]
    pub fn to_text(&self) -> String {
        for (name, disk) in self.0.requests.disks() {
            self.look_at(&name, &disk);
        }
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.0.registry.lock().unwrap_or_else(PoisonError::into_inner));
        text
    }

    fn look_at(&self, name: &str, disk: &Disk) {
        let labels = vec![("disk", name.to_owned())];
        let set = |family: &Family<Labels, Gauge>, value: u64| {
            family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        // As it is now: a handle's own size is that of the moment when it was made.
        let now: &dyn BlockDevice = &**disk;
        set(&self.0.size, now.capabilities().size);
        if let Some(room) = now.room() {
            set(&self.0.allocated, room.allocated);
            set(&self.0.free, room.free);
        }
    }

    /// Answers `GET /metrics` over HTTP, until the process ends. Returns where: port 0 becomes a free one.
    ///
    /// # Errors
    /// As the address can't be listened on.
    pub fn serve(&self, address: SocketAddr) -> Result<SocketAddr> {
        let failed = |error| Error::io(error, format!("can't serve metrics on {address}"));
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let (metrics, places) = (self.clone(), Places::new(MAX_CLIENTS));
        let serving = move || {
            for client in listener.incoming() {
                let metrics = metrics.clone();
                let answer = move |place: &Place<TcpStream>| {
                    if let Err(error) = metrics.answer(place) {
                        tracing::debug!("metrics: {error}");
                    }
                };
                match client {
                    // Who gets no place sees the end of the connection, and comes again.
                    Ok(client) => drop(places.serve("vhd-scraper", client, answer)),
                    Err(error) => {
                        tracing::warn!("metrics: a client can't be taken: {error}");
                        thread::sleep(PAUSE);
                    }
                }
            }
        };
        thread::Builder::new().name("vhd-metrics".into()).spawn(serving).map_err(failed)?;
        Ok(bound)
    }

    /// One request, one answer, the end: those who scrape come every few seconds.
    fn answer(&self, place: &Place<TcpStream>) -> io::Result<()> {
        let mut client = Hasty { stream: place.stream(), until: Instant::now() + PATIENCE };
        let mut request = Vec::new();
        let mut part = [0; 1024];
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            let count = client.read(&mut part)?;
            if count == 0 || request.len() > MAX_REQUEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a request has no end"));
            }
            request.extend_from_slice(&part[..count]);
        }
        let (status, text) = match request.as_slice() {
            [b'G', b'E', b'T', b' ', b'/', rest @ ..] if rest.starts_with(b"metrics ") || rest.starts_with(b" ") => {
                ("200 OK", place.at_work(|| self.to_text()))
            }
            _ => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        };
        client.until = Instant::now() + PATIENCE;
        let mut answer = String::new();
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        let _ = write!(answer, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n", text.len());
        answer.push_str("Connection: close\r\n\r\n");
        client.write_all(answer.as_bytes())?;
        client.write_all(text.as_bytes())
    }
}

/// A connection that is over at a certain time, however busy its client is until then.
struct Hasty<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Hasty<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Hasty<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf)
    }
}

impl Write for Hasty<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk that counts.
struct Counted {
    disk: Disk,
    watched: Arc<Watched>,
}

impl Counted {
    fn time<T>(&self, kind: Kind, bytes: u64, request: impl FnOnce() -> Result<T>) -> Result<T> {
        let began = self.watched.begin(kind);
        let result = request();
        self.watched.count(kind, bytes, began, result.is_ok());
        result
    }
}

impl BlockDevice for Counted {
    fn capabilities(&self) -> Capabilities {
        let device: &dyn BlockDevice = &*self.disk;
        device.capabilities()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let bytes = bufs.iter().map(|buf| buf.len() as u64).sum();
        self.time(Kind::Read, bytes, || self.disk.read_vectored_at(bufs, offset))
    }

    fn find_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        let bytes = bufs.iter().map(|buf| buf.len() as u64).sum();
        let began = self.watched.begin(Kind::Read);
        let result = self.disk.find_vectored_at(bufs, offset, wait);
        // What was put off comes again.
        if !matches!(result, Ok(Found::NotNow)) {
            self.watched.count(Kind::Read, bytes, began, result.is_ok());
        }
        result
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.time(Kind::Read, to.len(), || self.disk.read_shared_at(to, offset))
    }

    fn write_shared_at(&self, from: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.time(Kind::Write, from.len(), || self.disk.write_shared_at(from, offset))
    }

    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        let bytes = range.end.saturating_sub(range.start);
        let began = self.watched.begin(Kind::Read);
        let result = self.disk.splice_at(pipe, range, wait);
        // What was not put there is read, or comes again.
        if matches!(result, Ok(Spliced::All)) {
            self.watched.count(Kind::Read, bytes, began, true);
        }
        result
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let bytes = bufs.iter().map(|buf| buf.len() as u64).sum();
        self.time(Kind::Write, bytes, || self.disk.write_vectored_at(bufs, offset))
    }

    fn flush(&self) -> Result<()> {
        self.time(Kind::Flush, 0, || self.disk.flush())
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        let bytes = range.end.saturating_sub(range.start);
        self.time(Kind::Zero, bytes, || self.disk.zero(range, mode))
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        self.disk.extents(range, visit)
    }

    fn layer_path(&self, depth: usize) -> Option<PathBuf> {
        self.disk.layer_path(depth)
    }

    fn room(&self) -> Option<Room> {
        self.disk.room()
    }

    fn close(&self) -> Result<()> {
        self.disk.close()
    }
}

/// The address that `--metrics` names: `HOST:PORT`.
///
/// # Errors
/// `InvalidInput` when it is none.
pub fn address(text: &str) -> Result<SocketAddr> {
    use std::net::ToSocketAddrs;
    let found = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("{text:?} is no address, expected HOST:PORT")))
}
