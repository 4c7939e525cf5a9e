//! Which networks pods get, by the files that container runtimes read. Networks that are named in a cluster's API (Multus) are not
//! among them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

/// The most files that are read, and bytes of each.
const FILES_MOST: usize = 64;
const BYTES_MOST: u64 = 256 * 1024;
/// Types whose pods' packets pass by the host's stack.
const BESIDE: [&str; 9] = [
    "macvlan",
    "ipvlan",
    "sriov",
    "host-device",
    "ib-sriov",
    "ovs",
    "userspace",
    "accelerated-bridge",
    "vlan",
];

/// Types that put pods beside the host's stack, by the file that names them. Files that cannot be read name nothing.
pub(super) fn kinds(folder: &Path) -> BTreeMap<String, String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return BTreeMap::new() };
    let mut paths: Vec<_> =
        entries.take(FILES_MOST * 4).filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let is_ours = |path: &Path| {
        let extension = path.extension().and_then(|text| text.to_str());
        extension.is_some_and(|text| ["conf", "conflist", "json"].contains(&text)) && path.is_file()
    };
    let files = paths.into_iter().filter(|path| is_ours(path)).take(FILES_MOST);
    files.filter_map(|path| Some((path.display().to_string(), kind(&path)?))).collect()
}

fn kind(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(BYTES_MOST).read_to_string(&mut text).ok()?;
    beside(&serde_json::from_str(&text).ok()?, 0)
}

/// The first such type in a configuration, its plugins and its delegates.
fn beside(value: &Value, depth: usize) -> Option<String> {
    if depth > 8 {
        return None;
    }
    match value {
        Value::Object(fields) => {
            let own = fields.get("type").and_then(Value::as_str).filter(|kind| BESIDE.contains(kind));
            let inner = || fields.values().find_map(|value| beside(value, depth + 1));
            own.map(str::to_owned).or_else(inner)
        }
        Value::Array(items) => items.iter().find_map(|value| beside(value, depth + 1)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_found_in_lists_and_delegates() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("10-a.conflist", r#"{"plugins": [{"type": "bridge", "ipam": {"type": "host-local"}}]}"#);
        write("20-b.conf", r#"{"type": "multus", "delegates": [{"type": "macvlan", "master": "eth0"}]}"#);
        write("30-c.conf", "not json");
        write("40-d.txt", r#"{"type": "macvlan"}"#);
        let found = kinds(folder.path());
        assert_eq!(found.len(), 1, "{found:?}");
        let (file, kind) = found.first_key_value().unwrap();
        assert!(file.ends_with("20-b.conf") && kind == "macvlan");
        assert!(kinds(&folder.path().join("none")).is_empty());
    }
}
