//! A connection from its first byte to its last.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::{LEAVING, Server, accept::Pipes};
use crate::client::{Client, Phase};
use crate::connection::{self, Reader, Socket};
use crate::handshake::{Handshake, Session, Step};
use crate::limits::Live;
use crate::peer::Peer;

/// Bytes that are read at once in a handshake.
const WINDOW: usize = 4096;

/// A stream that a client came by.
pub(super) enum Incoming {
    Tcp(TcpStream),
    Unix(UnixStream),
    Pipes(Pipes),
}

/// What a handshake came to.
enum Agreed {
    Session(Box<Session>),
    StartTls,
    Nothing,
}

impl Server {
    /// Serves a client in a task of its own.
    pub(super) fn spawn(self: &Arc<Self>, stream: Incoming, peer: Peer, from: String) -> Option<tokio::task::JoinHandle<()>> {
        let most = self.most.load(Ordering::Relaxed);
        let live = Live::one_more(&self.live, most + LEAVING)?;
        let client = self.clients.add(peer, from, most)?;
        let server = Arc::clone(self);
        Some(tokio::spawn(async move {
            let ended = tokio::select! {
                ended = server.client(&client, stream, live) => ended,
                () = client.given_up() => Ok(()),
            };
            match ended {
                Ok(()) => tracing::debug!("client {}: gone after {} requests", client.id, client.requests()),
                Err(error) => tracing::debug!("client {}: {error}", client.id),
            }
            server.clients.remove(&client);
            // One waits for the end of all, another for the end of the server.
            server.left.notify_waiters();
            server.left.notify_one();
        }))
    }

    async fn client(&self, client: &Arc<Client>, mut stream: Incoming, live: Live) -> io::Result<()> {
        let mut handshake = None;
        let mut ahead = Vec::new();
        let agreed = match &mut stream {
            Incoming::Tcp(stream) => self.negotiate(client, stream, &mut handshake, &mut ahead).await?,
            Incoming::Unix(stream) => self.negotiate(client, stream, &mut handshake, &mut ahead).await?,
            Incoming::Pipes(pipes) => self.negotiate(client, pipes, &mut handshake, &mut ahead).await?,
        };
        match (agreed, handshake) {
            (Agreed::Session(session), _) => self.plain(client, *session, stream, &ahead, live).await,
            (Agreed::StartTls, Some(handshake)) => match stream {
                Incoming::Tcp(stream) => self.encrypted(client, handshake, stream).await,
                Incoming::Unix(stream) => self.encrypted(client, handshake, stream).await,
                Incoming::Pipes(pipes) => self.encrypted(client, handshake, pipes).await,
            },
            _ => Ok(()),
        }
    }

    /// Talks until something is agreed on. Bytes that came after it are left in `ahead`.
    async fn negotiate(
        &self,
        client: &Client,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
        handshake: &mut Option<Handshake>,
        ahead: &mut Vec<u8>,
    ) -> io::Result<Agreed> {
        let mut out = Vec::new();
        let handshake = handshake.get_or_insert_with(|| Handshake::new(self.tls_policy(), &mut out));
        let mut phase = client.phase();
        loop {
            let mut input = ahead.as_slice();
            let before = input.len();
            if client.is_ending() {
                handshake.shut_down();
            }
            let step = handshake.feed(&mut input, &self.table, &mut out);
            let taken = before - input.len();
            ahead.drain(..taken);
            if !out.is_empty() {
                stream.write_all(&out).await?;
                stream.flush().await?;
                out.clear();
            }
            match step {
                Step::Done(session) => return Ok(Agreed::Session(session)),
                Step::StartTls => {
                    // What came with it was said by nobody knows whom.
                    ahead.clear();
                    return Ok(Agreed::StartTls);
                }
                Step::End => return Ok(Agreed::Nothing),
                Step::More if taken > 0 => continue,
                Step::More => {}
            }
            let mut window = [0; WINDOW];
            let read = stream.read(&mut window);
            let count = tokio::select! {
                biased;
                count = read => count?,
                // A client that says nothing needs no answer.
                _ = phase.wait_for(|phase| *phase != Phase::Serving) => return Ok(Agreed::Nothing),
            };
            if count == 0 {
                return Ok(Agreed::Nothing);
            }
            ahead.extend_from_slice(&window[..count]);
        }
    }

    async fn encrypted(
        &self,
        client: &Arc<Client>,
        handshake: Handshake,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> io::Result<()> {
        let Some(tls) = &self.options.tls else { return Ok(()) };
        let mut stream = tls.acceptor.accept(stream).await?;
        let (mut ahead, mut handshake) = (Vec::new(), handshake);
        handshake.encrypted();
        let agreed = self.negotiate(client, &mut stream, &mut Some(handshake), &mut ahead).await?;
        let Agreed::Session(session) = agreed else {
            return stream.shutdown().await;
        };
        let (reader, writer) = tokio::io::split(stream);
        self.transmit(client, *session, true, (reader, &ahead), (None, Some(writer))).await
    }

    async fn plain(&self, client: &Arc<Client>, session: Session, stream: Incoming, ahead: &[u8], live: Live) -> io::Result<()> {
        let socket = match stream {
            Incoming::Tcp(stream) => Socket::new(stream.into_std()?.into(), live),
            Incoming::Unix(stream) => Socket::new(stream.into_std()?.into(), live),
            Incoming::Pipes(pipes) => {
                let (reader, writer) = pipes.into_split();
                return self.transmit(client, session, false, (reader, ahead), (None, Some(writer))).await;
            }
        };
        let socket = Arc::new(socket);
        let reader = Reader::new(Arc::clone(&socket));
        self.transmit(client, session, false, (reader, ahead), (Some(socket), None::<tokio::io::Empty>)).await
    }

    async fn transmit(
        &self,
        client: &Arc<Client>,
        session: Session,
        encrypted: bool,
        input: (impl AsyncRead + Unpin + Send + 'static, &[u8]),
        output: (Option<Arc<Socket>>, Option<impl AsyncWrite + Unpin + Send + 'static>),
    ) -> io::Result<()> {
        let visit = self.table.get(&session.export.name).and_then(|export| export.enter());
        let Some(visit) = visit else { return Ok(()) };
        client.chose(&session.export.name, encrypted);
        self.clients.served_one.store(true, Ordering::Release);
        connection::serve(&self.shared, Arc::clone(client), session, visit, input, output).await
    }
}
