//! `vhd serve`

mod pid_file;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::ToSocketAddrs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use vhd_core::{Error, ErrorKind};
use vhd_nbd::{Admin, Limits, Listen, Server, ServerOptions, Table, Tls};
use vhd_service::control::{self, Control};
use vhd_service::descriptors;
use vhd_service::events::Events;
use vhd_service::log;
use vhd_service::metrics::{self, Metrics};
use vhd_service::runtime;
use vhd_service::socket::is_served;

use self::pid_file::PidFile;
use super::ChainArgs;
use super::service::{name_of, watch};
use crate::output::{Answer, Context, ShownPath};
use crate::sizes;

/// Open files that are left for what `vhd ctl` asks for: images that are added, their parents, new leaves.
const FILES: usize = 24;

/// Arguments of `vhd serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The images; each is an export named by its file name without extension, and "" is the first
    #[arg(required_unless_present = "names")]
    images: Vec<PathBuf>,
    /// An image under another name; may be given more than once
    #[arg(long = "name", value_name = "NAME=IMAGE")]
    names: Vec<String>,
    /// Where clients come: unix:PATH, tcp:HOST:PORT, stdio, or systemd for a socket that was passed on
    #[arg(long, value_name = "WHERE", value_parser = parse_listen)]
    listen: Option<Listen>,
    /// Refuse all writes
    #[arg(long)]
    read_only: bool,
    /// Write even if a saved state or a child relies on an image
    #[arg(long)]
    force: bool,
    /// Whether clients may or must use TLS
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "off",
        requires_if("on", "tls_certs"),
        requires_if("required", "tls_certs")
    )]
    tls: TlsMode,
    /// The folder with server-cert.pem, server-key.pem and ca-cert.pem
    #[arg(long, value_name = "DIR")]
    tls_certs: Option<PathBuf>,
    /// Only clients with a certificate that ca-cert.pem's owner signed
    #[arg(long, requires = "tls_certs")]
    tls_verify_clients: bool,
    /// Let plain clients of other machines in
    #[arg(long)]
    insecure: bool,
    /// End when the last client is gone
    #[arg(long)]
    once: bool,
    /// Write the process's number to this new file, and remove it at the end; one that a dead server left is taken over
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Write the URI to this descriptor when clients may come, and close it
    #[arg(long, value_name = "FD")]
    ready_fd: Option<i32>,
    /// The socket for `vhd ctl`; one in the user's runtime folder by default
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Tell Prometheus, at http://HOST:PORT/metrics
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
    /// Warn when an image's volume has less room than this
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse, default_value = "256M")]
    low_space: u64,
    /// Connections at once; 1024 by default, fewer where the limit of open files has no room for them
    #[arg(long, value_name = "N")]
    max_connections: Option<usize>,
    /// Requests of a connection at once
    #[arg(long, value_name = "N", default_value_t = Limits::default().requests)]
    max_requests: usize,
    /// End clients that ask nothing for so long; 0 never
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    idle_timeout: u64,
    /// End clients that have not chosen an export by then
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().handshake.as_secs())]
    handshake_timeout: u64,
    #[command(flatten)]
    open: ChainArgs,
}

/// When TLS is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TlsMode {
    /// Never
    Off,
    /// When the client asks for it
    On,
    /// Always
    Required,
}

fn parse_listen(text: &str) -> Result<Listen, String> {
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(Listen::Unix(path.into())),
        Some(("tcp", address)) if address.contains(':') => Ok(Listen::Tcp(address.to_owned())),
        None if text == "stdio" => Ok(Listen::Stdio),
        None if text == "systemd" => Ok(Listen::Activated),
        _ => Err("expected unix:PATH, tcp:HOST:PORT, stdio or systemd".to_owned()),
    }
}

