//! Metadata contexts: what each says of a chain, and when a choice counts.

use super::server::{Server, sh};
use super::support::{done, json, noise, vhd_fed};
use super::wire::*;

fn states(wire: &mut Wire, flags: u16, offset: u64, len: u64) -> Vec<Vec<(u32, u32)>> {
    wire.request(flags, STATUS, 9, offset, len);
    let replies = wire.replies(0);
    replies
        .iter()
        .map(|reply| {
            assert_eq!((reply.kind, reply.error), (Some(5), 0));
            reply.payload[4..].chunks(8).map(|run| (be32(run, 0), be32(run, 4))).collect()
        })
        .collect()
}

#[test]
fn each_context_tells_of_a_chain_what_it_is_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let write = |image: &str, offset: &str, len| {
        assert!(vhd_fed(path, &format!("write {image} --offset {offset}"), &noise(1, len)).status.success())
    };
    done(path, "create a.vhd --size 32M");
    write("a.vhd", "0", 4 << 20);
    done(path, "create b.vhd --parent a.vhd");
    write("b.vhd", "2M", 4096);
    done(path, "create c.vhd --parent b.vhd");
    write("c.vhd", "8M", 1 << 20);
    let server = Server::start(path, "c.vhd");
    let contexts = ["base:allocation", "qemu:allocation-depth", "vhd:dirty:a.vhd", "vhd:dirty:b.vhd"];
    let mut wire = Wire::open_with(&server.socket(), "c", Style::Structured, &contexts);
    let (kib, mib) = (1 << 10, 1 << 20);
    let found = states(&mut wire, 0, 0, 32 * mib);
    assert_eq!(found[0], [(4 * mib as u32, 0), (4 * mib as u32, 3), (mib as u32, 0), (23 * mib as u32, 3)]);
    let depth = [
        (2 * mib as u32, 3),
        (4 * kib, 2),
        (2 * mib as u32 - 4 * kib, 3),
        (4 * mib as u32, 0),
        (mib as u32, 1),
        (23 * mib as u32, 0),
    ];
    assert_eq!(found[1], depth);
    assert_eq!(
        found[2],
        [(2 * mib as u32, 0), (4 * kib, 1), (6 * mib as u32 - 4 * kib, 0), (mib as u32, 1), (23 * mib as u32, 0)]
    );
    assert_eq!(found[3], [(8 * mib as u32, 0), (mib as u32, 1), (23 * mib as u32, 0)]);
    assert_eq!(
        states(&mut wire, REQ_ONE, mib, 2 * mib),
        [[(2 * mib as u32, 0)], [(mib as u32, 3)], [(mib as u32, 0)], [(2 * mib as u32, 0)]]
    );
    assert_eq!(states(&mut wire, 0, 8 * mib + 1, 1)[1], [(1, 1)], "any byte may be asked for");

    // After a snapshot the chain is longer, and the contexts mean the same images.
    sh(path, &format!("{} ctl ./c snapshot c d.vhd", env!("CARGO_BIN_EXE_vhd")));
    assert_eq!(wire.write_error(0, 16 << 20, &[1; 4096]), 0);
    let after = states(&mut wire, 0, 0, 32 * mib);
    assert_eq!(after[1][0], (2 * mib as u32, 4));
    assert_eq!(after[2].iter().filter(|run| run.1 == 1).count(), 3);
    assert_eq!(after[3].iter().filter(|run| run.1 == 1).count(), 2);
    server.stop();
    // What a backup needs is what `diff` says.
    let diff = json(path, "diff a.vhd c.vhd", 1);
    let dirty: Vec<_> = diff.as_array().unwrap().iter().map(|range| range["start"].as_u64().unwrap()).collect();
    assert_eq!(dirty, [2 * mib, 8 * mib]);
}

#[test]
fn lists_know_wildcards_and_choices_do_not() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create a.vhd --size 8M");
    done(folder.path(), "create b.vhd --parent a.vhd");
    let server = Server::start(folder.path(), "b.vhd");
    let mut wire = Wire::connect(&server.socket());
    wire.set_style(Style::Structured);
    let mut ask = |option, queries: &[&str]| -> Vec<(u32, String)> {
        let replies = wire.option(option, &meta_data("", queries));
        let found = replies.iter().filter(|(kind, _)| *kind == META);
        found.map(|(_, data)| (be32(data, 0), String::from_utf8(data[4..].to_vec()).unwrap())).collect()
    };
    let all = ["base:allocation", "qemu:allocation-depth", "vhd:dirty:a.vhd"];
    assert_eq!(ask(LIST_META, &[]), all.map(|name| (0, name.to_owned())));
    assert_eq!(ask(LIST_META, &["base:", "vhd:", "other:thing"]).len(), 2);
    assert!(ask(SET_META, &["base:", "vhd:dirty:none.vhd", "x-y:z", ""]).is_empty());
    let chosen = ask(SET_META, &["qemu:allocation-depth", "base:allocation", "base:allocation"]);
    assert_eq!(chosen.len(), 2);
    assert!(chosen[0].0 != chosen[1].0 && chosen.iter().all(|(id, _)| *id != 0));
    server.stop();
}

#[test]
fn a_choice_is_void_for_another_export_and_after_a_failed_one() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create a.vhd --size 8M");
    done(folder.path(), "create b.vhd --size 8M");
    let server = Server::start(folder.path(), "a.vhd b.vhd");
    let allocation = ["base:allocation"];
    for (prepare, go, works) in [
        (("a", &allocation[..]), "a", true),
        (("a", &allocation), "b", false),
        (("none", &allocation), "a", false),
        (("a", &[]), "a", false),
    ] {
        let mut wire = Wire::connect(&server.socket());
        wire.set_style(Style::Structured);
        wire.option(SET_META, &meta_data("a", &allocation));
        wire.option(SET_META, &meta_data(prepare.0, prepare.1));
        wire.go(go);
        assert_eq!(wire.error_of(0, STATUS, 0, 512) == 0, works, "{prepare:?} {go}");
    }
    server.stop();
}
