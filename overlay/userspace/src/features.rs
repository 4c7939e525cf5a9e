//! The kernel features that make the data path fast, each of which can be missing or be switched off.

use std::fmt;
use std::ops::BitOr;

/// Which features are wanted, or in force. None of them changes what is sent, only in how many system calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `tun-tso`: the TUN device hands over and takes TCP super-packets and unfinished checksums, described by a
    /// header before each packet (`IFF_VNET_HDR`, `TUNSETOFFLOAD` with `TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6`).
    pub tun_tso: bool,
    /// `tun-uso`: UDP super-packets as well (`TUN_F_USO4 | TUN_F_USO6`, Linux 6.2). Nothing without `tun_tso`.
    pub tun_uso: bool,
    /// `udp-gso`: datagrams of one length to one peer leave as one (`UDP_SEGMENT`, Linux 4.18).
    pub udp_gso: bool,
    /// `udp-gro`: datagrams of one length from one peer arrive as one (`UDP_GRO`, Linux 5.0).
    pub udp_gro: bool,
}

/// A list of features names one that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no feature {0:?}; the features are {list}", list = NAMES.join(", "))]
pub struct UnknownFeature(pub String);

const NAMES: [&str; 4] = ["tun-tso", "tun-uso", "udp-gso", "udp-gro"];

impl Features {
    /// All of them.
    pub const ALL: Self = Self { tun_tso: true, tun_uso: true, udp_gso: true, udp_gro: true };
    /// None of them: one packet, one datagram at a time.
    pub const NONE: Self = Self { tun_tso: false, tun_uso: false, udp_gso: false, udp_gro: false };

    /// All but those in a list of names, separated by commas; `tun-tso` takes `tun-uso` with it. Empty entries are
    /// nothing.
    pub fn without(list: &str) -> Result<Self, UnknownFeature> {
        let mut features = Self::ALL;
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match name {
                "tun-tso" => (features.tun_tso, features.tun_uso) = (false, false),
                "tun-uso" => features.tun_uso = false,
                "udp-gso" => features.udp_gso = false,
                "udp-gro" => features.udp_gro = false,
                _ => return Err(UnknownFeature(name.to_owned())),
            }
        }
        Ok(features)
    }

    /// The name of each feature, and whether it is on.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, bool)> {
        NAMES.into_iter().zip([self.tun_tso, self.tun_uso, self.udp_gso, self.udp_gro])
    }
}

/// What either has, as for the features of the TUN device and those of the sockets.
impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            tun_tso: self.tun_tso || other.tun_tso,
            tun_uso: self.tun_uso || other.tun_uso,
            udp_gso: self.udp_gso || other.udp_gso,
            udp_gro: self.udp_gro || other.udp_gro,
        }
    }
}

/// `tun-tso=on tun-uso=off udp-gso=on udp-gro=on`
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, on)) in self.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            write!(f, "{space}{name}={}", if on { "on" } else { "off" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_switches_off_what_it_names_and_what_depends_on_it() {
        assert_eq!(Features::without(""), Ok(Features::ALL));
        assert_eq!(Features::without(" , "), Ok(Features::ALL));
        let some = Features::without("udp-gso, tun-uso").unwrap();
        assert_eq!(some, Features { tun_tso: true, tun_uso: false, udp_gso: false, udp_gro: true });
        assert_eq!(some.to_string(), "tun-tso=on tun-uso=off udp-gso=off udp-gro=on");
        let some = Features::without("tun-tso,tun-tso").unwrap();
        assert_eq!(some, Features { tun_tso: false, tun_uso: false, udp_gso: true, udp_gro: true });
        assert_eq!(Features::without(&NAMES.join(",")), Ok(Features::NONE));
    }

    #[test]
    fn an_unknown_name_is_told_with_those_that_there_are() {
        let error = Features::without("udp-gro,turbo").unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no feature \"turbo\"; the features are tun-tso, tun-uso, udp-gso, udp-gro"
        );
        assert!(Features::without("UDP-GSO").is_err());
    }

    #[test]
    fn a_device_has_what_its_parts_have() {
        let tun = Features { tun_tso: true, ..Features::NONE };
        let udp = Features { udp_gro: true, ..Features::NONE };
        assert_eq!((tun | udp).to_string(), "tun-tso=on tun-uso=off udp-gso=off udp-gro=on");
    }
}
