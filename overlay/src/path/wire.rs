//! Probes as datagrams: sealed for one peer, so that nobody else can make, read or change one.
//!
//! ```text
//! 0     1        2 3         4 .. 11    12 .. 35                      36 ..
//! 0x53  version  reserved    route id   nonce (XChaCha20-Poly1305)    sealed: body of 36 bytes, zeros up to the size
//! ```
//! The first byte is none of WireGuard's message types (WireGuard paper, section 5.4), so that a WireGuard device that gets one on its
//! port drops it. The key is HKDF-SHA256 of the pair's static-static X25519 secret; there is one for each direction, with a
//! route id of its own, so that a probe that comes back to its sender is nobody's.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{KeyInit as _, Tag, XChaCha20Poly1305, XNonce};
use hkdf::Hkdf;
use mesh_keyring::{PrivateKey, PublicKey};
use sha2::Sha256;

/// The first byte of every probe.
pub const MAGIC: u8 = 0x53;
/// The second byte.
pub const VERSION: u8 = 1;
/// Bytes before the route id.
pub const HEADER: usize = 4;
/// Bytes of a route id.
pub const ID: usize = 8;
/// Bytes of a nonce.
pub const NONCE: usize = 24;
const TAG: usize = 16;
const BODY: usize = 36;
/// Bytes of the smallest probe, which is the size of every answer: no answer is larger than its question.
pub const LEAST: usize = HEADER + ID + NONCE + BODY + TAG;
/// The largest UDP payload that is sent or read, in bytes: a jumbo frame's.
pub const MOST: usize = 9216;

/// What finds the pair that a probe belongs to before anything is deciphered. It tells an onlooker no more than the endpoints do.
pub type RouteId = [u8; ID];

/// What a probe is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Wants an answer.
    Question,
    /// Is one.
    Answer {
        /// Where the question came from, as the peer saw it: the reflexive address.
        seen: SocketAddr,
    },
}

/// A probe's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Question or answer.
    pub kind: Kind,
    /// The question's number, which its answer repeats.
    pub number: u64,
    /// The largest packet that the sender knows to reach the other end on this path, in bytes of IP; 0 when it does not know yet.
    pub mtu: u16,
}

/// The secrets of one pair, as one of its ends has them.
pub struct Secrets {
    sending: (RouteId, XChaCha20Poly1305),
    receiving: (RouteId, XChaCha20Poly1305),
}

/// Why a datagram is no probe for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejected {
    /// Not our format, or of another version.
    Format,
    /// Nobody's that we know: no peer's, or our own that came back.
    Stranger,
    /// Not made by the peer that it names, or changed on its way.
    Forged,
}

impl Secrets {
    /// Derives a pair's secrets.
    pub fn derive(own: &PrivateKey, peer: &PublicKey) -> Self {
        let shared = own.shared_secret(peer);
        let own = own.public();
        let direction = |from: &PublicKey, to: &PublicKey| {
            let salt = [from.as_bytes().as_slice(), to.as_bytes().as_slice()].concat();
            let kdf = Hkdf::<Sha256>::new(Some(&salt), shared.as_slice());
            let mut key = zeroize::Zeroizing::new([0; 32]);
            let mut id = [0; ID];
            // 40 bytes at most: SHA-256 gives 8,160.
            let _ = kdf.expand(b"sennit probe key 1", key.as_mut_slice());
            let _ = kdf.expand(b"sennit probe route 1", &mut id);
            (id, XChaCha20Poly1305::new(key.as_slice().into()))
        };
        Self { sending: direction(&own, peer), receiving: direction(peer, &own) }
    }

    /// The route id of what the peer sends us.
    pub fn receiving_id(&self) -> RouteId {
        self.receiving.0
    }

    /// Seals a message into a datagram of `size` bytes, or of [`LEAST`] where that is more. A nonce is used once.
    pub fn seal(&self, message: &Message, size: usize, nonce: [u8; NONCE]) -> Vec<u8> {
        let mut datagram = vec![0; size.clamp(LEAST, MOST)];
        let (head, sealed) = datagram.split_at_mut(HEADER + ID + NONCE);
        head[0] = MAGIC;
        head[1] = VERSION;
        head[HEADER..HEADER + ID].copy_from_slice(&self.sending.0);
        head[HEADER + ID..].copy_from_slice(&nonce);
        let (text, tag) = sealed.split_at_mut(sealed.len() - TAG);
        write_body(message, text);
        // Too long a text is the only error there is.
        if let Ok(made) = self.sending.1.encrypt_in_place_detached(XNonce::from_slice(&nonce), head, text) {
            tag.copy_from_slice(&made);
        }
        datagram
    }

