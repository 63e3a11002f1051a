//! The traps that a first design of a VHD writer falls into, each by name. The random tests find them too; these say
//! what they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use vhd_core::ErrorKind;
use vhd_core::format::{BAT_UNUSED, Footer};
use vhd_core::image::OpenOptions;
use vhd_core::storage::{MemoryStorage, Storage};
use vhd_testkit::crash::{Effort, crash_states};
use vhd_testkit::fault::{Fault, FaultStorage, Plan};
use vhd_testkit::fixture::{Bits, BlockFill, Fill, FixtureSpec, Kind, Layout as FixtureLayout};
use vhd_testkit::record::{Journal, RecordingStorage};

use vhd_testkit::judge::{Depth, judge_run};
use vhd_testkit::session::{BLOCK, setups};
use vhd_testkit::session::{Setup, Step, open, read_all, run, sector, writable};

/// Where the BAT of the images of this test is, and its entries in a file.
fn entries(image: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let header = u64::from_be_bytes(image[16..24].try_into().unwrap()) as usize;
    let bat = u64::from_be_bytes(image[header + 16..header + 24].try_into().unwrap()) as usize;
    let count = u32::from_be_bytes(image[header + 28..header + 32].try_into().unwrap()) as usize;
    image[bat..bat + count * 4].chunks(4).map(|entry| u32::from_be_bytes(entry.try_into().unwrap()))
}

fn setup(name: &str) -> Setup {
    setups().into_iter().find(|setup| setup.name == name).unwrap()
}

#[test]
fn a_bat_entry_is_not_durable_before_the_files_length() {
    for name in ["dynamic", "differencing"] {
        let setup = setup(name);
        let script = [Step::Write { lba: 0, count: 30 }, Step::Flush, Step::Write { lba: 50, count: 20 }, Step::Flush];
        let run = run(&setup, &script, &Journal::new(), 1);
        crash_states(std::slice::from_ref(&setup.image), &run.events, Effort::default(), &mut |state| {
            let image = &state.files[0];
            let end = |entry: u32| u64::from(entry) * 512 + 512 + BLOCK * 512;
            match entries(image).filter(|entry| *entry != BAT_UNUSED).find(|entry| end(*entry) > image.len() as u64) {
                Some(entry) => Err(format!("entry {entry:#x} is beyond the file of {} bytes", image.len())),
                None => Ok(()),
            }
        })
        .unwrap();
    }
}

#[test]
fn space_behind_the_last_block_is_not_given_out_as_fresh() {
    // A killed process grew the file and wrote data of a block whose BAT entry was lost.
    let setup = setup("dynamic");
    let mut image = setup.image.clone();
    image.resize(image.len() + (512 << 10), 0xA5);
    let storage = Arc::new(MemoryStorage::new(image));
    let disk = open(Arc::clone(&storage) as _, &setup, &writable()).unwrap();
    disk.write_at(&[1; 512], 3 * 512).unwrap();
    disk.close().unwrap();
    let found = read_all(&disk).unwrap();
    let rubbish = found.iter().filter(|&&byte| byte == 0xA5).count();
    assert_eq!(rubbish, 0, "bytes of a lost block show");
    // Nor on disk, for readers who ignore bitmaps.
    let image = storage.to_vec();
    let entry = entries(&image).find(|entry| *entry != BAT_UNUSED).unwrap() as usize;
    let data = &image[entry * 512 + 512..][..BLOCK as usize * 512];
    assert!(data.iter().all(|&byte| byte < 2), "its slot was not zeroed");
}

/// An image of another creator: a block of which two sectors are present, over bytes that were never written.
fn foreign() -> Setup {
    let mut spec = FixtureSpec::new(Kind::Dynamic, FixtureLayout::Classic, 12 * BLOCK * 512);
    spec.block_size = 4096;
    let fill = BlockFill { fill: Fill::Byte(0xA5), sectors: BTreeMap::new(), bits: Bits::Only([1, 2].into()) };
    let (image, _) = spec.block(2, fill).to_bytes();
    Setup { name: "another creator's", image, parent: None }
}

