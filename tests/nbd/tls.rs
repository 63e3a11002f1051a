//! Encrypted clients, and plain ones where they are not wanted.

use std::fs;
use std::io::Write;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use super::server::{Server, folder_with_disk, has, sh, shell};
use super::support::{done, refused, text};
use super::wire::*;

/// Folders `server`, `client` and `stranger` with certificates; the stranger's authority is another one.
fn certificates(folder: &Path) {
    let authority = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).unwrap().pem();
        (certificate, Issuer::new(params, key))
    };
    let (ours, strangers) = (authority("ours"), authority("another"));
    let leaf = |dir: &str, role: &str, usage: ExtendedKeyUsagePurpose, shown: &str, issuer: &Issuer<'static, KeyPair>| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        params.extended_key_usages = vec![usage];
        let dir = folder.join(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("{role}-cert.pem")), params.signed_by(&key, issuer).unwrap().pem()).unwrap();
        fs::write(dir.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
        fs::write(dir.join("ca-cert.pem"), shown).unwrap();
    };
    leaf("certs", "server", ExtendedKeyUsagePurpose::ServerAuth, &ours.0, &ours.1);
    leaf("client", "client", ExtendedKeyUsagePurpose::ClientAuth, &ours.0, &ours.1);
    // It trusts the server, but the server not it.
    leaf("stranger", "client", ExtendedKeyUsagePurpose::ClientAuth, &ours.0, &strangers.1);
    fs::create_dir_all(folder.join("nobody")).unwrap();
    fs::write(folder.join("nobody/ca-cert.pem"), &ours.0).unwrap();
}

fn address(server: &Server) -> String {
    server.uri.split_once("://").unwrap().1.replace("127.0.0.1", "localhost")
}

#[test]
fn clients_with_certificates_are_served_and_others_are_not() {
    if !has("nbdinfo") || !has("nbdcopy") {
        return;
    }
    let folder = folder_with_disk("8M");
    certificates(folder.path());
    let at = "disk.vhd --control c --listen tcp:127.0.0.1:0 --tls-certs certs";
    let server = Server::start_at(folder.path(), &format!("{at} --tls required --tls-verify-clients"));
    assert!(server.uri.starts_with("nbds://"));
    let uri = |who: &str| format!("nbds://{}?tls-certificates={}", address(&server), folder.path().join(who).display());
    fs::write(folder.path().join("in.raw"), super::support::noise(1, 8 << 20)).unwrap();
    sh(
        folder.path(),
        &format!("nbdcopy in.raw '{}' && nbdcopy '{}' out.raw && cmp in.raw out.raw", uri("client"), uri("client")),
    );
    assert!(sh(folder.path(), &format!("nbdinfo '{}'", uri("client"))).contains("with TLS"));
    for who in ["stranger", "nobody"] {
        let failed = shell(folder.path(), &format!("timeout 20 nbdinfo '{}'", uri(who)));
        assert!(!failed.status.success(), "{who}: {}", text(&failed.stdout));
    }
    let plain = shell(folder.path(), &format!("timeout 20 nbdinfo nbd://{}", address(&server)));
    assert!(text(&plain.stderr).contains("TLS") || !plain.status.success(), "{}", text(&plain.stderr));
    assert!(!plain.status.success());
    server.stop();
    done(folder.path(), "check disk.vhd");
}

#[test]
fn where_tls_is_offered_both_sorts_are_served() {
    if !has("nbdinfo") {
        return;
    }
    let folder = folder_with_disk("8M");
    certificates(folder.path());
    let server = Server::start_at(folder.path(), "disk.vhd --control c --listen tcp:127.0.0.1:0 --tls-certs certs --tls on");
    let plain = sh(folder.path(), &format!("nbdinfo nbd://{}", address(&server)));
    let certificates = folder.path().join("nobody");
    let encrypted =
        sh(folder.path(), &format!("nbdinfo 'nbds://{}?tls-certificates={}'", address(&server), certificates.display()));
    assert!(plain.contains("without TLS") && encrypted.contains("with TLS"));
    server.stop();
}

/// Over a Unix socket, to have the bytes in hand.
#[test]
fn before_tls_nothing_is_told_and_after_it_nothing_of_before_counts() {
    let folder = folder_with_disk("8M");
    certificates(folder.path());
    let server = Server::start(folder.path(), "disk.vhd --tls required --tls-certs certs");
    let mut wire = Wire::connect(&server.socket());
    for (option, data) in
        [(LIST, vec![]), (GO, go_data("", &[])), (OPT_INFO, go_data("", &[])), (STRUCTURED, vec![]), (99, vec![])]
    {
        assert_eq!(wire.option_kind(option, &data), ERR_TLS, "option {option}");
    }
    // What an attacker puts behind it is not taken as said under its protection: the next bytes must be TLS.
    wire.send(b"IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x03\0\0\0\0");
    assert_eq!(wire.option_replies(STARTTLS), [(ACK, vec![])]);
    // It may have ended the session by now.
    let _ = wire.stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
    let answer = super::server::rest(&mut wire.stream);
    assert!(!answer.windows(4).any(|bytes| bytes == b"disk"), "an export was told in plain");
    let mut wire = Wire::connect(&server.socket());
    wire.option_header(EXPORT_NAME, 0);
    assert!(wire.is_over());
    let mut wire = Wire::connect(&server.socket());
    assert_eq!(wire.option_kind(ABORT, &[]), ACK);
    server.stop();
}

#[test]
fn what_would_let_anyone_in_is_refused() {
    let folder = folder_with_disk("8M");
    certificates(folder.path());
    assert!(refused(folder.path(), "serve disk.vhd --listen tcp:0.0.0.0:0").contains("--insecure"));
    let offered = "serve disk.vhd --listen tcp:0.0.0.0:0 --tls on --tls-certs certs";
    assert!(refused(folder.path(), offered).contains("--tls required"));
    assert!(
        refused(folder.path(), "serve disk.vhd --listen unix:s --control c --tls on --tls-certs client")
            .contains("server-cert.pem")
    );
    for (mode, listen) in [("--insecure", "tcp:0.0.0.0:0"), ("--tls required --tls-certs certs", "tcp:0.0.0.0:0")] {
        Server::start_at(folder.path(), &format!("disk.vhd --control c --listen {listen} {mode}")).stop();
    }
}

/// What was agreed on in plain counts no more: replies are simple again, and no context is chosen.
#[test]
fn tls_begins_anew() {
    if !has("nbdinfo") {
        return;
    }
    let folder = folder_with_disk("8M");
    certificates(folder.path());
    let server = Server::start_at(folder.path(), "disk.vhd --control c --listen tcp:127.0.0.1:0 --tls-certs certs --tls on");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nbd/starttls.py");
    let said = sh(folder.path(), &format!("/usr/bin/python3 {} {} nobody/ca-cert.pem", script.display(), server.port()));
    assert_eq!(said, "as expected\n");
    server.stop();
}
