//! Goal: counters tell what a disk was asked for, to Prometheus.
//!
//! Method: a real image, counted; the text is fetched over HTTP as a scraper does.
//! It would fail if requests were not counted, or a disk that is gone were still told of.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use vhd_core::block::ZeroMode;
use vhd_core::chain::ChainOptions;
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, OpenOptions, create_file};
use vhd_core::{Disk, ErrorKind};
use vhd_service::metrics::{Metrics, address};

fn get(address: SocketAddr, request: &str) -> String {
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// Who holds connections and asks nothing, or little by little, keeps nobody from an answer.
#[test]
fn idle_and_slow_clients_hold_up_no_scraper() {
    let at = Metrics::default().serve(address("127.0.0.1:0").unwrap()).unwrap();
    let began = Instant::now();
    let mut idle: Vec<_> = (0..100).map(|_| TcpStream::connect(at).unwrap()).collect();
    idle.iter_mut().for_each(|client| drop(client.write_all(b"GET /metr")));
    for _ in 0..20 {
        assert!(get(at, "GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 OK"));
        idle.push(TcpStream::connect(at).unwrap());
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // A byte now and then does not keep a place.
    let mut slow = TcpStream::connect(at).unwrap();
    let ended = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        slow.write_all(b"x").is_err()
    });
    assert!(ended, "a request may take 5 s");
}

#[test]
fn what_a_disk_was_asked_for_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    let create = CreateOptions {
        kind: NewKind::Dynamic,
        size: 8 << 20,
        block_size: 2 << 20,
        uuid: [1; 16],
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp(0),
    };
    create_file(&path, &create, false).unwrap();
    let image = OpenOptions { writable: true, ..OpenOptions::default() };
    let disk = Disk::open(&path, &ChainOptions { image, ..ChainOptions::default() }).unwrap();
    let metrics = Metrics::default();
    let counted = metrics.watch("disk", &disk);
    counted.write_at(&[1; 4096], 0).unwrap();
    counted.write_at(&[1; 4096], 8192).unwrap();
    counted.flush().unwrap();
    counted.zero(0..512, ZeroMode::Free).unwrap();
    let mut read = [0; 100];
    counted.read_at(&mut read, 512).unwrap();
    assert_eq!(counted.read_at(&mut read, 8 << 20).unwrap_err().kind(), ErrorKind::OutOfRange);
    let at = metrics.serve(address("127.0.0.1:0").unwrap()).unwrap();
    let text = get(at, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    for line in [
        "vhd_requests_total{disk=\"disk\",kind=\"write\"} 2",
        "vhd_moved_bytes_total{disk=\"disk\",kind=\"write\"} 8192",
        "vhd_moved_bytes_total{disk=\"disk\",kind=\"read\"} 100",
        "vhd_moved_bytes_total{disk=\"disk\",kind=\"zero\"} 512",
        "vhd_errors_total{disk=\"disk\",kind=\"read\"} 1",
        "vhd_requests_total{disk=\"disk\",kind=\"flush\"} 1",
        "vhd_latency_seconds_count{disk=\"disk\",kind=\"read\"} 1",
        "vhd_size_bytes{disk=\"disk\"} 8388608",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
    }
    // The first is timed, and one in eight of those that follow.
    (0..8000).for_each(|_| counted.read_at(&mut read, 512).unwrap());
    let text = get(at, "GET /metrics HTTP/1.1\r\n\r\n");
    let value = |line: &str| -> u64 { text.lines().find_map(|found| found.strip_prefix(line)).unwrap().trim().parse().unwrap() };
    assert_eq!(value("vhd_requests_total{disk=\"disk\",kind=\"read\"}"), 8002);
    let timed = value("vhd_latency_seconds_count{disk=\"disk\",kind=\"read\"}");
    assert!((900..1100).contains(&timed), "{timed}");
    assert!(text.contains("vhd_allocated_bytes{disk=\"disk\"} ") && text.contains("vhd_volume_free_bytes{disk=\"disk\"} "));
    assert!(get(at, "GET /else HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    metrics.forget("disk");
    assert!(!metrics.to_text().contains("\"disk\""), "a disk that is gone is told of");
    assert_eq!(address("nowhere").unwrap_err().kind(), ErrorKind::InvalidInput);
}
