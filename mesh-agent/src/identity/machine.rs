//! Which machine this is, as far as it can be told from another one.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Placeholder numbers of firmware that was never given its own.
const NO_NUMBER: [&str; 3] = [
    "00000000000000000000000000000000",
    "ffffffffffffffffffffffffffffffff",
    "03000200040005000006000700080009",
];
/// Hexadecimal digits of a digest that are kept.
const DIGITS: usize = 32;

/// Digests of what a machine has to itself. The numbers themselves are told to nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Of the number of its hardware, or of its virtual hardware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hardware: Option<String>,
    /// Of the number of its installation (machine-id(5)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    installation: Option<String>,
}

impl Machine {
    /// Reads it below `root`. In a container the installation is the image's, and says nothing.
    pub fn read(root: &Path, container: bool) -> Self {
        let installation = (!container).then(|| number(&root.join("etc/machine-id"))).flatten();
        Self { hardware: number(&root.join("sys/class/dmi/id/product_uuid")), installation }
    }

    /// This machine.
    pub fn own() -> Self {
        let container = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        Self::read(Path::new("/"), container)
    }

    /// Reports whether this is certainly another machine. A value that either side lacks decides
    /// nothing. A new installation on the same hardware is the same machine.
    pub fn is_other(&self, than: &Self) -> bool {
        match (&self.hardware, &than.hardware) {
            (Some(ours), Some(theirs)) => ours != theirs,
            _ => {
                let both = self.installation.as_ref().zip(than.installation.as_ref());
                both.is_some_and(|(ours, theirs)| ours != theirs)
            }
        }
    }
}

fn number(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(128).read_to_string(&mut text).ok()?;
    let number: String = text.trim().to_ascii_lowercase().chars().filter(|c| *c != '-').collect();
    let fine = number.len() == 32 && number.bytes().all(|c| c.is_ascii_hexdigit());
    if !fine || NO_NUMBER.contains(&number.as_str()) {
        return None;
    }
    let digest = Sha256::digest(format!("sennit machine {number}"));
    Some(digest.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(digit).take(DIGITS).collect())
}

fn digit(nibble: u8) -> char {
    char::from_digit(u32::from(nibble), 16).unwrap_or('0')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn machine(uuid: Option<&str>, id: Option<&str>) -> Machine {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("sys/class/dmi/id")).unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        if let Some(uuid) = uuid {
            fs::write(root.path().join("sys/class/dmi/id/product_uuid"), format!("{uuid}\n")).unwrap();
        }
        if let Some(id) = id {
            fs::write(root.path().join("etc/machine-id"), format!("{id}\n")).unwrap();
        }
        Machine::read(root.path(), false)
    }

    const A: &str = "b08dfa60-83e7-4567-a1f1-a99d5bd2cf12";
    const B: &str = "B08DFA60-83E7-4567-A1F1-A99D5BD2CF13";

    #[test]
    fn another_machine_is_told_by_hardware_first() {
        let plain = |text: &str| text.replace('-', "").to_lowercase();
        assert!(machine(Some(A), None).is_other(&machine(Some(B), None)));
        assert!(machine(None, Some(&plain(A))).is_other(&machine(None, Some(&plain(B)))));
        // Installed anew on the same machine.
        assert!(!machine(Some(A), Some(&plain(A))).is_other(&machine(Some(A), Some(&plain(B)))));
        // What is not known decides nothing.
        assert!(!machine(Some(A), None).is_other(&machine(None, Some(&plain(B)))));
        assert!(!machine(None, None).is_other(&machine(Some(A), Some(&plain(A)))));
    }

    #[test]
    fn what_is_no_number_counts_for_nothing() {
        for text in ["", "uninitialized", "03000200-0400-0500-0006-000700080009", "Not Settable"] {
            assert_eq!(machine(Some(text), Some(text)), Machine::default(), "{text}");
        }
    }

    #[test]
    fn the_number_itself_is_written_nowhere() {
        let text = serde_json::to_string(&machine(Some(A), Some(&A.replace('-', "")))).unwrap();
        assert!(!text.contains("b08dfa60") && text.len() > 64, "{text}");
    }
}
