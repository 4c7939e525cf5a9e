//! `kill`, `restart`, `stop` and `start`: agents and WireGuard devices.

use std::time::Instant;

use super::{Trouble, Verdict, chosen};
use crate::agents::{self, wait_for};
use crate::layout::NodeLayout;
use crate::report::count;
use crate::scenario::step::{Kill, Signal, Target};
use crate::scenario::value::OneOrMany;
use crate::stage::Stage;

fn number(signal: Signal) -> i32 {
    match signal {
        Signal::Kill => libc::SIGKILL,
        Signal::Term => libc::SIGTERM,
        Signal::Int => libc::SIGINT,
        Signal::Hup => libc::SIGHUP,
        Signal::Stop => libc::SIGSTOP,
        Signal::Cont => libc::SIGCONT,
        Signal::Usr1 => libc::SIGUSR1,
        Signal::Usr2 => libc::SIGUSR2,
    }
}

pub(super) fn kill(stage: &mut Stage, kill: &Kill, deadline: Instant) -> Verdict {
    let nodes = chosen(stage, &kill.nodes)?;
    let signal = number(kill.signal.unwrap_or(Signal::Kill));
    match kill.target {
        Target::Agent => stage.signal_agents(&refs(&nodes), signal, deadline),
        Target::Device => signal_devices(stage, &nodes, signal, deadline)
            .map(drop)
            .map(|()| format!("{} signalled", count(nodes.len(), "device"))),
    }
}

pub(super) fn restart(stage: &mut Stage, kill: &Kill, deadline: Instant) -> Verdict {
    let nodes = chosen(stage, &kill.nodes)?;
    let signal = number(kill.signal.unwrap_or(Signal::Term));
    match kill.target {
        Target::Agent => {
            stage.signal_agents(&refs(&nodes), signal, deadline)?;
            stage.start_agents(&refs(&nodes), deadline)
        }
        Target::Device => {
            let old = signal_devices(stage, &nodes, signal, deadline)?;
            for (node, old) in nodes.iter().zip(old) {
                let mut found = Vec::new();
                let back = wait_until_interrupted(stage, deadline, |stage| {
                    found = device_pids(stage, node)?;
                    Ok(found.iter().any(|pid| !old.contains(pid)))
                })?;
                if !back {
                    return Err(Trouble::failed(format!(
                        "{}: its agent brought up no new device",
                        node.name
                    )));
                }
            }
            Ok(format!("{} back", count(nodes.len(), "device")))
        }
    }
}

pub(super) fn stop(stage: &mut Stage, nodes: &OneOrMany, deadline: Instant) -> Verdict {
    let nodes = chosen(stage, nodes)?;
    stage.signal_agents(&refs(&nodes), libc::SIGTERM, deadline)?;
    Ok(format!("{} stopped", count(nodes.len(), "agent")))
}

pub(super) fn start(stage: &mut Stage, nodes: &OneOrMany, deadline: Instant) -> Verdict {
    let nodes = chosen(stage, nodes)?;
    stage.start_agents(&refs(&nodes), deadline)
}

fn refs(nodes: &[NodeLayout]) -> Vec<&NodeLayout> {
    nodes.iter().collect()
}

fn device_pids(stage: &Stage, node: &NodeLayout) -> Result<Vec<u32>, Trouble> {
    let binaries = stage.binaries.as_ref().ok_or_else(|| Trouble::failed("the scenario runs no agents"))?;
    Ok(agents::device_pids(stage.host(&node.name)?, binaries))
}

/// Signals the devices and answers their old process ids; waits for the end where the signal ends a process.
fn signal_devices(
    stage: &Stage,
    nodes: &[NodeLayout],
    signal: i32,
    deadline: Instant,
) -> Result<Vec<Vec<u32>>, Trouble> {
    let mut old = Vec::new();
    for node in nodes {
        let pids = device_pids(stage, node)?;
        if pids.is_empty() {
            return Err(Trouble::failed(format!("{}: no userspace device process runs here", node.name)));
        }
        for pid in &pids {
            send(*pid, signal).map_err(|error| Trouble::failed(format!("{}: {error}", node.name)))?;
        }
        old.push(pids);
    }
    if matches!(signal, libc::SIGKILL | libc::SIGTERM | libc::SIGINT) {
        for (node, pids) in nodes.iter().zip(&old) {
            let gone = wait_until_interrupted(stage, deadline, |stage| {
                Ok(device_pids(stage, node)?.iter().all(|pid| !pids.contains(pid)))
            })?;
            if !gone {
                return Err(Trouble::failed(format!("{}: its device did not end in time", node.name)));
            }
        }
    }
    Ok(old)
}

fn send(pid: u32, signal: i32) -> Result<(), String> {
    let pid = i32::try_from(pid).map_err(|error| error.to_string())?;
    let signal = nix::sys::signal::Signal::try_from(signal).map_err(|error| error.to_string())?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).map_err(|error| error.to_string())
}

fn wait_until_interrupted(
    stage: &Stage,
    deadline: Instant,
    mut condition: impl FnMut(&Stage) -> Result<bool, Trouble>,
) -> Result<bool, Trouble> {
    let mut trouble = None;
    let met = wait_for(deadline, || match stage.go_on().and_then(|()| condition(stage)) {
        Ok(met) => met,
        Err(error) => {
            trouble = Some(error);
            true
        }
    });
    trouble.map_or(Ok(met), Err)
}
