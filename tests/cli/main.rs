//! The command line is a contract: names, options, JSON keys, exit statuses, what is left behind.
//!
//! Goal: a script that was written against it goes on to work. Method: the built command, run as a script runs it.

#![allow(missing_docs, clippy::unwrap_used)]

mod bad_input;
mod bench;
mod chains;
mod convert;
mod documents;
mod endings;
mod machine_limits;
mod machines;
mod machines_kernel;
mod machines_states;
mod machines_trust;
mod operations;
mod records;
#[path = "../support/mod.rs"]
mod support;
