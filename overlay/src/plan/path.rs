//! Which endpoints a peer is dialled at, best first.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::endpoint::{Endpoint, is_dialable};
use crate::local::LocalNode;
use crate::peer::Peer;

/// What DNS names resolved to. A name that is absent did not resolve (yet).
pub type Resolution = BTreeMap<String, Vec<IpAddr>>;

/// The most addresses at which a peer is dialled and probed: whoever claims them, others get the datagrams.
pub const CANDIDATES_MOST: usize = 8;
/// The most addresses of one name among them.
const OF_NAME_MOST: usize = 4;
/// The most addresses among those at which others see a peer behind its NAT: one of each family, and one of before.
pub const REFLEXIVE_MOST: usize = 3;

/// The addresses to dial: inside a site its internal endpoints and then the others, between sites the others
/// alone, since another site's private addresses may be somebody else's here. Addresses of a family that this node's
/// underlay does not speak would only cost time.
pub fn candidates(local: &LocalNode, peer: &Peer, resolved: &Resolution) -> Vec<SocketAddr> {
    let internal: &[Endpoint] =
        if peer.claim.site == local.site { &peer.claim.internal_endpoints } else { &[] };
    let mut found = Vec::new();
    for endpoint in internal.iter().chain(&peer.claim.endpoints) {
        let addresses: Vec<SocketAddr> = match endpoint {
            Endpoint::Address(address) => vec![*address],
            Endpoint::Name(host, port) => {
                let ips = resolved.get(host).map(Vec::as_slice).unwrap_or_default();
                let dialable = ips.iter().filter(|ip| is_dialable(**ip)).take(OF_NAME_MOST);
                dialable.map(|&ip| SocketAddr::new(ip, *port)).collect()
            }
        };
        for address in addresses.into_iter().filter(|to| speaks(local, to)) {
            if !found.contains(&address) {
                found.push(address);
            }
        }
    }
    found.truncate(CANDIDATES_MOST);
    found
}

fn speaks(local: &LocalNode, to: &SocketAddr) -> bool {
    let own = &local.underlay_addresses;
    own.is_empty() || own.iter().any(|ip| ip.is_ipv4() == to.is_ipv4())
}
