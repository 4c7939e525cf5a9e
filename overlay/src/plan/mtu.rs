//! How large a packet fits through a tunnel.

/// Bytes that WireGuard adds over IPv6: 40 IP, 8 UDP, 16 header, 16 tag. Over IPv4 it is 20 less; the larger one
/// is used throughout, so that an endpoint which roams to the other family does not shrink the path.
pub const OVERHEAD: u16 = 80;
/// WireGuard pads plaintext to a multiple of this (WireGuard paper, section 5.4.6).
const PADDING: u16 = 16;

/// The MTU of the mesh interface over an underlay of `underlay` bytes.
pub fn device(underlay: u16) -> u16 {
    underlay.saturating_sub(OVERHEAD)
}

/// The MTU of routes to a peer. Padding is capped at the interface's MTU only, so that a smaller route MTU has
/// to be a multiple of the padding for padded packets still to fit the path.
pub fn route(local_underlay: u16, peer_underlay: Option<u16>) -> u16 {
    let own = device(local_underlay);
    match peer_underlay.map(device) {
        Some(theirs) if theirs < own => theirs - theirs % PADDING,
        _ => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_padded_packet_of_the_route_mtu_fits_the_smaller_underlay() {
        for local in 1360..1600u16 {
            for peer in 1360..1600u16 {
                let mtu = route(local, Some(peer));
                let padded = mtu.next_multiple_of(PADDING).min(device(local));
                assert!(padded + OVERHEAD <= local.min(peer), "{local} {peer} {mtu}");
                assert!(mtu >= 1280 || peer < 1376, "{local} {peer} {mtu}");
            }
        }
    }

    #[test]
    fn ethernet_gives_the_usual_1420() {
        assert_eq!(route(1500, None), 1420);
        assert_eq!(route(1500, Some(9000)), 1420);
        assert_eq!(route(1500, Some(1400)), 1312);
        assert_eq!(route(1400, Some(1500)), 1320);
    }
}
