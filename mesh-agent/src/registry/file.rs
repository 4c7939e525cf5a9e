//! A directory of manifests, watched.
//!
//! ```text
//! DIR/*.yaml *.yml *.json       the operator's manifests
//! DIR/published/NODE.yaml       what node NODE says of itself; written by its agent
//! ```

mod listing;
pub mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_keyring::{MeshName, NodeName};
use mesh_overlay::Advertisement;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;
use tokio::io::unix::AsyncFd;

use super::feed::{Feed, Kind};
use super::merge::{self, Source};
use super::{MeshWord, RegistryError, Snapshot};
use crate::atomic;
use crate::manifest::{self, Parsed};
pub use listing::{Listing, list, tree};
use words::{Files, Name};

/// The folder of the nodes' own publications.
pub const PUBLISHED: &str = "published";
/// The most files that are read.
pub const FILES_MOST: usize = 20_000;
/// The most bytes of all files of the operator together.
pub const BYTES_MOST: u64 = 256 << 20;
/// The most files of strangers that are named.
const STRANGERS_MOST: usize = 16;
/// How long a directory that cannot be watched is left before it is looked at again.
const POLL: Duration = Duration::from_secs(2);
/// Quiet time that ends a burst of changes.
const QUIET: Duration = Duration::from_millis(30);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

/// A file as it was last read: its last good objects, and what is wrong with it now.
#[derive(Debug, Clone)]
struct Known {
    stamp: Stamp,
    // Shared with what is made of it at each reading: there can be many.
    good: Arc<Parsed>,
    problem: Option<String>,
    never_read: bool,
}

/// Whose word a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Author {
    /// Links are followed: that is how mounted ConfigMaps look.
    Operator,
    /// Another node, which is not trusted: no links, and not much text.
    Node,
}

impl Author {
    fn most(self) -> u64 {
        if self == Self::Operator { manifest::FILE_MOST } else { manifest::PUBLICATION_MOST }
    }
}

/// The registry that is a directory.
#[derive(Debug)]
pub struct FileRegistry {
    dir: PathBuf,
    known: BTreeMap<PathBuf, Known>,
    /// The operator's files that are gone, until their absence is taken for his will.
    vanished: BTreeMap<PathBuf, Known>,
    watch: Option<Watch>,
    /// The Mesh that counts.
    mesh: Option<MeshName>,
    /// Events were taken from the kernel that [`FileRegistry::changed`] has not answered for yet.
    stirred: bool,
    feed: Feed,
    /// Files differ from what the feed was told last.
    pending: bool,
    /// Not everything could be read, and the feed is not told half of it.
    withheld: bool,
    /// What the feed was told last.
    told: Files,
    /// Objects of policy in there that do not count, since others of the same name came first.
    twice: BTreeMap<Name, Vec<String>>,
    /// How much of the operator's files is read.
    bytes_most: u64,
}

#[derive(Debug)]
struct Watch {
    inotify: AsyncFd<Events>,
    inodes: Vec<u64>,
}

