//! What is done with whole images.

pub mod check;
pub mod copy;
pub mod diff;
