//! Container images, made here from what was built here.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::cluster::deployment;
use crate::node::TEST_IMAGE;
use crate::programs;

// What test pods call.
const APPLETS: [&str; 8] = ["sh", "httpd", "nc", "grep", "echo", "printf", "mkdir", "sleep"];

/// The image of our programs, under this name, in a file of this folder.
///
/// # Errors
/// What `deploy/image/build.sh` said.
pub fn ours(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let out = dir.join(format!("{}.tar", name.replace(['/', ':'], "-")));
    let programs = programs::ours("");
    script(
        "image/build.sh",
        &[&out.display().to_string()],
        &[("SENNIT_IMAGE", name), ("SENNIT_BIN_DIR", &programs.display().to_string())],
    )?;
    Ok(out)
}

/// The name under which `deploy/` knows the image of our programs.
///
/// # Errors
/// When `deploy/` names none.
pub fn deployed_name() -> anyhow::Result<String> {
    let agent = std::fs::read_to_string(deployment("kubernetes/nodes/agent.yaml"))?;
    let image = agent.lines().find_map(|line| line.trim().strip_prefix("image: "));
    Ok(image.context("the DaemonSet names no image")?.to_owned())
}

/// The image of test pods: busybox, which sleeps where it is not told what else to do.
///
/// # Errors
/// What `deploy/image/pack.sh` said.
pub fn test_pod(dir: &Path) -> anyhow::Result<PathBuf> {
    let root = dir.join("test-pod");
    std::fs::create_dir_all(root.join("bin"))?;
    std::fs::copy(programs::kubernetes("busybox"), root.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let out = dir.join("test-pod.tar");
    let [folder, file] = [&root, &out].map(|path| path.display().to_string());
    script("image/pack.sh", &[&folder, TEST_IMAGE, r#"["/bin/sleep","2147483647"]"#, &file], &[])?;
    Ok(out)
}

fn script(name: &str, args: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<()> {
    let output = Command::new(deployment(name)).args(args).envs(variables.iter().copied()).output()?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
