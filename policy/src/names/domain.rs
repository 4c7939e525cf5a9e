//! Domain names as policies write them.

use std::fmt;
use std::str::FromStr;

/// The most bytes of a name (RFC 1035, section 2.3.4), without the dot at the end.
pub const LENGTH_MOST: usize = 253;

/// A domain name, or all names below one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain {
    // In small letters, without the dot at the end.
    name: String,
    below: bool,
}

/// It is no domain name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no domain name such as example.com or *.example.com")]
pub struct DomainError(String);

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let wrong = || DomainError(text.chars().take(64).collect());
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let name = normal(name);
        let label = |label: &str| {
            let ends = [label.as_bytes().first(), label.as_bytes().last()];
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && ends.into_iter().flatten().all(|byte| *byte != b'-')
        };
        let fits = name.len() <= LENGTH_MOST && name.contains('.') && name.split('.').all(label);
        if fits { Ok(Self { name, below }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

impl Domain {
    /// Whether it means this name, which is in small letters and has no dot at its end.
    pub fn matches(&self, name: &str) -> bool {
        match self.below {
            false => name == self.name,
            true => name.strip_suffix(&self.name).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        }
    }

    /// Whether it means all names below its name.
    pub fn is_wildcard(&self) -> bool {
        self.below
    }

    /// The name itself, without the star.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A name as names are compared.
pub fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_means_one_label_or_more() {
        let domain: Domain = "*.Example.com.".parse().unwrap();
        assert_eq!(domain.to_string(), "*.example.com");
        assert!(domain.matches("a.example.com") && domain.matches("a.b.example.com"));
        assert!(
            !domain.matches("example.com")
                && !domain.matches("badexample.com")
                && !domain.matches(".example.com")
        );
        let domain: Domain = "example.com".parse().unwrap();
        assert!(domain.matches("example.com") && !domain.matches("a.example.com"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "com",
            "*",
            "*.",
            "*.com",
            "a..b",
            "-a.b",
            "a-.b",
            "a.*.b",
            "a b.c",
            "\u{e4}.de",
            &format!("{}.com", "a".repeat(64)),
        ] {
            assert!(text.parse::<Domain>().is_err(), "{text:?}");
        }
    }
}
