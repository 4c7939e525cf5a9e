//! What the device may use, and does use, of what the kernel offers.

use std::fmt;

/// Kernel features that save system calls. Without any of them packets flow all the same, one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `tun-tso`: the TUN device hands over and takes TCP super-packets and unfinished checksums
    /// (`IFF_VNET_HDR`, `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`).
    pub tun_tso: bool,
    /// `tun-uso`: the same for UDP (`TUN_F_USO4`, `TUN_F_USO6`, Linux 6.2). Only together with `tun-tso`.
    pub tun_uso: bool,
    /// `udp-gso`: one send for a run of datagrams (`UDP_SEGMENT`, Linux 4.18).
    pub udp_gso: bool,
    /// `udp-gro`: one receive for a run of datagrams (`UDP_GRO`, Linux 5.0).
    pub udp_gro: bool,
}

/// A word that names no feature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no feature; there are tun-tso, tun-uso, udp-gso and udp-gro")]
pub struct UnknownFeature(String);

impl Features {
    /// Everything.
    pub const ALL: Self = Self { tun_tso: true, tun_uso: true, udp_gso: true, udp_gro: true };
    /// Nothing.
    pub const NONE: Self = Self { tun_tso: false, tun_uso: false, udp_gso: false, udp_gro: false };

    /// Everything but what a list, separated by commas, names.
    pub fn without(list: &str) -> Result<Self, UnknownFeature> {
        let mut features = Self::ALL;
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "tun-tso" => (features.tun_tso, features.tun_uso) = (false, false),
                "tun-uso" => features.tun_uso = false,
                "udp-gso" => features.udp_gso = false,
                "udp-gro" => features.udp_gro = false,
                _ => return Err(UnknownFeature(word.to_owned())),
            }
        }
        Ok(features)
    }

    /// Each with its name.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, bool)> {
        [
            ("tun-tso", self.tun_tso),
            ("tun-uso", self.tun_uso),
            ("udp-gso", self.udp_gso),
            ("udp-gro", self.udp_gro),
        ]
        .into_iter()
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (name, on)) in self.iter().enumerate() {
            let end = if number == 0 { "" } else { "\n" };
            write!(f, "{end}{name}={}", if on { "on" } else { "off" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_off_and_uso_goes_with_tso() {
        assert_eq!(Features::without(""), Ok(Features::ALL));
        assert_eq!(Features::without(" udp-gro ,"), Ok(Features { udp_gro: false, ..Features::ALL }));
        assert_eq!(Features::without("tun-tso,udp-gso,udp-gro"), Ok(Features::NONE));
        let error = Features::without("udp-gso,gso").unwrap_err().to_string();
        assert!(error.contains("\"gso\"") && error.contains("udp-gso"), "{error}");
    }

    #[test]
    fn each_is_shown_on_a_line_of_its_own() {
        let features = Features { tun_uso: false, ..Features::ALL };
        assert_eq!(features.to_string(), "tun-tso=on\ntun-uso=off\nudp-gso=on\nudp-gro=on");
    }
}