#[test]
fn a_bitmap_bit_does_not_land_before_its_data_in_another_creators_image() {
    let setup = foreign();
    let script = [
        Step::Write { lba: 2 * BLOCK + 4, count: 2 },
        Step::Flush,
        Step::WriteBytes { offset: (2 * BLOCK + 6) * 512 + 100, len: 10 },
        Step::Discard { lba: 2 * BLOCK + 2, count: 5 },
        Step::Flush,
    ];
    let run = run(&setup, &script, &Journal::new(), 1);
    let depth = Depth { recover_every: 1, second_crash_every: 5 };
    judge_run(&setup, &run, Effort::default(), depth).unwrap();
}

#[test]
fn of_two_footers_that_disagree_the_trailing_one_counts_and_opening_for_writing_mends_the_copy() {
    let setup = setup("dynamic");
    let mut image = setup.image.clone();
    let mut footer = Footer::parse(image.first_chunk().unwrap()).unwrap();
    footer.set_uuid([9; 16]);
    image[..512].copy_from_slice(&footer.to_bytes());
    let storage = Arc::new(MemoryStorage::new(image.clone()));
    let look = vhd_core::image::Image::open(Arc::clone(&storage) as _, "a.vhd".as_ref(), &OpenOptions::default()).unwrap();
    assert_eq!(look.footer().uuid(), [3; 16]);
    assert!(look.warnings().iter().any(|warning| warning.contains("differs")), "{:?}", look.warnings());
    assert!(storage.to_vec() == image, "looking changes nothing");
    drop(open(Arc::clone(&storage) as _, &setup, &writable()).unwrap());
    let mended = storage.to_vec();
    assert!(mended[..512] == mended[mended.len() - 512..] && mended[68..84] == [3; 16]);
}

#[test]
fn no_space_for_metadata_after_the_data_was_acknowledged_loses_nothing() {
    for name in ["dynamic", "differencing"] {
        let setup = setup(name);
        // The write succeeds; what fails is the first write of the flush.
        let storage = Arc::new(FaultStorage::new(setup.image.clone(), None));
        let disk = open(Arc::clone(&storage) as _, &setup, &writable()).unwrap();
        disk.write_at(&[7; 512], 0).unwrap();
        storage.plan(Plan { fault: Fault::EnospcAnywhere, at: 1, for_ever: true });
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::NoSpace, "a flush that failed is not clean");
        storage.heal();
        disk.flush().unwrap();
        let after_cut = Arc::new(MemoryStorage::new(storage.durable()));
        let found = read_all(&open(after_cut, &setup, &OpenOptions::default()).unwrap()).unwrap();
        assert_eq!(sector(&found, 0), [7; 512], "{name}");
    }
}

#[test]
fn a_lost_bit_does_not_bring_its_data_back_when_a_neighbour_is_written() {
    let setup = setup("differencing");
    let storage = Arc::new(MemoryStorage::new(setup.image.clone()));
    let disk = open(Arc::clone(&storage) as _, &setup, &writable()).unwrap();
    disk.write_at(&[5; 512], 0).unwrap();
    disk.flush().unwrap();
    // Data arrives, bits do not: the process is killed.
    disk.write_at(&[6; 3 * 512], 4 * 512).unwrap();
    std::mem::forget(disk);
    let disk = open(Arc::clone(&storage) as _, &setup, &writable()).unwrap();
    let before = read_all(&disk).unwrap();
    disk.write_at(&[9; 512], 7 * 512).unwrap();
    disk.write_at(&[9; 100], 3 * 512 + 50).unwrap();
    disk.close().unwrap();
    let after = read_all(&disk).unwrap();
    for lba in [0, 1, 2, 4, 5, 6] {
        assert!(sector(&after, lba) == sector(&before, lba), "sector {lba} changed");
    }
}

