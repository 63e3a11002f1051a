//! What is done with whole images.

pub mod check;
pub mod compact;
pub mod copy;
pub mod diff;
pub mod in_place;
pub mod merge;
pub mod repair;
pub mod reparent;
pub mod resize;
pub mod saved_state;
mod share;
pub mod undo;
