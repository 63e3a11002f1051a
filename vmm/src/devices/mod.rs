//! What a PC has beside disks, as far as a guest needs it to start, to speak and to stop.

mod clock;
mod ports;
mod serial;

pub use clock::Clock;
pub use ports::{Ports, Request};
pub use serial::{Console, SerialPort, SerialSaved};
