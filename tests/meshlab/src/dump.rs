//! The traces of a failed run, one folder per node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netlab::Namespace;

use crate::agents;
use crate::stage::Stage;

const DEADLINE: Duration = Duration::from_secs(5);

type Question = (&'static str, &'static [&'static str]);

/// What is asked of every namespace.
const NETWORK: [Question; 8] = [
    ("addresses.txt", &["ip", "address", "show"]),
    ("links.txt", &["ip", "-d", "-s", "link", "show"]),
    ("routes4.txt", &["ip", "-4", "route", "show", "table", "all"]),
    ("routes6.txt", &["ip", "-6", "route", "show", "table", "all"]),
    ("rules4.txt", &["ip", "-4", "rule", "show"]),
    ("rules6.txt", &["ip", "-6", "rule", "show"]),
    ("nftables.txt", &["nft", "list", "ruleset"]),
    ("sockets.txt", &["ss", "-lunp"]),
];
/// What is asked of nodes only, whose `/run` is their own; `wg show` hides private keys itself.
const DEVICE: [Question; 2] =
    [("wg.txt", &["wg", "show"]), ("device.log", &["sh", "-c", "cat /run/sennit/*.log"])];

/// Writes the traces into `wanted`, or into the first free `reports/<scenario>-<n>`; answers the folder.
pub(crate) fn write(stage: &mut Stage, wanted: Option<PathBuf>) -> io::Result<PathBuf> {
    let folder = match wanted {
        Some(folder) => {
            fs::create_dir_all(&folder)?;
            folder
        }
        None => free_folder(Path::new("reports"), &stage.scenario().name)?,
    };
    for host in stage.lab().hosts() {
        let own = folder.join(host.name());
        fs::create_dir_all(&own)?;
        ask(host, &own, &NETWORK)?;
        ask(host, &own, &DEVICE)?;
        copy_if_there(&agents::log_file(host), &own.join("agent.log"))?;
        copy_if_there(&host.private_dir().join("agent.yaml"), &own.join("agent.yaml"))?;
        if let Some(binaries) = stage.binaries() {
            let text = match agents::status(host, binaries) {
                Ok(status) => format!("{:#}\n", status.document),
                Err(error) => format!("{error}\n"),
            };
            fs::write(own.join("status.json"), text)?;
        }
    }
    for site in stage.lab().sites() {
        let own = folder.join(format!("router-{}", site.name()));
        fs::create_dir_all(&own)?;
        ask(site, &own, &NETWORK)?;
    }
    copy_folder(&stage.registry(), &folder.join("registry"))?;
    copy_folder(&stage.lab().shared_dir().join("recordings"), &folder.join("recordings"))?;
    Ok(folder)
}

fn ask(namespace: &Namespace, folder: &Path, questions: &[Question]) -> io::Result<()> {
    for (file, command) in questions {
        let answer = namespace.command(command[0]).args(command[1..].iter().copied()).output(DEADLINE);
        let text = match answer {
            Ok(output) => [output.stdout, output.stderr].concat(),
            Err(error) => format!("{}: {error}\n", command.join(" ")).into_bytes(),
        };
        fs::write(folder.join(file), text)?;
    }
    Ok(())
}

fn free_folder(parent: &Path, name: &str) -> io::Result<PathBuf> {
    fs::create_dir_all(parent)?;
    let mut number = 1;
    loop {
        let folder = parent.join(format!("{name}-{number}"));
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error),
        }
    }
}

fn copy_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::copy(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Copies plain files, and those of folders below; links are left alone.
fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    fs::create_dir_all(to)?;
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
