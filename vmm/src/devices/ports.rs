//! Which device answers on which port.

use std::sync::{Arc, Mutex, PoisonError};

use super::Clock;
use super::serial::{Shared, lock};
use crate::acpi::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::layout::{CLOCK, KEYBOARD, POWER, SERIAL};

/// The keyboard controller's command that pulls the reset line.
const PULSE_RESET: u8 = 0xFE;
/// Bit of the sleep control register that begins the sleep; the type stands in the three bits above bit 1.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Ports of serial interfaces that are not there. Zeros tell a driver so at once; ones make it try for seconds.
const ABSENT_SERIAL: [std::ops::Range<u16>; 3] = [0x2F8..0x300, 0x3E8..0x3F0, 0x2E8..0x2F0];

/// What a guest asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Begin again.
    Reset,
    /// Turn off.
    Off,
}

/// The devices on ports.
#[derive(Clone, Debug)]
pub struct Ports {
    serial: Shared,
    clock: Arc<Mutex<Clock>>,
}

impl Ports {
    /// Ports with this serial interface.
    #[must_use]
    pub fn new(serial: Shared, clock: Clock) -> Self {
        Self { serial, clock: Arc::new(Mutex::new(clock)) }
    }

    /// The serial interface.
    #[must_use]
    pub fn serial(&self) -> &Shared {
        &self.serial
    }

    /// The clock's state.
    #[must_use]
    pub fn clock(&self) -> Clock {
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest writes bytes to a port, one after the other.
    pub fn write(&self, port: u16, bytes: &[u8]) -> Option<Request> {
        // Wide registers are those of PCI, and there is none.
        let &value = bytes.first()?;
        if SERIAL.contains(&port) {
            let mut serial = lock(&self.serial);
            for &byte in bytes {
                serial.write((port - SERIAL.start) as u8, byte);
            }
            return None;
        }
        if port == CLOCK[0] {
            self.clock.lock().unwrap_or_else(PoisonError::into_inner).select(value);
        }
        let reset = (port == KEYBOARD[1] && value == PULSE_RESET) || (port == POWER[2] && value == RESET_VALUE);
        let off = port == POWER[0] && value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF;
        match (reset, off) {
            (true, _) => Some(Request::Reset),
            (_, true) => Some(Request::Off),
            _ => None,
        }
    }

    /// A guest reads bytes from a port.
    pub fn read(&self, port: u16, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.read_byte(port);
        }
    }

    fn read_byte(&self, port: u16) -> u8 {
        if SERIAL.contains(&port) {
            return lock(&self.serial).read((port - SERIAL.start) as u8);
        }
        if port == CLOCK[1] {
            return self.clock().read();
        }
        let nothing_pending = KEYBOARD.contains(&port) || POWER.contains(&port);
        if nothing_pending || ABSENT_SERIAL.iter().any(|ports| ports.contains(&port)) { 0 } else { 0xFF }
    }
}
