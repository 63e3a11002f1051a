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

/// A folder `keys` with a key of each kind, made by OpenSSL, and a certificate for each, signed by one authority.
fn openssl_keys(folder: &Path, keys: &[(&str, &str)]) {
    fs::create_dir(folder.join("keys")).unwrap();
    fs::write(folder.join("san"), "subjectAltName=DNS:localhost\n").unwrap();
    sh(
        folder,
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca-key.pem -out keys/ca-cert.pem -subj /CN=us \
         -addext basicConstraints=critical,CA:TRUE 2>&1",
    );
    for (name, make) in keys {
        let sign = "openssl req -new -key KEY -subj /CN=localhost | openssl x509 -req -CA keys/ca-cert.pem -CAkey ca-key.pem \
                    -set_serial 1 -extfile san -out CERT 2>&1";
        let key = format!("keys/{name}/server-key.pem");
        let sign = sign.replace("KEY", &key).replace("CERT", &format!("keys/{name}/server-cert.pem"));
        sh(folder, &format!("mkdir keys/{name}; cp keys/ca-cert.pem keys/{name}; {} 2>&1; {sign}", make.replace("KEY", &key)));
    }
}

#[test]
fn keys_of_all_usual_kinds_and_forms_are_served() {
    if !has("nbdinfo") || !has("openssl") {
        return;
    }
    let folder = folder_with_disk("8M");
    let keys = [
        ("rsa2048", "openssl genrsa -out KEY 2048"),
        ("rsa2560", "openssl genrsa -out KEY 2560"),
        ("rsa2050pkcs1", "openssl genrsa -traditional -out KEY 2050"),
        // To make one takes a minute. Nobody but this test uses it.
        ("rsa8192", "cp rsa8192.pem KEY"),
        ("p256", "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY"),
        ("p384sec1", "openssl ecparam -name secp384r1 -genkey -out KEY"),
        ("p521", "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-521 -out KEY"),
        ("p521sec1", "openssl ecparam -name secp521r1 -genkey -noout -out KEY"),
        ("ed25519", "openssl genpkey -algorithm ed25519 -out KEY"),
    ];
    fs::write(folder.path().join("rsa8192.pem"), include_bytes!("rsa8192.pem")).unwrap();
    openssl_keys(folder.path(), &keys);
    // A certificate without extensions is of version 1.
    sh(
        folder.path(),
        "mkdir keys/v1; cp keys/ca-cert.pem keys/p256/server-key.pem keys/v1; openssl req -new -key keys/v1/server-key.pem -subj /CN=localhost \
         | openssl x509 -req -CA keys/ca-cert.pem -CAkey ca-key.pem -set_serial 1 -out keys/v1/server-cert.pem 2>&1; \
         openssl x509 -in keys/v1/server-cert.pem -noout -text | grep -q 'Version: 1'",
    );
    for name in keys.iter().map(|(name, _)| *name).chain(["v1"]) {
        let at = format!("disk.vhd --control c --listen tcp:127.0.0.1:0 --tls required --tls-certs keys/{name}");
        let server = Server::start_at(folder.path(), &at);
        let uri = format!("nbds://{}?tls-certificates={}/keys", address(&server), folder.path().display());
        assert_eq!(sh(folder.path(), &format!("nbdinfo --size '{uri}'")).trim(), (8 << 20).to_string(), "{name}");
        server.stop();
    }
}

#[test]
fn what_can_not_be_served_is_told_as_what_it_is() {
    if !has("openssl") {
        return;
    }
    let folder = folder_with_disk("8M");
    let keys = [
        ("rsa1024", "openssl genrsa -out KEY 1024"),
        ("koblitz", "openssl ecparam -name secp256k1 -genkey -noout -out KEY"),
        ("ed448", "openssl genpkey -algorithm ed448 -out KEY"),
        ("good", "openssl genrsa -out KEY 2048"),
        ("other", "openssl genrsa -out KEY 2048"),
        ("encrypted", "openssl genrsa -out KEY 2048"),
        ("old", "openssl genrsa -out KEY 2048"),
        ("empty", "openssl genrsa -out KEY 2048"),
        ("nocert", "openssl genrsa -out KEY 2048"),
    ];
    openssl_keys(folder.path(), &keys);
    sh(
        folder.path(),
        "cp keys/good/server-key.pem keys/other/; \
         openssl pkey -aes256 -passout pass:secret -in keys/good/server-key.pem -out keys/encrypted/server-key.pem; \
         openssl rsa -traditional -aes256 -passout pass:secret -in keys/good/server-key.pem -out keys/old/server-key.pem 2>&1; \
         echo nothing > keys/empty/server-key.pem; cp keys/good/server-key.pem keys/nocert/server-cert.pem",
    );
    for (name, file, says) in [
        ("rsa1024", "server-key.pem", "an RSA key of 1024 bits"),
        ("koblitz", "server-key.pem", "an EC key on secp256k1"),
        ("ed448", "server-key.pem", "an Ed448 key"),
        ("other", "server-key.pem", "is an RSA key of 2048 bits, but not that of keys/other/server-cert.pem"),
        ("encrypted", "server-key.pem", "is encrypted"),
        ("old", "server-key.pem", "is encrypted"),
        ("empty", "server-key.pem", "has no private key"),
        ("nocert", "server-cert.pem", "has no certificate"),
    ] {
        let said =
            refused(folder.path(), &format!("serve disk.vhd --listen unix:s --control c --tls required --tls-certs keys/{name}"));
        assert!(said.starts_with(&format!("vhd: keys/{name}/{file}: ")) && said.contains(says), "{said}");
    }
    Server::start(folder.path(), "disk.vhd --tls required --tls-certs keys/good").stop();
}
