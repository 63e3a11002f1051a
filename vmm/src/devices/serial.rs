//! The serial port (16550) that is the guest's console.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes that wait for the guest at most; more is dropped as a wire would.
const PENDING: usize = 4096;

/// The interrupt line.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the guest's bytes go. It must not block for long: a vCPU waits meanwhile.
pub type Console = Box<dyn Write + Send>;

/// The serial port.
pub struct SerialPort {
    port: Serial<Line, NoEvents, Console>,
    /// Bytes for the guest that its port has no room for yet.
    waiting: Vec<u8>,
}

/// What is saved of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialSaved {
    registers: [u8; 9],
    input: Vec<u8>,
}

/// The port as several threads use it.
pub type Shared = Arc<Mutex<SerialPort>>;

impl SerialPort {
    /// A port that writes to `console`. The event is the interrupt line.
    ///
    /// # Errors
    /// As the host has no more event counters.
    pub fn new(console: Console) -> io::Result<(Self, EventFd)> {
        let line = EventFd::new(EFD_NONBLOCK)?;
        let port = Serial::new(Line(line.try_clone()?), console);
        Ok((Self { port, waiting: Vec::new() }, line))
    }

    /// The guest reads a register.
    pub fn read(&mut self, register: u8) -> u8 {
        let value = self.port.read(register);
        self.feed();
        value
    }

    /// The guest writes a register. What its console can't take is lost.
    pub fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.port.write(register, value) {
            tracing::debug!("serial port: {error}");
        }
    }

    /// Bytes for the guest.
    pub fn input(&mut self, bytes: &[u8]) {
        let room = PENDING.saturating_sub(self.waiting.len());
        self.waiting.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.feed();
    }

    /// Moves what waits into the port as it has room.
    fn feed(&mut self) {
        let len = self.waiting.len().min(self.port.fifo_capacity());
        if len > 0 {
            let taken = self.port.enqueue_raw_bytes(&self.waiting[..len]).unwrap_or(0);
            self.waiting.drain(..taken);
        }
    }

    /// What is to be saved.
    #[must_use]
    pub fn save(&self) -> SerialSaved {
        let state = self.port.state();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        SerialSaved { registers, input: [state.in_buffer, self.waiting.clone()].concat() }
    }

    /// A port in a saved state.
    ///
    /// # Errors
    /// As [`SerialPort::new`].
    pub fn restore(saved: &SerialSaved, console: Console) -> io::Result<(Self, EventFd)> {
        let line = EventFd::new(EFD_NONBLOCK)?;
        let [low, high, enable, identification, control, line_status, modem, modem_status, scratch] = saved.registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        let port = Serial::from_state(&state, Line(line.try_clone()?), NoEvents, console).map_err(io::Error::other)?;
        let mut serial = Self { port, waiting: Vec::new() };
        serial.input(&saved.input);
        Ok((serial, line))
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

/// Takes the port, even from a thread that panicked.
pub(crate) fn lock(port: &Shared) -> std::sync::MutexGuard<'_, SerialPort> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}
