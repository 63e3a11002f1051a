//! `vhd bench` measures an image and leaves it alone.

use std::fs;

use crate::support::{done, expect, json, noise, refused, vhd_fed};

#[test]
fn bench_reads_and_does_not_write() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 64M");
    expect(vhd_fed(dir, "write base.vhd --offset 5M", &noise(1, 3 << 20)), 0, "write");
    done(dir, "create leaf.vhd --parent base.vhd");
    expect(vhd_fed(dir, "write leaf.vhd --offset 6M", &noise(2, 5000)), 0, "write");
    let before = (fs::read(dir.join("base.vhd")).unwrap(), fs::read(dir.join("leaf.vhd")).unwrap());
    let figures = json(dir, "bench leaf.vhd --seconds 1", 0);
    let figures = figures.as_array().unwrap();
    assert_eq!(figures.len(), 2);
    for figure in figures {
        assert!(["disk", "file", "ratio"].iter().all(|key| figure[key].as_f64().unwrap() > 0.0), "{figure}");
    }
    assert!((fs::read(dir.join("base.vhd")).unwrap(), fs::read(dir.join("leaf.vhd")).unwrap()) == before);
    done(dir, "create empty.vhd --size 64M");
    assert!(refused(dir, "bench empty.vhd").contains("too little to measure"));
}
