//! Labs that are held: `up`, `exec`, `status`, `down`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use meshlab::control::{self, Answer, Control, Entrance, LabStatus, Request};
use meshlab::{Options, Scenario, Stage};

const DOWN_PATIENCE: Duration = Duration::from_secs(30);

/// Builds the lab, starts the agents and holds both.
pub(super) fn up(path: &Path) -> anyhow::Result<u8> {
    let (mut scenario, layout) = Scenario::load(path)?;
    scenario.steps.clear();
    let folder = control::runtime_dir()?;
    if control::running(&folder)?.iter().any(|(name, _)| *name == scenario.name) {
        bail!("a lab `{}` is up already; take it down with `meshlab down {0}`", scenario.name);
    }
    let interrupt = super::interrupt()?;
    let flag = Arc::clone(&interrupt);
    let options = Options {
        interrupt: Arc::clone(&interrupt),
        observer: super::terminal::observer(),
        hold: Some(Box::new(move |stage, _| {
            if let Err(error) = until_released(stage, &flag) {
                eprintln!("meshlab: {error:#}");
            }
        })),
        ..Options::default()
    };
    let report = meshlab::run(&scenario, &layout, options)?;
    // A lab that came up and was then ended by hand did all that was asked of it.
    let failed = report.steps.iter().any(|step| step.outcome == meshlab::Outcome::Failed);
    if failed {
        super::print(&report.to_text())?;
    } else {
        eprintln!("meshlab: the lab is torn down");
    }
    Ok(u8::from(failed))
}

/// Holds a lab until Ctrl-C or `down`.
pub(super) fn until_released(stage: &mut Stage, interrupt: &AtomicBool) -> anyhow::Result<()> {
    let folder = control::runtime_dir()?;
    let down = Arc::new(AtomicBool::new(false));
    let _control = Control::serve(stage, &folder, Arc::clone(&down)).context("cannot hold the lab")?;
    let name = &stage.scenario().name;
    let place = stage.layout().nodes().next().map_or("NODE", |node| node.name.as_str());
    eprintln!(
        "the lab `{name}` is up; from another terminal:\n  meshlab status\n  meshlab exec {place} -- ip address\n  \
         meshlab down\nCtrl-C ends it."
    );
    while !down.load(Ordering::SeqCst) && !interrupt.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Runs a command inside and takes its place, so that terminal and exit code are the command's own.
pub(super) fn exec(lab: Option<&str>, place: String, command: &[String]) -> anyhow::Result<u8> {
    let (_, socket) = the_lab(lab)?;
    let Entrance { net, mount, uts, pid } = match control::ask(&socket, &Request::Where { name: place })? {
        Answer::Where(entrance) => entrance,
        Answer::Refused { reason } => bail!("{reason}"),
        other => bail!("the lab answers {other:?}"),
    };
    let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
    let error = Command::new("nsenter")
        .args([flag("net", &net), flag("mount", &mount), flag("uts", &uts), flag("pid", &pid)])
        .arg("--")
        .args(command)
        .exec();
    Err(error).context("cannot run nsenter (of util-linux)")
}

pub(super) fn status(lab: Option<&str>, json: bool) -> anyhow::Result<u8> {
    let folder = control::runtime_dir()?;
    let mut all: Vec<LabStatus> = Vec::new();
    for (name, socket) in control::running(&folder)? {
        if lab.is_none_or(|wanted| wanted == name) {
            match control::ask(&socket, &Request::Status)? {
                Answer::Status(status) => all.push(status),
                other => bail!("the lab `{name}` answers {other:?}"),
            }
        }
    }
    if json {
        super::print(&format!("{}\n", serde_json::to_string_pretty(&all)?))?;
    } else if all.is_empty() {
        super::print("no lab is up\n")?;
    } else {
        for status in &all {
            super::print(&render(status))?;
        }
    }
    Ok(u8::from(all.is_empty()))
}

fn render(status: &LabStatus) -> String {
    let mut text = format!("{} (process {})\n", status.scenario, status.pid);
    for node in &status.nodes {
        text.push_str(&format!("  {:<20} {}\n", node.name, node.agent));
        for pod in &node.pods {
            text.push_str(&format!("    {pod}\n"));
        }
    }
    text
}

pub(super) fn down(lab: Option<&str>) -> anyhow::Result<u8> {
    let (name, socket) = the_lab(lab)?;
    let process = match control::ask(&socket, &Request::Down)? {
        Answer::Down { pid } => pid,
        other => bail!("the lab `{name}` answers {other:?}"),
    };
    let deadline = Instant::now() + DOWN_PATIENCE;
    while runs(process) {
        if Instant::now() >= deadline {
            bail!("the lab `{name}` is still up after {} s", DOWN_PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(0)
}

/// False also for a process that ended and waits for its parent to look.
fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| !status.contains("State:\tZ"))
}

/// The lab of this name, or the only one.
fn the_lab(wanted: Option<&str>) -> anyhow::Result<(String, PathBuf)> {
    let mut all = control::running(&control::runtime_dir()?)?;
    if let Some(wanted) = wanted {
        all.retain(|(name, _)| name == wanted);
    }
    match all.len() {
        1 => Ok(all.remove(0)),
        0 => bail!("no such lab is up; start one with `meshlab up SCENARIO.yaml`"),
        _ => {
            let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
            bail!("several labs are up ({}); name one", names.join(", "))
        }
    }
}
