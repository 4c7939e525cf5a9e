//! Curve25519 keys in the textual form of wg(8).

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes in a key.
const KEY_LEN: usize = 32;
/// Characters of a key in base64 with padding, as wg(8) prints it.
const TEXT_LEN: usize = 44;

/// Why a text is not a key. Never contains the text: it may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not 44 characters.
    #[error("a key has 44 characters of base64, this has {0}")]
    Length(usize),
    /// Not base64, or not in its canonical form.
    #[error("not a key: no canonical base64 as `wg genkey` prints it")]
    Base64,
    /// All zero, or a point of small order that every private key maps to zero.
    #[error("not a usable key: it is zero or of small order")]
    Weak,
    /// The system's random source failed.
    #[error("the system gives no random bytes")]
    Random,
}

fn decode(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, KeyError> {
    if text.len() != TEXT_LEN {
        return Err(KeyError::Length(text.chars().count()));
    }
    let mut bytes = Zeroizing::new([0u8; KEY_LEN + 1]);
    let written = STANDARD.decode_slice(text, bytes.as_mut_slice()).map_err(|_| KeyError::Base64)?;
    if written != KEY_LEN {
        return Err(KeyError::Base64);
    }
    let mut key = Zeroizing::new([0u8; KEY_LEN]);
    key.copy_from_slice(&bytes[..KEY_LEN]);
    Ok(key)
}

/// A Curve25519 public key; prints as base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; KEY_LEN]);

impl PublicKey {
    /// The key of these bytes.
    ///
    /// # Errors
    /// [`KeyError::Weak`] for points of small order (RFC 7748, section 6.1): with them every shared secret is zero.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Result<Self, KeyError> {
        // Any clamped scalar is a multiple of the cofactor, so it sends exactly the small-order points to zero.
        let probe = StaticSecret::from([0x42; KEY_LEN]);
        if probe.diffie_hellman(&x25519_dalek::PublicKey::from(bytes)).was_contributory() {
            Ok(Self(bytes))
        } else {
            Err(KeyError::Weak)
        }
    }

    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Lower-case hexadecimal, as the userspace API wants it.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
        }
    }
    text
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(*decode(text)?)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;
    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A Curve25519 private key. Wiped on drop; no `Debug`, no `Display`.
///
/// ```compile_fail
/// let key = mesh_keyring::PrivateKey::generate().unwrap();
/// println!("{key:?}");
/// ```
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; KEY_LEN]);

impl PrivateKey {
    /// A fresh key from the system's random source.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0u8; KEY_LEN]);
        getrandom::fill(bytes.as_mut_slice()).map_err(|_| KeyError::Random)?;
        Self::from_bytes(&bytes)
    }

    /// The key of these bytes, clamped as in RFC 7748, section 5.
    ///
    /// # Errors
    /// [`KeyError::Weak`] when all bytes are zero.
    pub fn from_bytes(bytes: &[u8; KEY_LEN]) -> Result<Self, KeyError> {
        if bytes.iter().all(|&b| b == 0) {
            return Err(KeyError::Weak);
        }
        let mut key = Self(*bytes);
        key.0[0] &= 248;
        key.0[31] = (key.0[31] & 127) | 64;
        Ok(key)
    }

    /// The key in wg(8)'s base64.
    ///
    /// # Errors
    /// [`KeyError`] says what is wrong without showing the text.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&*decode(text)?)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let secret = StaticSecret::from(self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }

    /// wg(8)'s base64, wiped on drop.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0))
    }

    /// Lower-case hexadecimal for the userspace API, wiped on drop.
    pub fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(hex(&self.0))
    }

    /// The secret that only the holders of the two private keys know (RFC 7748, section 6.1). It is to be put through a KDF.
    pub fn shared_secret(&self, with: &PublicKey) -> Zeroizing<[u8; KEY_LEN]> {
        let secret = StaticSecret::from(self.0);
        let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(with.0));
        Zeroizing::new(shared.to_bytes())
    }

    /// The raw bytes, for the kernel's netlink API.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

/// A 256-bit preshared key. Wiped on drop; no `Debug`, no `Display`.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; KEY_LEN]);

impl PresharedKey {
    /// The key in wg(8)'s base64.
    ///
    /// # Errors
    /// [`KeyError`]; the all-zero key means "none" in WireGuard and is refused as [`KeyError::Weak`].
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        let bytes = decode(text)?;
        if bytes.iter().all(|&b| b == 0) {
            return Err(KeyError::Weak);
        }
        Ok(Self(*bytes))
    }

    /// Lower-case hexadecimal for the userspace API, wiped on drop.
    pub fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(hex(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn public_key_matches_rfc_7748_section_6_1() {
        let private: [u8; 32] = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
            0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = PrivateKey::from_bytes(&private).unwrap().public();
        assert_eq!(public.to_hex(), "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a");
    }

    #[test]
    fn both_ends_of_a_pair_know_one_secret() {
        let [a, b, c] = std::array::from_fn(|_| PrivateKey::generate().unwrap());
        assert_eq!(*a.shared_secret(&b.public()), *b.shared_secret(&a.public()));
        assert_ne!(*a.shared_secret(&b.public()), *a.shared_secret(&c.public()));
    }

    #[test]
    fn generated_keys_are_clamped_and_differ() {
        let (a, b) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        assert!(a.expose() != b.expose());
        assert_eq!(a.expose()[0] & 7, 0);
        assert_eq!(a.expose()[31] & 0xc0, 0x40);
    }

    #[test]
    fn keys_that_are_no_keys_are_refused_without_being_shown() {
        let zero = STANDARD.encode([0u8; 32]);
        assert_eq!(zero.parse::<PublicKey>(), Err(KeyError::Weak));
        assert_eq!(PrivateKey::from_base64(&zero).err(), Some(KeyError::Weak));
        let one = STANDARD.encode(std::array::from_fn::<u8, 32, _>(|i| u8::from(i == 0)));
        assert_eq!(one.parse::<PublicKey>(), Err(KeyError::Weak));
        assert_eq!("".parse::<PublicKey>(), Err(KeyError::Length(0)));
        assert_eq!("a".repeat(44).parse::<PublicKey>(), Err(KeyError::Base64));
        assert_eq!("!".repeat(44).parse::<PublicKey>(), Err(KeyError::Base64));
        // The last character of a canonical key carries two bits that have to be zero.
        let text = PrivateKey::generate().unwrap().public().to_string();
        let mut loose = text.clone().into_bytes();
        loose[42] += 1;
        let loose = String::from_utf8(loose).unwrap();
        assert_eq!(loose.parse::<PublicKey>(), Err(KeyError::Base64), "{text}");
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,60}") {
            if let Ok(key) = text.parse::<PublicKey>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }

        #[test]
        fn base64_round_trips(bytes in any::<[u8; 32]>()) {
            if let Ok(key) = PrivateKey::from_bytes(&bytes) {
                let again = PrivateKey::from_base64(&key.to_base64()).unwrap();
                prop_assert!(again.expose() == key.expose());
                let public = key.public();
                prop_assert_eq!(public.to_string().parse::<PublicKey>().unwrap(), public);
            }
        }
    }
}
