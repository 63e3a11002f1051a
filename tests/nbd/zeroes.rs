//! Zeros that nobody stored: holes in replies, and zeroing that is fast or says that it is not.

use vhd_testkit::volume::Volume;

use super::server::{Server, folder_with_disk, has, sh};
use super::support::{done, noise, vhd_fed};
use super::wire::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const NOTSUP: u32 = 95;

/// Kinds of the chunks of a READ, with their offsets and lengths.
fn chunks(wire: &mut Wire, flags: u16, offset: u64, len: u64) -> Vec<(u16, u64, u64)> {
    wire.request(flags, READ, 3, offset, len);
    let replies = wire.replies(0);
    let told = replies.iter().filter(|reply| reply.kind != Some(0)).map(|reply| {
        assert!(reply.error == 0 && reply.offset.is_none_or(|found| found == offset));
        let len = match reply.kind {
            Some(2) => {
                assert_eq!(reply.payload.len(), 12);
                be32(&reply.payload, 8).into()
            }
            _ => reply.payload.len() as u64 - 8,
        };
        (reply.kind.unwrap(), be64(&reply.payload, 0), len)
    });
    told.collect()
}

#[test]
fn what_no_image_holds_is_told_and_not_sent() {
    let folder = folder_with_disk("64M");
    let data = noise(1, 512 << 10);
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 2M", &data).status.success());
    for image in ["disk.vhd", "child.vhd"] {
        if image == "child.vhd" {
            done(folder.path(), "create child.vhd --parent disk.vhd");
        }
        let server = Server::start(folder.path(), image);
        for style in [Style::Structured, Style::Extended] {
            let mut wire = Wire::open(&server.socket(), "", style);
            for flags in [0, DF] {
                assert_eq!(chunks(&mut wire, flags, 100, 64 * KIB), [(2, 100, 64 * KIB)], "{style:?}");
                assert_eq!(chunks(&mut wire, flags, 2 * MIB, 64 * KIB), [(1, 2 * MIB, 64 * KIB)]);
                assert_eq!(chunks(&mut wire, flags, 2 * MIB - 512, 1024), [(1, 2 * MIB - 512, 1024)], "half of it is data");
                assert_eq!(chunks(&mut wire, flags, 0, 0), []);
            }
            let long = chunks(&mut wire, 0, MIB, 2 * MIB);
            assert_eq!(long.iter().map(|(_, _, len)| len).sum::<u64>(), 2 * MIB);
            assert!(long.iter().all(|(kind, at, _)| (*kind == 2) == (*at < 2 * MIB)), "{long:?}");
            assert_eq!(chunks(&mut wire, DF, MIB, 2 * MIB), [(1, MIB, 2 * MIB)], "one chunk, whatever is in it");
            assert_eq!(wire.read(0, 2 * MIB - 512, data.len() + 1024)[512..][..data.len()], data);
            // What was written meanwhile is no hole.
            assert_eq!(wire.write_error(0, 32 * MIB, &[0; 512]), 0);
            assert_eq!(chunks(&mut wire, 0, 32 * MIB, 512), [(1, 32 * MIB, 512)]);
            assert_eq!(wire.error_of(0, TRIM, 32 * MIB, 2 * MIB), 0);
        }
        assert_eq!(Wire::open(&server.socket(), "", Style::Simple).read(0, 0, 4096), [0; 4096]);
        server.stop();
    }
}

/// libnbd tells its caller which chunks came.
#[test]
fn libnbd_is_told_of_holes() {
    if !has("nbdinfo") {
        return;
    }
    let folder = folder_with_disk("64M");
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 2M", &noise(1, 4096)).status.success());
    let server = Server::start(folder.path(), "disk.vhd");
    let script = format!(
        "import nbd\nh = nbd.NBD()\nh.connect_uri('{}')\nfound = []\n\
         def chunk(data, offset, status, error):\n    found.append((status, offset, len(data)))\n\
         for flags in (0, nbd.CMD_FLAG_DF):\n    data = h.pread_structured(8192, 0, chunk, flags)\n    assert bytes(data) == bytes(8192)\n    \
         h.pread_structured(4096, 2 << 20, chunk, flags)\n\
         assert found == [(nbd.READ_HOLE, 0, 8192), (nbd.READ_DATA, 2 << 20, 4096)] * 2, found\nprint('as expected')\n",
        server.uri_of("")
    );
    std::fs::write(folder.path().join("holes.py"), script).unwrap();
    assert_eq!(sh(folder.path(), "/usr/bin/python3 holes.py"), "as expected\n");
    server.stop();
}

/// On tmpfs holes are punched, but space can't be kept without writing zeros to it.
#[test]
fn fast_zeroes_are_refused_where_they_would_be_written() {
    let Some(volume) = Volume::new("24M") else { return };
    done(volume.path(), "create disk.vhd --size 16M");
    done(volume.path(), "create fixed.vhd --size 4M --type fixed");
    let server = Server::start(volume.path(), "disk.vhd fixed.vhd");
    for name in ["disk", "fixed"] {
        let mut wire = Wire::open(&server.socket(), name, Style::Structured);
        let data = noise(3, 64 << 10);
        assert_eq!(wire.write_error(0, 0, &data), 0);
        assert_eq!(wire.error_of(NO_HOLE | FAST_ZERO, ZERO, 0, 64 * KIB), NOTSUP, "{name}");
        assert!(wire.read(0, 0, data.len()) == data, "a refused request changes nothing");
        assert_eq!(wire.error_of(FAST_ZERO, ZERO, 0, 32 * KIB), 0);
        assert_eq!(wire.error_of(NO_HOLE, ZERO, 32 * KIB, 32 * KIB), 0, "slow is no reason where fast was not asked for");
        assert_eq!(wire.read(0, 0, data.len()), vec![0; data.len()]);
    }
    server.stop();
}

/// Where the host does it by metadata it is granted.
#[test]
fn fast_zeroes_are_granted_where_the_host_has_them() {
    let folder = folder_with_disk("64M");
    let kind = sh(folder.path(), "stat -f -c %T .");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::open(&server.socket(), "", Style::Structured);
    assert_eq!(wire.write_error(0, 0, &noise(3, 64 << 10)), 0);
    let wanted = if ["ext2/ext3", "xfs", "btrfs", "f2fs"].contains(&kind.trim()) { 0 } else { NOTSUP };
    assert_eq!(wire.error_of(FAST_ZERO | NO_HOLE, ZERO, 0, 48 << 20), wanted, "{kind}");
    server.stop();
}

#[test]
fn zeroes_without_a_hole_keep_their_space_and_others_take_none() {
    for (flags, blocks) in [(0, 0), (NO_HOLE, 4)] {
        let folder = folder_with_disk("64M");
        let server = Server::start(folder.path(), "disk.vhd");
        let mut wire = Wire::open(&server.socket(), "", Style::Simple);
        assert_eq!(wire.error_of(flags, ZERO, 0, 8 * MIB), 0);
        server.stop();
        assert_eq!(super::support::json(folder.path(), "info disk.vhd", 0)["blocks_allocated"], blocks);
        let taken = std::os::unix::fs::MetadataExt::blocks(&folder.path().join("disk.vhd").metadata().unwrap()) * 512;
        assert_eq!(taken >= 8 * MIB, flags == NO_HOLE, "{taken} bytes of the volume");
    }
}
