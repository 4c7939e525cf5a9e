//! Names of network interfaces, as rules compare them.

use std::fmt;
use std::str::FromStr;

/// The most bytes of a name (`IFNAMSIZ` without the zero at its end).
const LONGEST: usize = 15;

/// The name of a network interface, as Linux allows it (`dev_valid_name`): 1 to 15 bytes, neither `.` nor `..`, without slashes, colons and
/// white space. Nor do quotes, backslashes, stars and what is not ASCII occur: no rule could be shown as text then.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interface {
    // Zeros behind it.
    name: [u8; LONGEST],
}

/// It is no name of an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a network interface")]
pub struct InterfaceError(String);

impl FromStr for Interface {
    type Err = InterfaceError;

    fn from_str(text: &str) -> Result<Self, InterfaceError> {
        let fits = (1..=LONGEST).contains(&text.len()) && text != "." && text != "..";
        let legal = |byte: u8| byte.is_ascii_graphic() && !b"/:\"\\*".contains(&byte);
        if !fits || !text.bytes().all(legal) {
            return Err(InterfaceError(text.chars().take(64).collect()));
        }
        let mut name = [0; LONGEST];
        name.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self { name })
    }
}

impl Interface {
    /// The name.
    pub fn as_str(&self) -> &str {
        let text = std::str::from_utf8(&self.name).unwrap_or_default();
        text.trim_end_matches('\0')
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_linux_allows_and_a_rule_can_bear() {
        for name in ["eth0", "enp0s31f6", "cali+1@2", "a", "123456789012345"] {
            assert_eq!(name.parse::<Interface>().unwrap().to_string(), name);
        }
        for name in
            ["", ".", "..", "1234567890123456", "a/b", "a b", "a:1", "*", "eth*", "a\"b", "a\nb", "\u{e4}"]
        {
            assert!(name.parse::<Interface>().is_err(), "{name:?}");
        }
        assert_eq!(format!("{:?}", "eth0".parse::<Interface>().unwrap()), "\"eth0\"");
    }
}
