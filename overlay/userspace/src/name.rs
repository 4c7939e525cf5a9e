//! Names of network interfaces.

use std::fmt;
use std::str::FromStr;

/// A name that Linux accepts for a network interface and that is safe in a file name: 1 to 15 bytes of
/// letters, digits and `_=+.-`, as in wg-quick(8).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct InterfaceName(String);

/// A name that cannot be an interface's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no interface name; use 1 to 15 letters, digits or characters of _=+.-")]
pub struct BadName(String);

impl InterfaceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, BadName> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_=+.-".contains(&byte);
        let good = (1..=15).contains(&name.len())
            && name.bytes().all(allowed)
            && !name.starts_with('-')
            && name != "."
            && name != "..";
        if good { Ok(Self(name.into())) } else { Err(BadName(name.into())) }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_safe_for_links_and_files_pass() {
        for good in ["wg0", "a", "sennit.0", "x_=+.-", "fifteen-bytes-x"] {
            assert!(good.parse::<InterfaceName>().is_ok(), "{good}");
        }
        for bad in
            ["", ".", "..", "a/b", "sixteen-bytes-xx", "a b", "wg%d", "wg\0", "é", "-f", "wg:1", "../x"]
        {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad}");
        }
    }
}