#[derive(Debug)]
struct Events(Inotify);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl FileRegistry {
    /// The registry in `dir`; nothing is read yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            known: BTreeMap::new(),
            vanished: BTreeMap::new(),
            watch: None,
            mesh: None,
            stirred: false,
            feed: Feed::new(),
            pending: true,
            withheld: true,
            told: Files::new(),
            twice: BTreeMap::new(),
            bytes_most: BYTES_MOST,
        }
    }

    /// The same; of objects of kind Mesh, the one of this name counts.
    pub fn of_mesh(dir: &Path, mesh: &MeshName) -> Self {
        Self { mesh: Some(mesh.clone()), ..Self::new(dir) }
    }

    /// Reads all files that changed since the last call and merges what is known. A file that became unreadable
    /// counts with what it last held. Of `published/`, exactly one file for each node of the operator is read.
    ///
    /// # Errors
    /// [`RegistryError::Away`] when the directory cannot be listed; what was read before is kept.
    pub fn read(&mut self) -> Result<Snapshot, RegistryError> {
        let away = |dir: &Path, source| RegistryError::Away { path: dir.display().to_string(), source };
        let listing = list(&self.dir, FILES_MOST).map_err(|e| away(&self.dir, e))?;
        let Listing { manifests: paths, surplus, passed_over } = listing;
        let mut room = self.bytes_most;
        let mut before = std::mem::take(&mut self.known);
        let mut news = false;
        for path in paths {
            // One that was away with all others held what it held when that was taken for the operator's will.
            let held = before.remove(&path).or_else(|| self.vanished.remove(&path));
            let length = fs::metadata(&path).map_or(0, |meta| meta.len().min(Author::Operator.most()));
            let fits = length <= room;
            room = room.saturating_sub(length);
            let found = match fits {
                true => look(&path, held.clone(), Author::Operator),
                false => Some(left_out(held.clone(), self.bytes_most)),
            };
            match (found, held) {
                (Some(known), held) => {
                    news |= held.is_none_or(|held| !Arc::ptr_eq(&held.good, &known.good));
                    self.known.insert(path, known);
                }
                // Its name is there, and it is not.
                (None, Some(held)) => {
                    news = true;
                    self.vanished.insert(path, held);
                }
                (None, None) => {}
            }
        }
        let gone: Vec<PathBuf> =
            before.keys().filter(|path| path.parent() == Some(&self.dir)).cloned().collect();
        news |= !gone.is_empty();
        for path in gone {
            self.vanished.extend(before.remove_entry(&path));
        }
        let sources: Vec<Source> = self.known.iter().map(|(path, known)| self.source(path, known)).collect();
        let mut snapshot = merge::operator(&sources);
        if surplus > 0 {
            let text = format!("{}: {surplus} files beyond {FILES_MOST} are not read", self.dir.display());
            snapshot.problems.push(super::Problem { node: None, text });
            snapshot.incomplete = true;
        }
        for record in &mut snapshot.nodes {
            let path = own_path(&self.dir, &record.name);
            let Some(known) = look(&path, before.remove(&path), Author::Node) else { continue };
            let source = self.source(&path, &known);
            if source.unknown {
                snapshot.unreadable.insert(record.name.clone());
            }
            merge::publication(record, &source, &mut snapshot.problems);
            self.known.insert(path, known);
        }
        self.pending |= news;
        // What is not known may be policies.
        self.withheld = surplus > 0 || snapshot.incomplete && !self.feed.complete();
        let twice =
            self.twice.values().flatten().map(|text| super::Problem { node: None, text: text.clone() });
        snapshot.problems.extend(twice);
        snapshot.problems.extend(passed_over.into_iter().map(|text| super::Problem { node: None, text }));
        self.name_strangers(&mut snapshot);
        let files = self.files();
        snapshot.mesh = self.mesh_word(&files);
        self.name_other_meshes(&files, &mut snapshot);
        snapshot.hosts = Arc::new(words::hosts(&files));
        snapshot.problems.sort();
        Ok(snapshot)
    }

    fn mesh_word(&self, files: &Files) -> MeshWord {
        let named = self.mesh.as_ref().map(MeshName::as_str);
        match named.and_then(|name| words::meshes(files).remove(name)) {
            None => MeshWord::Silent,
            Some(Ok(settings)) => MeshWord::Said(settings),
            Some(Err(why)) => MeshWord::Unclear(why),
        }
    }

    /// Meshes of other names than the one that this node is of, which count for nothing here.
    fn name_other_meshes(&self, files: &Files, snapshot: &mut Snapshot) {
        let Some(own) = &self.mesh else { return };
        for other in words::meshes(files).into_keys().filter(|name| name != own.as_str()) {
            let text = format!("Mesh {other}: counts for nothing here: this node is of mesh {own}");
            snapshot.problems.push(super::Problem { node: None, text });
        }
    }

    /// Files in `published/` that speak for nobody whom the operator knows: the first few are named, none is read.
    fn name_strangers(&self, snapshot: &mut Snapshot) {
        let Ok(entries) = fs::read_dir(self.dir.join(PUBLISHED)) else { return };
        let names: BTreeSet<&str> = snapshot.nodes.iter().map(|n| n.name.as_str()).collect();
        let files = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let strange = files.filter(|file| {
            !file.starts_with('.') && !file.strip_suffix(".yaml").is_some_and(|stem| names.contains(stem))
        });
        let mut strange: Vec<String> = strange.take(STRANGERS_MOST * 64).collect();
        strange.sort();
        for file in strange.into_iter().take(STRANGERS_MOST) {
            let node = file.strip_suffix(".yaml").and_then(|stem| stem.parse().ok());
            let text =
                format!("{PUBLISHED}/{file}: is not read: the operator has no Node manifest of that name");
            snapshot.problems.push(super::Problem { node, text });
        }
    }

    fn source(&self, path: &Path, known: &Known) -> Source {
        let mut problems = known.good.problems.clone();
        problems.extend(known.problem.clone());
        Source {
            path: path.strip_prefix(&self.dir).unwrap_or(path).display().to_string(),
            parsed: Arc::clone(&known.good),
            problems,
            unknown: known.never_read,
        }
    }

    /// The operator's files as of the last [`FileRegistry::read`].
    pub fn files(&self) -> Files {
        let files = self.known.iter().filter(|(path, _)| path.parent() == Some(&self.dir));
        let named = files.map(|(path, known)| {
            let name = path.strip_prefix(&self.dir).unwrap_or(path).display().to_string();
            (name, Arc::clone(&known.good))
        });
        named.collect()
    }

    /// What was read last counts: the feed is told. Of a directory that was unmounted it is not.
    pub fn accepted(&mut self) {
        self.vanished.clear();
        self.pending |= Kind::all().any(|kind| self.feed.lost(kind));
        if self.pending && !self.withheld {
            self.pending = false;
            let now = self.files();
            let complete = self.feed.complete();
            let news = complete.then(|| words::difference(&self.told, &now, &mut self.twice)).flatten();
            let events = news.unwrap_or_else(|| {
                let all = words::all(&now);
                self.twice = all.problems;
                all.events
            });
            events.into_iter().for_each(|event| self.feed.push(event));
            self.told = now;
        }
        let why =
            "a file cannot be read, or there are too many: what is said of pods and policies is not heeded";
        self.feed.trouble("manifests", self.withheld.then(|| why.to_owned()));
    }

    /// What the directory says of pods, namespaces and policies.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Writes this node's publication, if it differs from what stands there; says whether it wrote.
    ///
    /// # Errors
    /// [`RegistryError::Publish`]; the old file is untouched.
    pub fn publish(&self, node: &NodeName, claim: &Advertisement) -> Result<bool, RegistryError> {
        self.write(node, &claim.to_annotations())
    }

    /// Writes a publication with these annotations, as [`FileRegistry::publish`] does.
    ///
    /// # Errors
    /// [`RegistryError::Publish`]; the old file is untouched.
    pub fn write(
        &self,
        node: &NodeName,
        annotations: &BTreeMap<String, String>,
    ) -> Result<bool, RegistryError> {
        let path = own_path(&self.dir, node);
        let failed = |source| RegistryError::Publish { path: path.display().to_string(), source };
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": node, "annotations": annotations },
        });
        let text = serde_saphyr::to_string(&manifest).map_err(|e| failed(io::Error::other(e.to_string())))?;
        // The registry itself is the operator's to make: an unmounted directory must not be written into.
        if !self.dir.is_dir() {
            return Err(failed(io::Error::new(io::ErrorKind::NotFound, "the registry directory is away")));
        }
        atomic::make_dir(&self.dir.join(PUBLISHED), 0o755).map_err(failed)?;
        atomic::replace(&path, text.as_bytes(), 0o644).map_err(failed)
    }

    /// Whether this node's publication could be written.
    ///
    /// # Errors
    /// [`RegistryError::Publish`] with what the system says.
    pub fn may_publish(&self, node: &NodeName) -> Result<(), RegistryError> {
        let folder = [self.dir.join(PUBLISHED), self.dir.clone()].into_iter().find(|dir| dir.is_dir());
        let folder = folder.unwrap_or_else(|| self.dir.clone());
        nix::unistd::access(&folder, nix::unistd::AccessFlags::W_OK).map_err(|e| RegistryError::Publish {
            path: own_path(&self.dir, node).display().to_string(),
            source: e.into(),
        })
    }

    /// Takes this node's publication away.
    ///
    /// # Errors
    /// [`RegistryError::Publish`]. No publication is no error.
    pub fn withdraw(&self, node: &NodeName) -> Result<(), RegistryError> {
        let path = own_path(&self.dir, node);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RegistryError::Publish { path: path.display().to_string(), source })
            }
            _ => Ok(()),
        }
    }

    /// Waits until something in the directory may have changed. Safe to drop and call again.
    pub async fn changed(&mut self) {
        let inodes = self.inodes();
        if self.watch.as_ref().is_none_or(|watch| watch.inodes != inodes) {
            self.watch = watch(&[self.dir.clone(), self.dir.join(PUBLISHED)], inodes).ok();
            if self.watch.is_none() {
                tokio::time::sleep(POLL).await;
                return;
            }
            // Whatever happened before the watch stood has to be looked at.
            return;
        }
        let Some(watch) = &self.watch else { return };
        if !self.stirred {
            if let Ok(mut ready) = watch.inotify.readable().await {
                let _ = watch.inotify.get_ref().0.read_events();
                ready.clear_ready();
            }
            self.stirred = true;
        }
        while let Ok(Ok(mut ready)) = tokio::time::timeout(QUIET, watch.inotify.readable()).await {
            if watch.inotify.get_ref().0.read_events().is_err() {
                ready.clear_ready();
            }
        }
        self.stirred = false;
    }

    /// Which directories stand there now; a directory that went and came back is another one.
    fn inodes(&self) -> Vec<u64> {
        let dirs = [self.dir.clone(), self.dir.join(PUBLISHED)];
        dirs.iter().map(|dir| fs::metadata(dir).map_or(0, |meta| meta.ino())).collect()
    }
}

