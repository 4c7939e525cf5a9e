//! Key material: fixed-size keys parsed from the UAPI's hexadecimal form.

use std::fmt;

use base64::Engine as _;
use boringtun::x25519;
use zeroize::Zeroize;

/// A Curve25519 private key. It has no `Debug` or `Display`, and is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey([u8; 32]);

/// A Curve25519 public key: the name of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

/// A symmetric key mixed into the handshake. It has no `Debug` or `Display`, and is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey([u8; 32]);

impl PrivateKey {
    /// A key from its 32 bytes; `None` for all zeros, which the UAPI uses for "no key".
    pub fn new(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then(|| Self(clamp(bytes)))
    }

    /// The public key that belongs to this key.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.secret()).to_bytes())
    }

    /// The raw bytes, clamped as Curve25519 wants them.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn secret(&self) -> x25519::StaticSecret {
        x25519::StaticSecret::from(self.0)
    }
}

impl PublicKey {
    /// A key from its 32 bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PresharedKey {
    /// A key from its 32 bytes; `None` for all zeros, which the UAPI uses for "no key".
    pub fn new(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then_some(Self(bytes))
    }

    /// The raw bytes.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Drop for PresharedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Thirty-two bytes from exactly 64 hexadecimal digits of either case.
pub fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0u8; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (hex_digit(pair[0])? << 4) | hex_digit(pair[1])?;
    }
    Some(bytes)
}

/// Appends the lower-case hexadecimal form of `bytes` to `out`.
pub fn push_hex(out: &mut String, bytes: &[u8; 32]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

// The kernel stores the clamped form and shows that one; `wg syncconf` compares against it.
fn clamp(mut bytes: [u8; 32]) -> [u8; 32] {
    bytes[0] &= 248;
    bytes[31] = (bytes[31] & 127) | 64;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_refuses_wrong_lengths() {
        let bytes: [u8; 32] = std::array::from_fn(|i| (i * 7) as u8);
        let mut text = String::new();
        push_hex(&mut text, &bytes);
        assert_eq!(parse_hex(&text), Some(bytes));
        assert_eq!(parse_hex(&text.to_uppercase()), Some(bytes));
        assert_eq!(parse_hex(&text[1..]), None);
        assert_eq!(parse_hex(&format!("{text}0")), None);
        assert_eq!(parse_hex(&text.replace('0', "g")), None);
        assert_eq!(parse_hex(&"é".repeat(32)), None);
    }

    #[test]
    fn secrets_never_reach_debug_output() {
        let private = PrivateKey::new([7; 32]).unwrap();
        let preshared = PresharedKey::new([7; 32]).unwrap();
        assert_eq!(format!("{private:?}{preshared:?}"), "PrivateKey(..)PresharedKey(..)");
    }

    #[test]
    fn all_zero_keys_mean_no_key() {
        assert!(PrivateKey::new([0; 32]).is_none());
        assert!(PresharedKey::new([0; 32]).is_none());
    }
}