impl ServeArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let exports = self.exports()?;
        let first = exports[0].0.clone();
        let listen = match &self.listen {
            // A service that is started for a socket knows where to listen.
            None if std::env::var_os("LISTEN_FDS").is_some() => Listen::Activated,
            None => Listen::Unix(in_runtime_folder(&first, "sock")?),
            Some(listen) => listen.clone(),
        };
        self.check_secure(&listen)?;
        log::serve()?;
        descriptors::raise_limit();
        let (events, metrics) = (Events::default(), Metrics::default());
        let server = Server::new(Table::default(), self.options()?);
        // What is tolerated is not written to.
        let open = self.open.options(!self.read_only && !self.open.tolerant, self.force);
        let watch = Some(watch(self.low_space, &events)?);
        let admin = Arc::new(Admin { server: Arc::clone(&server), open: open.clone(), metrics: metrics.clone(), events, watch });
        for (name, image) in &exports {
            admin.add_export(name, image, &open)?;
        }
        self.fit(&server, context)?;
        let control = self.control(&listen, &first, &admin)?;
        let metrics_at = self.metrics.as_deref().map(|at| metrics.serve(metrics::address(at)?)).transpose()?;
        let pid_file = self.pid_file.as_deref().map(PidFile::make).transpose()?;
        server.run(&listen, |uri| {
            self.tell_ready(uri)?;
            if listen == Listen::Stdio {
                return Ok(());
            }
            let document = serde_json::json!({
                "uri": uri,
                "exports": exports.iter().map(|(name, _)| name).collect::<Vec<_>>(),
                "control": control.as_ref().map(|control| ShownPath(control.path())),
                "metrics": metrics_at.map(|at| format!("http://{at}/metrics")),
                "pid": std::process::id(),
            });
            // Who passed a socket on knows where it is.
            let text = if listen == Listen::Activated { String::new() } else { format!("{uri}\n") };
            context.print(&text, &document)
        })?;
        drop(pid_file);
        Ok(Answer::Yes)
    }

    /// Names and images, in order.
    fn exports(&self) -> Result<Vec<(String, PathBuf)>, Error> {
        let mut exports: Vec<_> = self.images.iter().map(|image| (name_of(image), image.clone())).collect();
        for named in &self.names {
            let Some((name, image)) = named.split_once('=') else {
                let message = format!("--name {named}: expected NAME=IMAGE");
                return Err(Error::new(ErrorKind::InvalidInput, message));
            };
            exports.push((name.to_owned(), image.into()));
        }
        Ok(exports)
    }

    fn options(&self) -> Result<ServerOptions, Error> {
        let tls = match (self.tls, &self.tls_certs) {
            (TlsMode::Off, _) | (_, None) => None,
            (mode, Some(folder)) => {
                let acceptor = vhd_nbd::tls::acceptor(folder, self.tls_verify_clients)?;
                Some(Tls { acceptor, required: mode == TlsMode::Required })
            }
        };
        let limits = Limits {
            requests: self.max_requests.max(1),
            idle: Duration::from_secs(self.idle_timeout),
            handshake: Duration::from_secs(self.handshake_timeout),
            ..Limits::default()
        };
        Ok(ServerOptions { limits, tls, once: self.once })
    }

    /// No more connections than there are descriptors for, beside those that others need.
    fn fit(&self, server: &Server, context: &Context) -> Result<(), Error> {
        let scrapers = self.metrics.as_ref().map_or(0, |_| metrics::MAX_CLIENTS + 2);
        let fitted = server.fit(self.max_connections.map(|most| most.max(1)), scrapers + control::MAX_CLIENTS + 2 + FILES)?;
        if fitted < self.max_connections.unwrap_or(Limits::default().connections) {
            let limit = descriptors::limit();
            context.note(&format!("{fitted} connections at most, as this process may have {limit} open files (ulimit -n)"));
        }
        Ok(())
    }

    /// Anyone on the way could read and change what plain clients send.
    fn check_secure(&self, listen: &Listen) -> Result<(), Error> {
        let Listen::Tcp(address) = listen else { return Ok(()) };
        if self.insecure || self.tls == TlsMode::Required {
            return Ok(());
        }
        let found = address.to_socket_addrs().map_err(|error| Error::io(error, format!("can't listen on {address}")))?;
        match found.into_iter().find(|address| !address.ip().is_loopback()) {
            None => Ok(()),
            Some(_) => {
                let message =
                    format!("other machines reach {address}: --tls required, or --insecure to let anyone read and write");
                Err(Error::new(ErrorKind::Refused, message))
            }
        }
    }

    /// The control socket. A server on stdio has one only when that is asked for: it is part of its client.
    fn control(&self, listen: &Listen, name: &str, admin: &Arc<Admin>) -> Result<Option<Control>, Error> {
        let path = match &self.control {
            Some(path) => path.clone(),
            None if *listen == Listen::Stdio => return Ok(None),
            None => in_runtime_folder(name, control::EXTENSION)?,
        };
        Control::bind(&path, Arc::clone(admin) as _).map(Some)
    }

    fn tell_ready(&self, uri: &str) -> Result<(), Error> {
        let Some(fd) = self.ready_fd else { return Ok(()) };
        // Not as an error of the host: a closed pipe on stdout would be a reader who had enough.
        let failed =
            |error: io::Error| Error::new(ErrorKind::Io, format!("descriptor {fd} of --ready-fd can't be written to: {error}"));
        // A pipe that nobody reads, or that is full, is an error, not something to wait for.
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(nix::libc::O_NONBLOCK);
        let mut file = options.open(format!("/proc/self/fd/{fd}")).map_err(failed)?;
        file.write_all(format!("{uri}\n").as_bytes()).map_err(failed)?;
        drop(file);
        // Who waits for its end should see it.
        nix::unistd::close(fd).map_err(|error| failed(error.into()))
    }
}

/// A socket in the user's runtime folder, named after an export; with the process's number where that is taken.
fn in_runtime_folder(name: &str, extension: &str) -> Result<PathBuf, Error> {
    let folder = runtime::folder()?;
    let name: String = name.chars().map(|letter| if letter == '/' || letter == '\0' { '_' } else { letter }).take(40).collect();
    let name = if name.is_empty() || name.starts_with('.') { format!("disk{name}") } else { name };
    let path = folder.join(format!("{name}.{extension}"));
    let taken = is_served(&path).unwrap_or(false);
    Ok(if taken { folder.join(format!("{name}-{}.{extension}", std::process::id())) } else { path })
}
