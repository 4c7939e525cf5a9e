//! The programs that are measured, and where they are found.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The program that all others are compared with.
pub(crate) const OURS: &str = "mesh-wg";

/// A userspace WireGuard device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Program {
    /// Its name in tables.
    pub(crate) name: String,
    /// Program and arguments; the interface's name takes the place of `{}` or comes last.
    pub(crate) command: Vec<String>,
    /// What `--version` says, first line.
    pub(crate) version: String,
    /// Of the program's file, in hexadecimal.
    pub(crate) sha256: String,
    /// Where it came from, if known.
    pub(crate) origin: Option<String>,
}

/// Programs known by name, each with the arguments that keep it in the foreground.
const KNOWN: [(&str, &[&str]); 4] = [
    (OURS, &["-f"]),
    ("wireguard-go", &["-f"]),
    ("boringtun-cli", &["--foreground", "--disable-drop-privileges"]),
    ("gotatun", &["--foreground", "--disable-drop-privileges"]),
];

/// A program given as `NAME=COMMAND`.
pub(crate) fn parse_with(text: &str) -> Result<(String, Vec<String>), String> {
    let (name, command) = text.split_once('=').ok_or("expected NAME=COMMAND")?;
    let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    if name.is_empty() || command.is_empty() {
        return Err("expected NAME=COMMAND".into());
    }
    Ok((name.to_owned(), command))
}

/// Finds ours, the known others, and those given. One given under a known name takes its place.
pub(crate) fn find(with: &[(String, Vec<String>)], without: &[String]) -> Result<Vec<Program>> {
    let mut found: Vec<Program> = Vec::new();
    for (name, arguments) in KNOWN {
        if without.iter().any(|other| other == name) || with.iter().any(|(other, _)| other == name) {
            continue;
        }
        let Some(path) = locate(name) else {
            if name == OURS {
                bail!("no mesh-wg in $SENNIT_BIN_DIR or target/release: build it first");
            }
            continue;
        };
        let command =
            std::iter::once(path.display().to_string()).chain(arguments.iter().map(|a| (*a).into()));
        found.push(describe(name, command.collect())?);
    }
    for (name, command) in with {
        found.push(describe(name, command.clone())?);
    }
    // Ours first.
    found.sort_by_key(|program| program.name != OURS);
    Ok(found)
}

fn locate(name: &str) -> Option<PathBuf> {
    let own = env::var_os("SENNIT_BIN_DIR").map_or_else(|| PathBuf::from("target/release"), PathBuf::from);
    if name == OURS {
        return own.join(name).canonicalize().ok();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = cache().map(|cache| cache.join("bin")).into_iter().chain(env::split_paths(&path));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Where `peers.sh` keeps what it got.
fn cache() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("SENNIT_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("sennit")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/sennit")))
        .map(|cache| cache.join("peers"))
}

fn describe(name: &str, mut command: Vec<String>) -> Result<Program> {
    let given = command.first().ok_or_else(|| anyhow!("{name} has an empty command"))?.clone();
    let path = if given.contains('/') { Some(PathBuf::from(&given)) } else { locate(&given) };
    let path = path.and_then(|path| path.canonicalize().ok()).ok_or_else(|| anyhow!("{name}: no {given}"))?;
    command[0] = path.display().to_string();
    let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(Program {
        name: name.to_owned(),
        version: version(&path),
        sha256: hexadecimal(&Sha256::digest(bytes)),
        origin: origin(name, &path),
        command,
    })
}

fn version(path: &Path) -> String {
    let said = Command::new(path).arg("--version").output().ok().map(|output| {
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned()
    });
    said.filter(|line| !line.is_empty()).unwrap_or_else(|| "unknown".into())
}

// A line of the manifest that `peers.sh` writes, if it is about this very file.
fn origin(name: &str, path: &Path) -> Option<String> {
    let cache = cache()?.canonicalize().ok()?;
    if !path.starts_with(&cache) {
        return None;
    }
    let manifest = fs::read_to_string(cache.join("manifest")).ok()?;
    manifest.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Program {
    /// The same program with a variable in its environment.
    pub(crate) fn with_variable(&self, name: &str, value: &str) -> Program {
        let setting = ["env".to_owned(), format!("{name}={value}")];
        Program { command: setting.into_iter().chain(self.command.clone()).collect(), ..self.clone() }
    }

    /// The command line for an interface.
    pub(crate) fn command_for(&self, interface: &str) -> Vec<String> {
        let mut line: Vec<String> = self.command.iter().map(|word| word.replace("{}", interface)).collect();
        if !self.command.iter().any(|word| word.contains("{}")) {
            line.push(interface.to_owned());
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_takes_its_place_or_comes_last() {
        let line = |text: &str| {
            let (name, command) = parse_with(text).unwrap();
            let (version, sha256) = (String::new(), String::new());
            Program { name, command, version, sha256, origin: None }.command_for("wg0").join(" ")
        };
        assert_eq!(line("x=/opt/x -f"), "/opt/x -f wg0");
        assert_eq!(line("x=/opt/x --name={} -v"), "/opt/x --name=wg0 -v");
        let (name, command) = parse_with("x=/opt/x -f").unwrap();
        let program = Program { name, command, version: String::new(), sha256: String::new(), origin: None };
        assert_eq!(program.with_variable("A", "b,c").command_for("wg0").join(" "), "env A=b,c /opt/x -f wg0");
        assert!(parse_with("x").is_err() && parse_with("=a").is_err() && parse_with("x= ").is_err());
    }
}
