//! The process's limit on open files, and a check that it is high enough.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More than one pass opens beside what stays open: two programs with their pipes, files of state, readers of status.
const SPARE: usize = 24;
/// The soft limit that the agent sets, if its hard limit allows.
const ENOUGH: u64 = 65_536;

/// Raises the soft limit of open files as far as the hard one allows. Best effort.
pub fn raise() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard.min(ENOUGH)
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(ENOUGH), hard);
    }
}

/// Reports whether an error says that no more files can be opened.
pub fn is_shortage(error: &io::Error) -> bool {
    let raw = error.raw_os_error();
    [Errno::EMFILE, Errno::ENFILE].iter().any(|errno| raw == Some(*errno as i32))
}

/// Returns what is wrong where few more files can be opened. Tries it.
pub fn shortage() -> Option<String> {
    let mut held = Vec::with_capacity(SPARE);
    for _ in 0..SPARE {
        match File::open("/dev/null") {
            Ok(file) => held.push(file),
            Err(error) if is_shortage(&error) => return Some(told(&error, held.len())),
            Err(_) => return None,
        }
    }
    None
}

fn told(error: &io::Error, left: usize) -> String {
    if error.raw_os_error() == Some(Errno::ENFILE as i32) {
        return format!(
            "few file descriptors: this host can open {left} more files at the most: raise the sysctl fs.file-max"
        );
    }
    let limit =
        getrlimit(Resource::RLIMIT_NOFILE).map_or_else(|_| "few".to_owned(), |(soft, _)| soft.to_string());
    format!(
        "few file descriptors: this process may have {limit} files open (RLIMIT_NOFILE), and {left} are left; \
         what needs more fails: raise LimitNOFILE of its unit, or the limit of its container"
    )
}

/// Adds the remedy to an error that ends the agent.
pub fn explained(error: anyhow::Error) -> anyhow::Error {
    let few = error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_shortage));
    // Some causes are kept as text only.
    let said = || format!("{error:#}").contains(&io::Error::from(Errno::EMFILE).to_string());
    if few || said() {
        let limit = io::Error::from(Errno::EMFILE);
        return error.context(told(&limit, 0));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_for_want_of_descriptors_names_the_limit() {
        let error = explained(anyhow::anyhow!("watching: {}", io::Error::from(Errno::EMFILE)));
        assert!(format!("{error:#}").contains("LimitNOFILE"), "{error:#}");
        let error = anyhow::Error::from(io::Error::from(Errno::EMFILE)).context("opening");
        assert!(format!("{:#}", explained(error)).contains("RLIMIT_NOFILE"));
        let other = explained(anyhow::Error::from(io::Error::from(Errno::EPERM)));
        assert!(!format!("{other:#}").contains("descriptors"), "{other:#}");
    }

    #[test]
    fn the_hosts_limit_is_told_apart() {
        assert!(told(&io::Error::from(Errno::ENFILE), 3).contains("fs.file-max"));
        assert_eq!(shortage(), None);
    }
}