    /// Opens a datagram, in place.
    ///
    /// # Errors
    /// [`Rejected`].
    pub fn open(&self, datagram: &mut [u8]) -> Result<Message, Rejected> {
        if route_id(datagram) != Ok(self.receiving.0) {
            return Err(Rejected::Stranger);
        }
        let (head, sealed) = datagram.split_at_mut(HEADER + ID + NONCE);
        let (text, tag) = sealed.split_at_mut(sealed.len() - TAG);
        let nonce = XNonce::from_slice(&head[HEADER + ID..]);
        let cipher = &self.receiving.1;
        cipher
            .decrypt_in_place_detached(nonce, head, text, Tag::from_slice(tag))
            .map_err(|_| Rejected::Forged)?;
        read_body(text).ok_or(Rejected::Format)
    }
}

/// Whom a datagram claims to be from.
///
/// # Errors
/// [`Rejected::Format`].
pub fn route_id(datagram: &[u8]) -> Result<RouteId, Rejected> {
    if !(LEAST..=MOST).contains(&datagram.len()) || datagram[..HEADER] != [MAGIC, VERSION, 0, 0] {
        return Err(Rejected::Format);
    }
    datagram[HEADER..HEADER + ID].try_into().map_err(|_| Rejected::Format)
}

/// The nonce of a datagram that [`route_id`] took for a probe.
pub fn nonce(datagram: &[u8]) -> Option<[u8; NONCE]> {
    datagram.get(HEADER + ID..HEADER + ID + NONCE)?.try_into().ok()
}

// Kind, padding, MTU, number, address as 16 bytes, port, 6 bytes for later.
fn write_body(message: &Message, body: &mut [u8]) {
    let (kind, seen) = match message.kind {
        Kind::Question => (1, None),
        Kind::Answer { seen } => (2, Some(seen)),
    };
    body[0] = kind;
    body[2..4].copy_from_slice(&message.mtu.to_be_bytes());
    body[4..12].copy_from_slice(&message.number.to_be_bytes());
    if let Some(seen) = seen {
        let ip = match seen.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        body[12..28].copy_from_slice(&ip.octets());
        body[28..30].copy_from_slice(&seen.port().to_be_bytes());
    }
}

fn read_body(body: &[u8]) -> Option<Message> {
    let be16 = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let ip: [u8; 16] = body.get(12..28)?.try_into().ok()?;
    let kind = match body.first()? {
        1 => Kind::Question,
        2 => Kind::Answer { seen: SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), be16(28)?) },
        _ => return None,
    };
    Some(Message { kind, number: u64::from_be_bytes(body.get(4..12)?.try_into().ok()?), mtu: be16(2)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> (Secrets, Secrets) {
        let [a, b] = [3, 4].map(|n| PrivateKey::from_bytes(&[n; 32]).unwrap());
        (Secrets::derive(&a, &b.public()), Secrets::derive(&b, &a.public()))
    }

    fn question() -> Message {
        Message { kind: Kind::Question, number: 77, mtu: 1500 }
    }

    #[test]
    fn a_message_reaches_the_other_end_as_it_was_sent() {
        let (a, b) = pair();
        for seen in ["192.0.2.1:51820", "[2001:db8::1]:9"] {
            let answer =
                Message { kind: Kind::Answer { seen: seen.parse().unwrap() }, number: u64::MAX, mtu: 0 };
            for message in [question(), answer] {
                for size in [0, LEAST, 1400, MOST] {
                    let mut datagram = a.seal(&message, size, [size as u8; NONCE]);
                    assert_eq!(datagram.len(), size.max(LEAST));
                    assert_eq!(route_id(&datagram), Ok(b.receiving_id()));
                    assert_eq!(b.open(&mut datagram), Ok(message));
                }
            }
        }
    }

    #[test]
    fn a_probe_that_comes_back_or_was_changed_is_nobodys() {
        let (a, b) = pair();
        let datagram = a.seal(&question(), 200, [5; NONCE]);
        assert_eq!(a.open(&mut datagram.clone()), Err(Rejected::Stranger));
        for at in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[at] ^= 1;
            assert!(b.open(&mut changed).is_err(), "byte {at}");
        }
        for length in 0..datagram.len() {
            assert!(b.open(&mut datagram[..length].to_vec()).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn no_wireguard_device_takes_a_probe_for_its_own() {
        assert!(!(1..=4).contains(&MAGIC));
    }

    proptest! {
        #[test]
        fn any_datagram_is_opened_or_refused(mut datagram in proptest::collection::vec(any::<u8>(), 0..300), ours: bool) {
            let (a, _) = pair();
            if ours && datagram.len() >= HEADER + ID {
                datagram[..HEADER].copy_from_slice(&[MAGIC, VERSION, 0, 0]);
                datagram[HEADER..HEADER + ID].copy_from_slice(&a.receiving_id());
            }
            prop_assert!(a.open(&mut datagram).is_err());
        }
    }
}