fn watch(dirs: &[PathBuf], inodes: Vec<u64>) -> io::Result<Watch> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    for (dir, inode) in dirs.iter().zip(&inodes) {
        if *inode != 0 {
            inotify.add_watch(dir, flags)?;
        }
    }
    if inodes[0] == 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    #[expect(
        deprecated,
        reason = "its successor is unsafe; `Events` owns its descriptor and never changes it"
    )]
    let inotify = AsyncFd::new(Events(inotify))?;
    Ok(Watch { inotify, inodes })
}

fn own_path(dir: &Path, node: &NodeName) -> PathBuf {
    dir.join(PUBLISHED).join(format!("{node}.yaml"))
}

/// A file for which there is no room: it counts with what it last held, and is looked at again.
fn left_out(before: Option<Known>, most: u64) -> Known {
    let never_read = before.as_ref().is_none_or(|known| known.never_read);
    let after = if never_read { "" } else { "; what it held before stays in force" };
    Known {
        stamp: Stamp { inode: 0, length: 0, modified: (0, 0) },
        good: before.map(|known| known.good).unwrap_or_default(),
        problem: Some(format!(
            "is not read: the files of the directory are larger than {} MiB together; take some away{after}",
            most >> 20
        )),
        never_read,
    }
}

/// Reads a file where it changed. `None`: it is gone.
fn look(path: &Path, before: Option<Known>, author: Author) -> Option<Known> {
    let bad = |stamp: Stamp, before: Option<Known>, text: String| {
        let never_read = before.as_ref().is_none_or(|known| known.never_read);
        let after = if never_read { "" } else { "; what it held before stays in force" };
        let good = before.map(|known| known.good).unwrap_or_default();
        Some(Known { stamp, good, problem: Some(format!("{text}{after}")), never_read })
    };
    let unknown = Stamp { inode: 0, length: 0, modified: (0, 0) };
    let (file, meta) = match open(path, author) {
        Ok(Some(opened)) => opened,
        Ok(None) => return None,
        Err(why) => return bad(unknown, before, why),
    };
    let stamp = Stamp { inode: meta.ino(), length: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) };
    match before {
        Some(known) if known.stamp == stamp => Some(known),
        before => match read(file, author.most()).and_then(|bytes| manifest::parse(&bytes)) {
            Ok(good) => Some(Known { stamp, good: Arc::new(good), problem: None, never_read: false }),
            Err(text) => bad(stamp, before, text),
        },
    }
}

/// Opens a regular file; nothing where none is.
fn open(path: &Path, author: Author) -> Result<Option<(File, fs::Metadata)>, String> {
    // Non-blocking: a pipe in the directory must not hang anybody.
    let mut flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
    if author == Author::Node {
        flags |= nix::fcntl::OFlag::O_NOFOLLOW;
    }
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(Some((file, meta))),
        Ok(_) => Err("no regular file".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// The text of a manifest of the operator's, as the registry reads it.
///
/// # Errors
/// A sentence.
pub fn text(path: &Path) -> Result<Vec<u8>, String> {
    let (file, _) = open(path, Author::Operator)?.ok_or_else(|| "is gone".to_owned())?;
    read(file, Author::Operator.most())
}

fn read(file: File, most: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > most {
        return Err(format!("larger than {} KiB", most >> 10));
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "file/tests.rs"]
mod tests;