/// What a footer says of a change that was made or not.
type Said = fn(&Footer) -> bool;

/// Every state that a cut may leave of a change to a footer says the old or the new, opens, and reads as before.
fn judge_change(change: impl Fn(&RecordingStorage), is_made: Said, open_options: &OpenOptions) {
    for name in ["used dynamic", "differencing", "fixed"] {
        let setup = setup(name);
        let journal = Journal::new();
        let storage = RecordingStorage::new(setup.image.clone(), 0, &journal);
        change(&storage);
        let before = read_all(&open(Arc::new(MemoryStorage::new(setup.image.clone())), &setup, &writable()).unwrap()).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        crash_states(std::slice::from_ref(&setup.image), &journal.events(), Effort::default(), &mut |state| {
            let storage = Arc::new(MemoryStorage::new(state.files[0].clone()));
            let look = |options: &OpenOptions| {
                vhd_core::image::Image::open(Arc::clone(&storage) as _, "a.vhd".as_ref(), options)
                    .map_err(|error| error.to_string())
            };
            let found = is_made(look(&OpenOptions::default())?.footer());
            seen.insert(found);
            // What it says is what it says after it was opened for writing, which mends footers.
            let mended = is_made(look(open_options)?.footer());
            let content = read_all(&open(storage, &setup, open_options).map_err(|error| error.to_string())?).unwrap();
            if content == before && mended == found { Ok(()) } else { Err("it changed".into()) }
        })
        .unwrap();
        assert_eq!(seen, [false, true].into(), "{name}");
    }
}

#[test]
fn an_image_that_gets_an_identifier_has_the_old_or_the_new_one_at_every_moment() {
    let change = |storage: &RecordingStorage| vhd_core::image::Image::set_uuid_of(storage, [9; 16]).unwrap();
    judge_change(change, |footer| footer.uuid() == [9; 16], &writable());
}

#[test]
fn an_image_that_is_marked_for_a_saved_state_has_the_mark_or_not_at_every_moment() {
    let change = |storage: &RecordingStorage| vhd_core::image::Image::set_saved_state_of(storage, true).unwrap();
    judge_change(change, Footer::saved_state, &OpenOptions { owns_saved_state: true, ..writable() });
}

/// A device: a file that can't grow.
#[derive(Debug)]
struct Device(MemoryStorage);

impl Storage for Device {
    fn read_vectored_at(&self, bufs: &mut [std::io::IoSliceMut<'_>], offset: u64) -> std::io::Result<()> {
        self.0.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[std::io::IoSlice<'_>], offset: u64) -> std::io::Result<()> {
        self.0.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, _len: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::InvalidInput.into())
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        self.0.punch_hole(range)
    }

    fn zero_range(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        self.0.zero_range(range)
    }

    fn allocate(&self, _range: std::ops::Range<u64>) -> std::io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
        self.0.next_data(offset)
    }

    fn can_grow(&self) -> bool {
        false
    }

    fn allocated(&self) -> std::io::Result<u64> {
        self.0.len()
    }
}

#[test]
fn a_footer_that_a_device_lost_is_not_written_over_a_block() {
    let setup = foreign();
    let whole = setup.image.len();
    // Without its footer the last block ends where the device does; with room behind it, the footer goes there.
    for (len, opens) in [(whole - 512, false), (whole + 4096, true)] {
        let mut image = setup.image.clone();
        image[whole - 512..].fill(0);
        image.resize(len, 0);
        let device = Arc::new(Device(MemoryStorage::new(image.clone())));
        let opened = open(Arc::clone(&device) as _, &setup, &writable());
        assert_eq!(opened.is_ok(), opens, "{:?}", opened.err());
        match opens {
            true => assert!(Footer::parse(device.0.to_vec().last_chunk().unwrap()).is_ok()),
            false => assert!(device.0.to_vec() == image, "a refused device was written"),
        }
    }
}
