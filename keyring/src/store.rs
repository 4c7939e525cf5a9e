//! Where a node keeps its private key.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::key::{KeyError, PrivateKey};

/// An error of loading or storing a key. An existing key is overwritten only on request.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file or its directory can be read by others.
    #[error(
        "{path} has mode {mode:04o}: others may have read the key; check who could, then `chmod {want:04o} {path}`"
    )]
    Exposed {
        /// The file or directory.
        path: String,
        /// Its permission bits.
        mode: u32,
        /// The bits wanted.
        want: u32,
    },
    /// The file belongs to somebody else.
    #[error(
        "{path} belongs to uid {owner}, this process runs as uid {own}: `chown {own} {path}` if the key is yours"
    )]
    Owner {
        /// The file or directory.
        path: String,
        /// Its owner.
        owner: u32,
        /// Our effective user.
        own: u32,
    },
    /// A directory, link, pipe, ...
    #[error("{path} is no regular file: move it away, then a new key is made")]
    Kind {
        /// What stands where the key file should be.
        path: String,
    },
    /// The content is no key.
    #[error(
        "{path} holds no key ({source}); restore it from a backup or move it away, then a new key is made"
    )]
    Content {
        /// The file.
        path: String,
        /// What is wrong.
        source: KeyError,
    },
    /// The system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: String,
        /// The answer.
        source: io::Error,
    },
    /// No key could be generated.
    #[error("no new key: {0}")]
    Generate(KeyError),
}

/// A key and where it came from.
pub struct StoredKey {
    /// The key.
    pub key: PrivateKey,
    /// Whether it was made just now.
    pub created: bool,
}

/// The seam between the agent and where its key lives.
pub trait KeyStore {
    /// The node's key; generated and stored when there is none yet.
    ///
    /// # Errors
    /// [`StoreError`] names file and remedy; an existing file is left as it is.
    fn load_or_create(&self) -> Result<StoredKey, StoreError>;
}

/// A key file of mode 0600 in a directory of mode 0700, in the format of `wg genkey`.
#[derive(Debug, Clone)]
pub struct KeyFile {
    path: PathBuf,
    temporary_tag: String,
}

impl KeyFile {
    /// The key file `name` in `dir`.
    pub fn new(dir: &Path, name: &str) -> Self {
        Self { path: dir.join(name), temporary_tag: std::process::id().to_string() }
    }

    /// Where the key lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn io(&self, action: &'static str, source: io::Error) -> StoreError {
        StoreError::Io { action, path: self.path.display().to_string(), source }
    }

    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    fn prepare_dir(&self) -> Result<(), StoreError> {
        let dir = self.dir();
        let failed = |action, source| StoreError::Io { action, path: dir.display().to_string(), source };
        if !dir.exists() {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder.create(dir).map_err(|e| failed("create", e))?;
        }
        let meta = fs::metadata(dir).map_err(|e| failed("inspect", e))?;
        let own = nix::unistd::geteuid().as_raw();
        if meta.uid() != own {
            return Err(StoreError::Owner { path: dir.display().to_string(), owner: meta.uid(), own });
        }
        // A directory holds names only; tightening one that is ours exposes nothing further.
        if meta.mode() & 0o077 != 0 {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
                .map_err(|e| failed("chmod 0700", e))?;
        }
        Ok(())
    }

    fn load(&self) -> Result<Option<PrivateKey>, StoreError> {
        let path = || self.path.display().to_string();
        let flags =
            nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
        let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&self.path);
        let mut file = match opened {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) => {
                return Err(StoreError::Kind { path: path() });
            }
            Err(e) => return Err(self.io("open", e)),
        };
        let meta = file.metadata().map_err(|e| self.io("inspect", e))?;
        if !meta.is_file() {
            return Err(StoreError::Kind { path: path() });
        }
        let own = nix::unistd::geteuid().as_raw();
        if meta.uid() != own {
            return Err(StoreError::Owner { path: path(), owner: meta.uid(), own });
        }
        if meta.mode() & 0o077 != 0 {
            return Err(StoreError::Exposed { path: path(), mode: meta.mode() & 0o7777, want: 0o600 });
        }
        let mut text = Zeroizing::new([0u8; 128]);
        let length = read_some(&mut file, text.as_mut_slice()).map_err(|e| self.io("read", e))?;
        let content = |source| StoreError::Content { path: path(), source };
        let text = std::str::from_utf8(&text[..length]).map_err(|_| content(KeyError::Base64))?;
        let key = text.strip_suffix('\n').unwrap_or(text);
        PrivateKey::from_base64(key).map(Some).map_err(content)
    }

    fn create(&self) -> Result<PrivateKey, StoreError> {
        let key = PrivateKey::generate().map_err(StoreError::Generate)?;
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".new-{}", self.temporary_tag));
        let temporary = self.dir().join(name);
        let written = write_key(&temporary, &key)
            // A hard link fails where a file exists: two agents starting at once cannot overwrite each other.
            .and_then(|()| fs::hard_link(&temporary, &self.path))
            .and_then(|()| File::open(self.dir())?.sync_all());
        let _ = fs::remove_file(&temporary);
        match written {
            Ok(()) => Ok(key),
            Err(e) => Err(self.io("create", e)),
        }
    }
}

impl KeyFile {
    /// Replaces the key by another one, in one step. The one before is gone.
    ///
    /// # Errors
    /// [`StoreError`]; the key of before is untouched.
    pub fn replace(&self, key: &PrivateKey) -> Result<(), StoreError> {
        self.prepare_dir()?;
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".next-{}", self.temporary_tag));
        let temporary = self.dir().join(name);
        let written = write_key(&temporary, key)
            .and_then(|()| fs::rename(&temporary, &self.path))
            .and_then(|()| File::open(self.dir())?.sync_all());
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written.map_err(|e| self.io("replace", e))
    }
}

fn write_key(path: &Path, key: &PrivateKey) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(key.to_base64().as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()
}

fn read_some(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            n => length += n,
        }
    }
    Ok(length)
}

impl KeyStore for KeyFile {
    fn load_or_create(&self) -> Result<StoredKey, StoreError> {
        self.prepare_dir()?;
        if let Some(key) = self.load()? {
            return Ok(StoredKey { key, created: false });
        }
        match self.create() {
            Ok(key) => Ok(StoredKey { key, created: true }),
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                let key = self.load()?.ok_or_else(|| self.io("load", io::ErrorKind::NotFound.into()))?;
                Ok(StoredKey { key, created: false })
            }
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
#[path = "store/tests.rs"]
mod tests;
