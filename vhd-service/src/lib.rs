//! What serving, mounting and running disks share.
//!
//! [`runtime`] is where sockets go; [`descriptors`] how many of them there may be; [`socket`] one that only its user can connect to;
//! [`control`] a socket that takes one command a line, and its client; [`events`] what happened, for whoever wants to know; [`log`] the
//! lines on stderr; [`space`] watches the room that is left on the host; [`metrics`] counts what disks
//! are asked for, and tells Prometheus.
//!
//! All of it is synchronous, with few threads of its own: none of it is on the path of a request.

pub mod control;
pub mod descriptors;
pub mod events;
pub mod log;
pub mod metrics;
mod places;
pub mod runtime;
pub mod socket;
pub mod space;
