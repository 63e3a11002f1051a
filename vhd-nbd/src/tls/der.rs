//! As much of keys and certificates as it takes to say what one is.

use tokio_rustls::rustls::pki_types::PrivateKeyDer;

const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
/// Where something is that may be left out: a certificate's version, a key's curve.
const OPTIONAL_FIRST: u8 = 0xA0;

const RSA: &str = "1.2.840.113549.1.1.1";
const EC: &str = "1.2.840.10045.2.1";
/// Names of what is not served, so that a message says more than a number.
const NAMES: [(&str, &str); 9] = [
    ("1.2.840.113549.1.1.10", "an RSA key for PSS alone"),
    ("1.2.840.10040.4.1", "a DSA key"),
    ("1.2.840.113549.1.3.1", "a Diffie-Hellman key"),
    ("1.3.101.110", "an X25519 key"),
    ("1.3.101.111", "an X448 key"),
    ("1.3.101.113", "an Ed448 key"),
    ("1.3.132.0.10", "an EC key on secp256k1"),
    ("1.3.36.3.3.2.8.1.1.7", "an EC key on brainpoolP256r1"),
    ("1.3.132.0.33", "an EC key on P-224"),
];

/// One value: its tag, its content, itself as a whole, and what follows it.
struct Value<'a> {
    tag: u8,
    content: &'a [u8],
    whole: &'a [u8],
    rest: &'a [u8],
}

fn value(bytes: &[u8]) -> Option<Value<'_>> {
    let (&[tag, short], after) = bytes.split_first_chunk::<2>()?;
    let (len, after) = match short {
        ..=0x7F => (usize::from(short), after),
        // Four bytes of a length are more than any key has.
        0x81..=0x84 => {
            let (long, after) = after.split_at_checked(usize::from(short - 0x80))?;
            (long.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), after)
        }
        _ => return None,
    };
    let (content, rest) = after.split_at_checked(len)?;
    Some(Value { tag, content, whole: &bytes[..bytes.len() - rest.len()], rest })
}

/// The content of the value that begins here, and what follows it.
fn take(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let value = value(bytes).filter(|value| value.tag == tag)?;
    Some((value.content, value.rest))
}

/// The public key of a certificate of any version, with its algorithm.
pub(super) fn public_key_of(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = take(certificate, SEQUENCE)?;
    let (mut body, _) = take(certificate, SEQUENCE)?;
    if let Some((_version, after)) = take(body, OPTIONAL_FIRST) {
        body = after;
    }
    let (_serial, mut after) = take(body, INTEGER)?;
    for _signature_issuer_validity_subject in 0..4 {
        (_, after) = take(after, SEQUENCE)?;
    }
    value(after).map(|key| key.whole)
}

/// What a private key is, in words.
pub(super) fn describe(key: &PrivateKeyDer<'_>) -> String {
    let described = match key {
        PrivateKeyDer::Pkcs1(key) => rsa(key.secret_pkcs1_der()),
        PrivateKeyDer::Sec1(key) => sec1(key.secret_sec1_der()),
        PrivateKeyDer::Pkcs8(key) => pkcs8(key.secret_pkcs8_der()),
        _ => None,
    };
    described.unwrap_or_else(|| "what is no private key".to_owned())
}

fn rsa(key: &[u8]) -> Option<String> {
    let (key, _) = take(key, SEQUENCE)?;
    let (_version, after) = take(key, INTEGER)?;
    let (modulus, _) = take(after, INTEGER)?;
    let start = modulus.iter().position(|byte| *byte != 0)?;
    let bits = (modulus.len() - start) * 8 - modulus[start].leading_zeros() as usize;
    Some(format!("an RSA key of {bits} bits"))
}

fn sec1(key: &[u8]) -> Option<String> {
    let (key, _) = take(key, SEQUENCE)?;
    let (_version, after) = take(key, INTEGER)?;
    let (_secret, after) = take(after, OCTET_STRING)?;
    let (curve, _) = take(after, OPTIONAL_FIRST)?;
    Some(name_of(take(curve, OBJECT)?.0, "an EC key on curve"))
}

fn pkcs8(key: &[u8]) -> Option<String> {
    let (key, _) = take(key, SEQUENCE)?;
    let (_version, after) = take(key, INTEGER)?;
    let (algorithm, after) = take(after, SEQUENCE)?;
    let (kind, parameters) = take(algorithm, OBJECT)?;
    match dotted(kind).as_str() {
        RSA => rsa(take(after, OCTET_STRING)?.0),
        EC => Some(name_of(take(parameters, OBJECT)?.0, "an EC key on curve")),
        _ => Some(name_of(kind, "a key of kind")),
    }
}

fn name_of(object: &[u8], otherwise: &str) -> String {
    let number = dotted(object);
    let named = NAMES.iter().find(|(known, _)| *known == number);
    named.map_or_else(|| format!("{otherwise} {number}"), |(_, name)| (*name).to_owned())
}

/// An object identifier as people write it.
fn dotted(object: &[u8]) -> String {
    let (mut numbers, mut number) = (Vec::new(), 0_u64);
    for byte in object {
        number = number << 7 | u64::from(byte & 0x7F);
        if byte & 0x80 == 0 {
            numbers.push(std::mem::take(&mut number));
        }
    }
    // The first two share one.
    let (first, rest) = numbers.split_first().map_or((0, &[][..]), |(first, rest)| (*first, rest));
    let root = (first / 40).min(2);
    let numbers = [root, first - root * 40].into_iter().chain(rest.iter().copied());
    numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_written_as_people_do() {
        assert_eq!(dotted(&[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01]), RSA);
        assert_eq!(dotted(&[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01]), EC);
        assert_eq!(name_of(&[0x2B, 0x65, 0x71], ""), "an Ed448 key");
        assert_eq!(dotted(&[]), "0.0");
    }

    #[test]
    fn what_is_cut_short_or_too_long_is_nothing() {
        let whole = [SEQUENCE, 0x82, 0x00, 0x03, INTEGER, 0x01, 0x07];
        assert_eq!(take(&whole, SEQUENCE).map(|(content, _)| content), Some(&whole[4..]));
        assert!((0..whole.len()).all(|len| value(&whole[..len]).is_none()));
        assert!(value(&[SEQUENCE, 0x84, 0xFF, 0xFF, 0xFF, 0xFF, 0]).is_none() && value(&[SEQUENCE, 0x80]).is_none());
        assert!(public_key_of(&whole).is_none());
    }
}
