//! The least that an NBD server of a raw file can be: a thread for each connection that reads what has come, does it with
//! `pread` and `pwrite`, and answers with one call. No limits, no fairness, no check of anything: what the socket and
//! the file cost whoever serves them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::Result;

/// As much as `vhd serve` takes at once.
const WINDOW: usize = 128 << 10;
const OPTION_REPLY: u64 = 0x0003_E889_0455_65A9;
const REQUEST_LEN: usize = 28;

/// Serves `file` at `socket`, until the process is ended.
pub fn serve(file: &Path, socket: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(file)?;
    let len = file.metadata()?.len();
    let listener = UnixListener::bind(socket)?;
    std::thread::scope(|scope| {
        for client in listener.incoming() {
            let (client, file) = (client?, &file);
            scope.spawn(move || {
                // A client that went is all that goes wrong here.
                let _ = handshake(&client, len).and_then(|()| transmission(&client, file));
            });
        }
        Ok(())
    })
}

fn number<const LEN: usize>(mut from: impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes[8 - LEN..])?;
    Ok(u64::from_be_bytes(bytes))
}

/// Fixed newstyle, of which only GO is taken.
fn handshake(mut client: &UnixStream, len: u64) -> io::Result<()> {
    client.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    number::<4>(client)?;
    loop {
        number::<8>(client)?;
        let option = number::<4>(client)?;
        io::copy(&mut client.take(number::<4>(client)?), &mut io::sink())?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
            bytes.extend((option as u32).to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            client.write_all(&bytes)
        };
        match option {
            6 | 7 => {
                // NBD_INFO_EXPORT: size, and that there are flags, flushes and several connections.
                let mut info = vec![0, 0];
                info.extend(len.to_be_bytes());
                info.extend([1, 5]);
                reply(3, &info)?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(());
                }
            }
            _ => reply(0x8000_0001, &[])?,
        }
    }
}

fn transmission(mut client: &UnixStream, file: &File) -> io::Result<()> {
    let mut window = vec![0; 2 * WINDOW];
    let (mut filled, mut replies) = (0, Vec::new());
    loop {
        let count = client.read(&mut window[filled..])?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let mut at = 0;
        while let Some(request) = window[at..filled].first_chunk::<REQUEST_LEN>() {
            let part = |from: usize, to: usize| &request[from..to];
            let (kind, offset, len) = (request[7], number::<8>(part(16, 24))?, number::<4>(part(24, 28))? as usize);
            let end = at + REQUEST_LEN + if kind == 1 { len } else { 0 };
            if end > filled {
                break;
            }
            replies.extend(0x6744_6698_u32.to_be_bytes());
            replies.extend([0; 4]);
            replies.extend(part(8, 16));
            match kind {
                0 => {
                    let start = replies.len();
                    replies.resize(start + len, 0);
                    file.read_exact_at(&mut replies[start..], offset)?;
                }
                1 => file.write_all_at(&window[at + REQUEST_LEN..end], offset)?,
                2 => return Ok(()),
                _ => {}
            }
            at = end;
            // The client goes on with what it has, as with any server.
            if replies.len() >= WINDOW {
                client.write_all(&replies)?;
                replies.clear();
            }
        }
        window.copy_within(at..filled, 0);
        filled -= at;
        client.write_all(&replies)?;
        replies.clear();
    }
}
