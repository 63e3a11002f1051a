//! Certificates.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};
use vhd_core::{Error, ErrorKind, Result};

/// The names that QEMU, nbdkit and libnbd know, too.
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";
const AUTHORITY: &str = "ca-cert.pem";

/// Makes what TLS needs of a folder with `server-cert.pem` and `server-key.pem`, and, where clients must have a
/// certificate too, `ca-cert.pem`, whose owner must have signed it.
///
/// # Errors
/// As a file can't be read, is none of these, or does not go with the others.
pub fn acceptor(folder: &Path, verify_clients: bool) -> Result<TlsAcceptor> {
    let certificates = certificates(&folder.join(CERTIFICATE))?;
    let key_path = folder.join(KEY);
    let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|error| pem_error(&error).at(&key_path))?;
    let provider = Arc::new(crypto::ring::default_provider());
    let wrong = |error: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidInput, format!("can't be used for TLS: {error}"));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| wrong(&error).at(folder))?;
    let builder = if verify_clients {
        let path = folder.join(AUTHORITY);
        let mut roots = RootCertStore::empty();
        for certificate in self::certificates(&path)? {
            roots.add(certificate).map_err(|error| wrong(&error).at(&path))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.map_err(|error| wrong(&error).at(&path))?)
    } else {
        builder.with_no_client_auth()
    };
    let config = builder.with_single_cert(certificates, key).map_err(|error| wrong(&error).at(&key_path))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    let found = found.map_err(|error| pem_error(&error).at(path))?;
    if found.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "has no certificate, expected one in PEM form").at(path));
    }
    Ok(found)
}

fn pem_error(error: &PemError) -> Error {
    match error {
        PemError::Io(error) => Error::io(std::io::Error::new(error.kind(), error.to_string()), "can't be read"),
        other => Error::new(ErrorKind::InvalidInput, format!("is not in PEM form: {other:?}")),
    }
}
