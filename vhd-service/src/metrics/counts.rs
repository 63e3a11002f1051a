//! What disks were asked for, counted without threads getting in each other's way.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use vhd_core::Disk;
use vhd_core::sharded::Sharded;

/// Where the buckets of latencies end: from what memory takes to what nobody waits for. The last has no end.
const BUCKETS: [Duration; 12] = [
    Duration::from_micros(5),
    Duration::from_micros(10),
    Duration::from_micros(25),
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_millis(2500),
];

/// What a request is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Zero,
}

const KINDS: [(Kind, &str); 4] = [(Kind::Read, "read"), (Kind::Write, "write"), (Kind::Flush, "flush"), (Kind::Zero, "zero")];

/// Counts of one kind of request.
#[derive(Clone, Debug, Default)]
struct Counts<Number> {
    requests: Number,
    /// Those that were timed, by how long they took.
    latency: [Number; BUCKETS.len() + 1],
    nanoseconds: Number,
    bytes: Number,
    errors: Number,
}

/// A disk, and what it was asked for.
#[derive(Debug)]
pub(super) struct Watched {
    parts: Sharded<[Counts<AtomicU64>; KINDS.len()]>,
}

impl Watched {
    /// The time before a request that is to be timed.
    ///
    /// To look at the clock twice takes longer than all else here, and where requests take microseconds one in eight of them says
    /// as much as all. Which ones they are has no period that a program's requests could have too.
    pub(super) fn begin(&self, kind: Kind) -> Option<Instant> {
        const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
        let number = self.parts.mine()[kind as usize].requests.load(Ordering::Relaxed);
        let is_timed = !matches!(kind, Kind::Read | Kind::Write) || number.wrapping_mul(GOLDEN) < u64::MAX / 8;
        is_timed.then(Instant::now)
    }

    /// Counts a request that `began` then, or was not timed.
    pub(super) fn count(&self, kind: Kind, bytes: u64, began: Option<Instant>, succeeded: bool) {
        let add = |number: &AtomicU64, more: u64| number.fetch_add(more, Ordering::Relaxed);
        let counts = &self.parts.mine()[kind as usize];
        add(&counts.requests, 1);
        if let Some(began) = began {
            let took = began.elapsed();
            let bucket = BUCKETS.iter().position(|end| took <= *end).unwrap_or(BUCKETS.len());
            add(&counts.latency[bucket], 1);
            add(&counts.nanoseconds, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
        if !succeeded {
            add(&counts.errors, 1);
        } else if bytes > 0 {
            add(&counts.bytes, bytes);
        }
    }

    fn sum(&self, kind: Kind) -> Counts<u64> {
        let mut sum = Counts::<u64>::default();
        for part in self.parts.iter() {
            let counts = &part[kind as usize];
            let pairs = sum.latency.iter_mut().zip(&counts.latency);
            let others = [
                (&mut sum.requests, &counts.requests),
                (&mut sum.nanoseconds, &counts.nanoseconds),
                (&mut sum.bytes, &counts.bytes),
            ];
            for (sum, number) in pairs.chain(others).chain([(&mut sum.errors, &counts.errors)]) {
                *sum = sum.wrapping_add(number.load(Ordering::Relaxed));
            }
        }
        sum
    }
}

/// All disks that are watched, by name.
#[derive(Default)]
pub(super) struct Requests(Mutex<BTreeMap<String, (Disk, Arc<Watched>)>>);

impl Requests {
    /// A disk under a name. When there was one of this name its counts go on.
    pub(super) fn watch(&self, name: &str, disk: &Disk) -> Arc<Watched> {
        let mut all = self.all();
        let watched = match all.get(name) {
            Some((_, watched)) => Arc::clone(watched),
            None => Arc::new(Watched { parts: Sharded::default() }),
        };
        all.insert(name.to_owned(), (disk.clone(), Arc::clone(&watched)));
        watched
    }

    pub(super) fn forget(&self, name: &str) {
        self.all().remove(name);
    }

    pub(super) fn disks(&self) -> Vec<(String, Disk)> {
        self.all().iter().map(|(name, (disk, _))| (name.clone(), disk.clone())).collect()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, (Disk, Arc<Watched>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.all().keys()).finish()
    }
}

type Tell = fn(&mut MetricEncoder<'_>, &Counts<u64>) -> fmt::Result;

impl Collector for Requests {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counter = MetricType::Counter;
        let families: [(&str, &str, Option<Unit>, MetricType, Tell); 4] = [
            ("requests", "Requests to a disk", None, counter, |to, counts| tell(to, counts.requests)),
            ("moved", "Bytes of reads, writes and zeroes", Some(Unit::Bytes), counter, |to, counts| tell(to, counts.bytes)),
            ("errors", "Requests that failed", None, counter, |to, counts| tell(to, counts.errors)),
            (
                "latency",
                "How long the disk took, of one in eight reads and writes and of all else",
                Some(Unit::Seconds),
                MetricType::Histogram,
                tell_latency,
            ),
        ];
        let all: Vec<_> = self.all().iter().map(|(name, (_, watched))| (name.clone(), Arc::clone(watched))).collect();
        for (name, help, unit, kind_of_metric, tell) in families {
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind_of_metric)?;
            for (disk, watched) in &all {
                for (kind, name) in KINDS {
                    let labels = [("disk", disk.as_str()), ("kind", name)];
                    tell(&mut family.encode_family(&labels)?, &watched.sum(kind))?;
                }
            }
        }
        Ok(())
    }
}

fn tell(to: &mut MetricEncoder<'_>, count: u64) -> fmt::Result {
    to.encode_counter::<NoLabelSet, _, f64>(&count, None)
}

fn tell_latency(to: &mut MetricEncoder<'_>, counts: &Counts<u64>) -> fmt::Result {
    let ends = BUCKETS.iter().map(Duration::as_secs_f64).chain([f64::MAX]);
    let buckets: Vec<(f64, u64)> = ends.zip(counts.latency).collect();
    let seconds = Duration::from_nanos(counts.nanoseconds).as_secs_f64();
    to.encode_histogram::<NoLabelSet>(seconds, counts.latency.iter().sum(), &buckets, None)
}
