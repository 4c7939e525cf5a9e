//! What a node claims about itself, as annotations of its Node object.
//!
//! An annotation is a hostile claim. It may state key, endpoints, MTU, site and epoch; which prefixes a node
//! holds is never taken from here (see [`crate::admission`]).

pub mod told;

use std::collections::{BTreeMap, BTreeSet};

use mesh_keyring::{KeyError, NameError, PublicKey, SiteName};
use serde::{Deserialize, Serialize};

use crate::endpoint::{Endpoint, EndpointError};
use crate::path::Rung;

/// The prefix of all our annotations and labels.
pub const DOMAIN: &str = "sennit.dev/";
/// The node's WireGuard public key, base64.
pub const PUBLIC_KEY: &str = "sennit.dev/public-key";
/// The generation of the key: milliseconds since 1970, or one more than the last. Another key with no later one is refused.
pub const EPOCH: &str = "sennit.dev/epoch";
/// The node's site.
pub const SITE: &str = "sennit.dev/site";
/// The label by which the operator says in which site a Node stands. Kubernetes lets no kubelet write
/// labels of this suffix (admission plugin NodeRestriction).
pub const SITE_LABEL: &str = "sennit.dev.node-restriction.kubernetes.io/site";
/// Endpoints for peers of other sites, comma separated.
pub const ENDPOINTS: &str = "sennit.dev/endpoints";
/// Endpoints for peers of the same site, comma separated.
pub const INTERNAL_ENDPOINTS: &str = "sennit.dev/internal-endpoints";
/// The MTU of the node's underlay, in bytes.
pub const MTU: &str = "sennit.dev/mtu";

/// Where others see the node, behind its NAT, comma separated.
pub const REFLEXIVE_ENDPOINTS: &str = "sennit.dev/reflexive-endpoints";
/// By which carriers it reaches the peers that it reaches, comma separated. For people: nothing depends on it.
pub const PATH: &str = "sennit.dev/path";

/// Whether the node can do WireGuard: `none` where it cannot. Absent where it can.
pub const WIREGUARD: &str = "sennit.dev/wireguard";
const NO_WIREGUARD: &str = "none";

/// The annotations of a claim.
const CLAIM: [&str; 9] =
    [PUBLIC_KEY, EPOCH, SITE, ENDPOINTS, INTERNAL_ENDPOINTS, REFLEXIVE_ENDPOINTS, MTU, WIREGUARD, PATH];

/// All annotations that an agent reads and writes.
pub const KNOWN: [&str; 12] = [
    PUBLIC_KEY,
    EPOCH,
    SITE,
    ENDPOINTS,
    INTERNAL_ENDPOINTS,
    REFLEXIVE_ENDPOINTS,
    MTU,
    WIREGUARD,
    PATH,
    told::MESH,
    told::INSTANCE,
    told::REFUSES,
];

/// The latest generation that is read: later than any clock says, and none so late that no other could follow.
pub const EPOCH_MOST: u64 = (1 << 53) - 1;

/// The longest annotation value that is read, in bytes.
pub const VALUE_MOST: usize = 2048;
/// The most endpoints in one annotation.
pub const ENDPOINTS_MOST: usize = 8;
/// The smallest underlay MTU: 1280 bytes (RFC 8200) inside of WireGuard over IPv6.
pub const MTU_LEAST: u16 = 1280 + crate::plan::mtu::OVERHEAD;

/// Why a node's annotations were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdvertisementError {
    /// A needed annotation is absent while others of ours are there.
    #[error("annotation {0} is missing")]
    Missing(&'static str),
    /// A value is longer than anything honest.
    #[error("annotation {key} has {length} bytes; at most {VALUE_MOST} are read")]
    Oversized {
        /// Which annotation.
        key: String,
        /// Its length in bytes.
        length: usize,
    },
    /// Too many endpoints.
    #[error("annotation {key} names {count} endpoints; at most {ENDPOINTS_MOST} are read")]
    TooMany {
        /// Which annotation.
        key: &'static str,
        /// How many it names.
        count: usize,
    },
    /// Not a key.
    #[error("annotation {PUBLIC_KEY}: {0}")]
    Key(KeyError),
    /// Not a site name.
    #[error("annotation {SITE}: {0}")]
    Site(NameError),
    /// Not an endpoint.
    #[error("annotation {key}: {source}")]
    Endpoint {
        /// Which annotation.
        key: &'static str,
        /// What is wrong.
        source: EndpointError,
    },
    /// Neither absent nor what it may be.
    #[error(
        "annotation {WIREGUARD}: {0:?}: `none` is all that it can say; a node that can do WireGuard has no such annotation"
    )]
    Wireguard(String),
    /// Not a number, or one out of range.
    #[error("annotation {key}: {value:?} is no number from {least} to {most}")]
    Number {
        /// Which annotation.
        key: &'static str,
        /// Its value, cut to 40 characters.
        value: String,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
}

/// A node's claim about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Advertisement {
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// The generation of the key. By order alone: it is compared with no clock.
    pub epoch: u64,
    /// The site it says it stands in.
    pub site: SiteName,
    /// Where peers of other sites may dial it; empty behind NAT.
    pub endpoints: Vec<Endpoint>,
    /// Where peers of the same site may dial it.
    pub internal_endpoints: Vec<Endpoint>,
    /// The MTU of its underlay in bytes.
    pub mtu: Option<u16>,
    /// Where others see it behind its NAT, for peers of other sites.
    #[serde(default)]
    pub reflexive_endpoints: Vec<Endpoint>,
    /// By which carriers it reaches peers; words of newer agents are left out.
    #[serde(default)]
    pub paths: BTreeSet<Rung>,
    /// Whether it can do WireGuard. One that cannot is reached where the operator has exempted the pair, and nowhere else.
    #[serde(default = "encrypts")]
    pub encrypts: bool,
}

