//! Certificates and keys.

mod der;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};
use vhd_core::{Error, ErrorKind, Result};

/// The names that QEMU, nbdkit and libnbd know, too.
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";
const AUTHORITY: &str = "ca-cert.pem";
/// Bytes of one of them at most.
const MAX_FILE: u64 = 1 << 20;

/// Makes what TLS needs of a folder with `server-cert.pem` and `server-key.pem`, and, where clients must have a
/// certificate too, `ca-cert.pem`, whose owner must have signed it.
///
/// # Errors
/// As a file can't be read, is none of these, or does not go with the others.
pub fn acceptor(folder: &Path, verify_clients: bool) -> Result<TlsAcceptor> {
    let certificates = certificates(&folder.join(CERTIFICATE))?;
    let provider = Arc::new(crypto::aws_lc_rs::default_provider());
    let wrong = |error: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidInput, format!("can't be used for TLS: {error}"));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| wrong(&error).at(folder))?;
    let builder = if verify_clients {
        let path = folder.join(AUTHORITY);
        let mut roots = RootCertStore::empty();
        for certificate in self::certificates(&path)? {
            roots.add(certificate).map_err(|error| wrong(&error).at(&path))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
        builder.with_client_cert_verifier(verifier.map_err(|error| wrong(&error).at(&path))?)
    } else {
        builder.with_no_client_auth()
    };
    let certified = certified(folder, certificates, &provider)?;
    Ok(TlsAcceptor::from(Arc::new(builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified))))))
}

/// The server's certificates with their key. (rustls makes the same, but takes no certificates of version 1, which clients do.)
fn certified(folder: &Path, certificates: Vec<CertificateDer<'static>>, provider: &CryptoProvider) -> Result<CertifiedKey> {
    let path = folder.join(KEY);
    let invalid = |message: String, path: &Path| Error::new(ErrorKind::InvalidInput, message).at(path);
    let key = private_key(&path)?;
    let what = der::describe(&key);
    let signing = provider.key_provider.load_private_key(key).map_err(|_| {
        let served = "RSA of 2048 to 8192 bits, EC on P-256, P-384 or P-521, or Ed25519";
        invalid(format!("holds {what}, which TLS is not served with; expected a key of these: {served}"), &path)
    })?;
    let certificate = folder.join(CERTIFICATE);
    let of_certificate = certificates.first().and_then(|first| der::public_key_of(first));
    let of_certificate = of_certificate
        .ok_or_else(|| invalid("is no certificate: what its PEM holds is not X.509; expected one".into(), &certificate))?;
    if signing.public_key().is_some_and(|of_key| of_key.as_ref() != of_certificate) {
        let message = format!(
            "is {what}, but not that of {}: they were made for each other, so take both from one place",
            certificate.display()
        );
        return Err(invalid(message, &path));
    }
    Ok(CertifiedKey::new(certificates, signing))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let text = read(path)?;
    if [&b"ENCRYPTED PRIVATE KEY-----"[..], b"Proc-Type: 4,ENCRYPTED"].iter().any(|mark| contains(&text, mark)) {
        let message =
            "is encrypted, and nobody is there to be asked for its passphrase: openssl pkey -in FILE -out FILE decrypts it";
        return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| pem_error(&error, "private key").at(path))
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = read(path)?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<std::result::Result<Vec<_>, _>>();
    let found = found.map_err(|error| pem_error(&error, "certificate").at(path))?;
    if found.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "has no certificate, expected one in PEM form").at(path));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut text));
    let len = read.map_err(|error| Error::io(error, "can't be read").at(path))?;
    if len as u64 > MAX_FILE {
        let message = format!("has more than {MAX_FILE} bytes, which no certificates and keys have");
        return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
    }
    Ok(text)
}

fn pem_error(error: &PemError, what: &str) -> Error {
    let message = match error {
        PemError::NoItemsFound => format!("has no {what}, expected one in PEM form (-----BEGIN ...)"),
        other => format!("has no {what} that can be read: its PEM is damaged: {other:?}"),
    };
    Error::new(ErrorKind::InvalidInput, message)
}
