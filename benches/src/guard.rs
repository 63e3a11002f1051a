//! Hot functions, one at a time and so many times: their instructions and system calls are counted by
//! `benches/tests/hot.rs`, where no clock and no other load can blur them.

use std::hint::black_box;

use anyhow::{Result, bail};
use vhd_core::Disk;
use vhd_core::chain::{ChainOptions, ChildOptions, ParentPolicy, create_child};
use vhd_core::image::{Image, OpenOptions};
use vhd_core::layout::Layout;
use vhd_core::ops::copy::is_zero;
use vhd_core::storage::{AlignedBuffer, FileStorage};

use crate::case::files::{Random, new_dynamic, open, options};

const BLOCK: u64 = 2 << 20;
/// Bytes that hold data in the images that are read and overwritten.
const DATA: u64 = 8 << 20;

/// Does it. What is made for it is the same however often it is done.
pub fn run(name: &str, times: u64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("hot.vhd");
    let mut page = AlignedBuffer::new(4096);
    page.fill(7);
    match name {
        "read" | "overwrite" => {
            let disk = filled(&path)?;
            let mut random = Random(1);
            for _ in 0..times {
                let at = random.below(DATA / 4096) * 4096;
                if name == "read" { disk.read_at(&mut page, at)? } else { disk.write_at(&page, at)? }
            }
        }
        "read-through-layers" => {
            drop(filled(&path)?);
            // valgrind does not know the call that keeps parents in the folder.
            let any = ParentPolicy { any_parent: true, ..ParentPolicy::default() };
            let options = |writable| ChainOptions { parents: any.clone(), ..options(writable) };
            let mut leaf = path;
            for layer in 2..9 {
                let child = folder.path().join(format!("{layer}.vhd"));
                create_child(&child, &leaf, &ChildOptions::new([layer; 16]), &options(false))?;
                leaf = child;
            }
            let disk = Disk::open(&leaf, &options(true))?;
            let mut random = Random(1);
            // What is below is remembered from the second look on.
            for at in (0..2 * DATA).step_by(4096) {
                disk.read_at(&mut page, at % DATA)?;
            }
            for _ in 0..times {
                disk.read_at(&mut page, random.below(DATA / 4096) * 4096)?;
            }
        }
        "allocate" => {
            new_dynamic(&path, 64 << 30, 1)?;
            let disk = open(&path, true)?;
            for n in 0..times {
                disk.write_at(&page, n * BLOCK)?;
            }
        }
        "layout" => {
            let layout = Layout::new(2040 << 30, BLOCK as u32);
            let mut random = Random(1);
            for _ in 0..times {
                let at = random.below(layout.size() - 4096);
                black_box(layout.parts(at..at + 4096).map(|part| part.sectors().end).sum::<u64>());
            }
        }
        "zero-detection" => {
            let zeros = AlignedBuffer::new(64 << 10);
            (0..times).for_each(|_| assert!(is_zero(black_box(&zeros))));
        }
        "bat-scan" => {
            new_dynamic(&path, 256 << 30, 1)?;
            let storage = std::sync::Arc::new(FileStorage::open(&path, false)?);
            let image = Image::open(storage, &path, &OpenOptions::default())?;
            for _ in 0..times {
                assert_eq!(image.count_allocated()?, 0);
            }
        }
        _ => bail!("nothing is called {name}"),
    }
    Ok(())
}

fn filled(path: &std::path::Path) -> Result<Disk> {
    new_dynamic(path, 1 << 30, 1)?;
    let disk = open(path, true)?;
    disk.write_at(&vec![9; DATA as usize], 0)?;
    Ok(disk)
}
