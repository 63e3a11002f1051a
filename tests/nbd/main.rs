//! `vhd serve`, as clients of all sorts see it.
//!
//! Goal: every client gets the protocol as it is written, whatever it or others do; nothing that was promised is lost; the
//! service lives and ends as services should. Method: the real command on real sockets; programs of other projects
//! (libnbd, QEMU, nbdkit, fio, the `nbd` crate), a client of our own that shares no code with the server, clients that
//! mean harm, kills at random moments, and a guest that boots from an export.
//! It would fail if a reply had a byte wrong, an illegal request another error than the protocol's, a client could stop
//! others, flushed data were lost, or an image were not whole after the server's end.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod boot;
mod clients;
mod contexts;
mod extended;
mod failures;
mod fair;
mod hostile;
mod illegal;
mod kill;
mod life;
mod load;
mod server;
mod snapshot;
mod starve;
mod tls;
mod uncopied;
mod waits;
mod wire;
mod zeroes;
