//! Real mounts of a disk in memory.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod ending;
mod files;
mod support;
