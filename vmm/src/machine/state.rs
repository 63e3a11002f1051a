//! The states of a machine, and what may be done in each: Virtual Server's table.

use std::fmt;

use vhd_core::{Error, ErrorKind};

/// How it is with a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not started, or turned off.
    Off,
    /// The guest runs.
    Running,
    /// The guest stands still: why.
    Paused(Reason),
    /// The guest is in a file, to go on from there.
    Saved,
    /// The guest can't go on: why.
    Faulted(String),
}

/// Why a machine is paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Someone said so.
    Asked,
    /// The host's volume is full, or nearly: what was found.
    NoSpace(String),
    /// A disk can't do what the guest asks of it: why.
    Failure(String),
}

/// What can be done to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Turn it on.
    Start,
    /// Make it stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Turn it off and on.
    Reset,
    /// Turn it off, as by pulling the plug.
    Off,
    /// Put the guest into a file and turn it off.
    Save,
    /// Go on from the file.
    Restore,
    /// Forget the file.
    DiscardState,
    /// Ask the guest to turn itself off, as by its power button.
    Shutdown,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Start,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::Off,
        Self::Save,
        Self::Restore,
        Self::DiscardState,
        Self::Shutdown,
    ];

    /// Its word, on the command line and the control socket.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset => "reset",
            Self::Off => "off",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::DiscardState => "discard-state",
            Self::Shutdown => "shutdown",
        }
    }

    /// The command of a word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|command| command.name() == name)
    }
}

impl State {
    /// Its word.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Running => "running",
            Self::Paused(_) => "paused",
            Self::Saved => "saved",
            Self::Faulted(_) => "faulted",
        }
    }

    /// Why it is so, where there is a reason.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Paused(reason) => Some(reason.to_string()),
            Self::Faulted(why) => Some(why.clone()),
            Self::Off | Self::Running | Self::Saved => None,
        }
    }

    /// Whether a command can be done now.
    #[must_use]
    pub fn allows(&self, command: Command) -> bool {
        use Command::{DiscardState, Off, Pause, Reset, Restore, Resume, Save, Shutdown, Start};
        let allowed: &[Command] = match self {
            Self::Off => &[Start],
            Self::Running => &[Pause, Reset, Off, Save, Shutdown],
            Self::Paused(_) => &[Resume, Reset, Off, Save],
            Self::Saved => &[Restore, DiscardState],
            Self::Faulted(_) => &[Reset, Off],
        };
        allowed.contains(&command)
    }

    /// Refuses a command that can't be done now, with those that can.
    ///
    /// # Errors
    /// `Refused`.
    pub fn check(&self, command: Command) -> Result<(), Error> {
        if self.allows(command) {
            return Ok(());
        }
        let possible: Vec<_> = Command::ALL.into_iter().filter(|other| self.allows(*other)).map(Command::name).collect();
        let message = format!("is {self}, so it can't {}; now it can: {}", command.name(), possible.join(", "));
        Err(Error::new(ErrorKind::Refused, message))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paused(reason) => write!(f, "paused ({reason})"),
            Self::Faulted(why) => write!(f, "faulted ({why})"),
            other => f.write_str(other.name()),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("as asked"),
            Self::NoSpace(found) => write!(f, "no space: {found}"),
            Self::Failure(why) => write!(f, "a disk failed: {why}"),
        }
    }
}