fn encrypts() -> bool {
    true
}

fn number(key: &'static str, value: &str, least: u64, most: u64) -> Result<u64, AdvertisementError> {
    let digits = !value.is_empty() && value.bytes().all(|c| c.is_ascii_digit());
    match value.parse::<u64>() {
        Ok(n) if digits && (least..=most).contains(&n) => Ok(n),
        _ => Err(AdvertisementError::Number { key, value: value.chars().take(40).collect(), least, most }),
    }
}

fn endpoints(key: &'static str, value: &str) -> Result<Vec<Endpoint>, AdvertisementError> {
    let texts: Vec<&str> = value.split(',').map(str::trim).filter(|t| !t.is_empty()).collect();
    if texts.len() > ENDPOINTS_MOST {
        return Err(AdvertisementError::TooMany { key, count: texts.len() });
    }
    let mut found = Vec::with_capacity(texts.len());
    for text in texts {
        let endpoint = text.parse().map_err(|source| AdvertisementError::Endpoint { key, source })?;
        if !found.contains(&endpoint) {
            found.push(endpoint);
        }
    }
    Ok(found)
}

fn rungs(value: &str) -> BTreeSet<Rung> {
    let words = value.split(',').map(str::trim);
    words.filter_map(|word| Rung::ALL.into_iter().find(|rung| rung.as_str() == word)).collect()
}

impl Advertisement {
    /// Reads the claim out of a node's annotations; `None` when the node publishes nothing of ours. Unknown
    /// annotations of our domain are passed over, so that newer agents can live beside older ones.
    ///
    /// # Errors
    /// [`AdvertisementError`] names the annotation.
    pub fn parse(annotations: &BTreeMap<String, String>) -> Result<Option<Self>, AdvertisementError> {
        let ours = || CLAIM.iter().filter_map(|&key| annotations.get(key).map(|value| (key, value)));
        if ours().next().is_none() {
            return Ok(None);
        }
        if let Some((key, value)) = ours().find(|(_, value)| value.len() > VALUE_MOST) {
            return Err(AdvertisementError::Oversized { key: key.to_owned(), length: value.len() });
        }
        let need = |key| annotations.get(key).ok_or(AdvertisementError::Missing(key));
        let list = |key| annotations.get(key).map_or(Ok(Vec::new()), |value| endpoints(key, value));
        Ok(Some(Self {
            public_key: need(PUBLIC_KEY)?.parse().map_err(AdvertisementError::Key)?,
            epoch: number(EPOCH, need(EPOCH)?, 0, EPOCH_MOST)?,
            site: need(SITE)?.parse().map_err(AdvertisementError::Site)?,
            endpoints: list(ENDPOINTS)?,
            internal_endpoints: list(INTERNAL_ENDPOINTS)?,
            mtu: match annotations.get(MTU) {
                Some(value) => {
                    // At most 65,535, so the cast keeps the value.
                    Some(number(MTU, value, u64::from(MTU_LEAST), u64::from(u16::MAX))? as u16)
                }
                None => None,
            },
            reflexive_endpoints: list(REFLEXIVE_ENDPOINTS)?,
            paths: annotations.get(PATH).map(|value| rungs(value)).unwrap_or_default(),
            encrypts: match annotations.get(WIREGUARD).map(String::as_str) {
                None => true,
                Some(NO_WIREGUARD) => false,
                Some(other) => {
                    return Err(AdvertisementError::Wireguard(other.chars().take(40).collect()));
                }
            },
        }))
    }

    /// The claim without what comes and goes, and without which a peer can be admitted and dialled as well: how others see it, and
    /// its carriers.
    pub fn essential(&self) -> Self {
        Self { reflexive_endpoints: Vec::new(), paths: BTreeSet::new(), ..self.clone() }
    }

    /// The claim as annotations.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        let list = |all: &[Endpoint]| all.iter().map(Endpoint::to_string).collect::<Vec<_>>().join(",");
        let mut all = BTreeMap::from([
            (PUBLIC_KEY.to_owned(), self.public_key.to_string()),
            (EPOCH.to_owned(), self.epoch.to_string()),
            (SITE.to_owned(), self.site.to_string()),
            (ENDPOINTS.to_owned(), list(&self.endpoints)),
            (INTERNAL_ENDPOINTS.to_owned(), list(&self.internal_endpoints)),
        ]);
        if !self.reflexive_endpoints.is_empty() {
            all.insert(REFLEXIVE_ENDPOINTS.to_owned(), list(&self.reflexive_endpoints));
        }
        if !self.paths.is_empty() {
            let words: Vec<&str> = self.paths.iter().map(|rung| rung.as_str()).collect();
            all.insert(PATH.to_owned(), words.join(","));
        }
        if !self.encrypts {
            all.insert(WIREGUARD.to_owned(), NO_WIREGUARD.to_owned());
        }
        if let Some(mtu) = self.mtu {
            all.insert(MTU.to_owned(), mtu.to_string());
        }
        all
    }
}

#[cfg(test)]
#[path = "advertisement/tests.rs"]
mod tests;
