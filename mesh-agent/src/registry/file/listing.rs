//! Which files of a directory are manifests, and what is passed over: every command and the agent read the same.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};

use super::PUBLISHED;

/// The most entries that are passed over and named one by one.
const TOLD_MOST: usize = 8;
/// The limits of the search for manifests in folders: depth, and number of entries.
const DEPTH_MOST: usize = 8;
const ENTRIES_MOST: usize = 10_000;

/// The contents of a directory.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The first manifests by name.
    pub manifests: Vec<PathBuf>,
    /// The number of manifests beyond those.
    pub surplus: usize,
    /// Files and folders that look like manifests and are not read, with the reason.
    pub passed_over: Vec<String>,
}

/// Reports whether the name has a manifest's extension. Returns `None` if only its case differs.
fn is_manifest(path: &Path) -> Option<bool> {
    let Some(end) = path.extension() else { return Some(false) };
    if ["yaml", "yml", "json"].iter().any(|known| end == *known) {
        return Some(true);
    }
    let is_like = ["yaml", "yml", "json"].iter().any(|known| end.eq_ignore_ascii_case(known));
    (!is_like).then_some(false)
}

/// Lists a directory.
///
/// # Errors
/// Returns the system's error.
pub fn list(dir: &Path, most: usize) -> io::Result<Listing> {
    let (mut found, mut surplus, mut passed) = (BTreeSet::new(), 0, BTreeSet::new());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Mounted ConfigMaps keep their files in there, and link to them.
        if name.starts_with("..") || name == PUBLISHED {
            continue;
        }
        if is_folder(&entry) {
            passed.extend(folder(&entry.path(), &name));
            continue;
        }
        match (is_manifest(&entry.path()), name.starts_with('.')) {
            (Some(true), false) => {
                found.insert(entry.path());
            }
            (Some(false), _) => {}
            (_, true) => {
                passed.insert(format!("{name}: is not read: its name begins with a dot"));
            }
            (None, false) => {
                passed
                    .insert(format!("{name}: is not read: only .yaml, .yml and .json are, in small letters"));
            }
        }
        if found.len() > most {
            found.pop_last();
            surplus += 1;
        }
        // Names beyond those that are told matter by their number alone.
    }
    let more = passed.len().saturating_sub(TOLD_MOST);
    let mut passed_over: Vec<String> = passed.into_iter().take(TOLD_MOST).collect();
    if more > 0 {
        passed_over.push(format!("{more} more files and folders are not read"));
    }
    Ok(Listing { manifests: found.into_iter().collect(), surplus, passed_over })
}

/// Reports whether the entry is a folder, or a link to one.
fn is_folder(entry: &DirEntry) -> bool {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir()),
        Ok(kind) => kind.is_dir(),
        Err(_) => false,
    }
}

/// Returns the notice about a folder, or `None` if it holds no manifest.
fn folder(path: &Path, name: &str) -> Option<String> {
    if is_manifest(Path::new(name)) != Some(false) {
        return Some(format!("{name}: is not read: it is a folder"));
    }
    let mut left = ENTRIES_MOST;
    let count = within(path, DEPTH_MOST, &mut left, &mut |_| ());
    let at_least = if left == 0 { "at least " } else { "" };
    let them = if count == 1 { "manifest in it is" } else { "manifests in it are" };
    (count > 0).then(|| format!("{name}/: {at_least}{count} {them} not read: folders are not looked into"))
}

/// Counts the manifests below a folder, whose paths are told. Links are not followed.
fn within(dir: &Path, depth: usize, left: &mut usize, found: &mut dyn FnMut(PathBuf)) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if *left == 0 {
            break;
        }
        *left -= 1;
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => count += within(&entry.path(), depth - 1, left, found),
            Ok(kind) if !kind.is_dir() && is_manifest(&entry.path()) != Some(false) => {
                count += 1;
                found(entry.path());
            }
            _ => {}
        }
    }
    count
}

/// All manifests of a tree, by their paths: what whole trees of manifests are that somebody gives to a cluster.
///
/// # Errors
/// Returns the system's error for the directory itself.
pub fn tree(dir: &Path, most: usize) -> io::Result<Listing> {
    fs::read_dir(dir)?;
    let (mut manifests, mut left) = (Vec::new(), most);
    within(dir, usize::MAX, &mut left, &mut |path| manifests.push(path));
    manifests.sort();
    let surplus = usize::from(left == 0);
    Ok(Listing { manifests, surplus, passed_over: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_passed_over_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        for path in ["a.yaml", "b.json", "notes.txt", ".c.yaml", ".swap", "D.YAML", "team/e/f.yml", "empty/x"]
        {
            write(path);
        }
        for path in ["published/n.yaml", "..2026/g.yaml"] {
            write(path);
        }
        let listing = list(dir.path(), 10).unwrap();
        assert_eq!(listing.manifests, ["a.yaml", "b.json"].map(|name| dir.path().join(name)));
        let told = listing.passed_over.join("\n");
        assert_eq!(listing.passed_over.len(), 3, "{told}");
        for name in [".c.yaml: is not read: its name", "D.YAML: is not read: only", "team/: 1 manifest in it"]
        {
            assert!(told.contains(name), "{told}");
        }
    }

    #[test]
    fn many_that_are_passed_over_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        for index in 0..20 {
            fs::write(dir.path().join(format!(".{index}.yaml")), "").unwrap();
        }
        let passed = list(dir.path(), 10).unwrap().passed_over;
        assert_eq!(
            (passed.len(), passed.last().unwrap().as_str()),
            (9, "12 more files and folders are not read")
        );
    }
}
