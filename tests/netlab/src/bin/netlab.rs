//! `netlab capabilities`: what this machine offers to labs. `netlab hold`: a small lab that stays until stdin
//! closes, for looking around with `nsenter` and for testing what a killed lab leaves behind.

use std::io::{Read, Write};
use std::time::Duration;

use netlab::{Lab, LabSpec};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let mut out = std::io::stdout();
    match std::env::args().nth(1).as_deref() {
        Some("capabilities") => {
            // What a lab would have: one of an unprivileged user begins with this, too.
            if let Err(error) = netlab::enter_userns() {
                writeln!(out, "{error}")?;
            }
            Ok(write!(out, "{}", netlab::capabilities())?)
        }
        Some("hold") => hold(&mut out),
        _ => Err("usage: netlab capabilities | netlab hold".into()),
    }
}

fn hold(out: &mut impl Write) -> Outcome {
    netlab::enter_userns()?;
    let lab = Lab::build(&LabSpec::grid(2, 1, 1).routed_pods())?;
    let host = lab.host("s1-h1")?;
    // A daemon: its parent ends at once, its session is its own.
    let daemon = host.command("sh").args(["-c", "setsid sleep 1000 >/dev/null 2>&1 &"]);
    daemon.output(Duration::from_secs(5))?;
    for pod in lab.pods() {
        for other in lab.pods().iter().filter(|other| other.name() != pod.name()) {
            for address in other.addresses() {
                let probed = netlab::probe::icmp(pod, *address, Duration::from_secs(2));
                writeln!(
                    out,
                    "{} {address} {}",
                    pod.name(),
                    if probed.is_ok() { "reached" } else { "lost" }
                )?;
            }
        }
    }
    for warning in lab.warnings() {
        writeln!(out, "warning {warning}")?;
    }
    writeln!(out, "net {}", std::fs::read_link(lab.pod("s1-h1-p1")?.paths().net)?.display())?;
    writeln!(out, "pid {}", std::fs::read_link(host.paths().pid)?.display())?;
    writeln!(out, "files {}", lab.shared_dir().display())?;
    writeln!(out, "ready")?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
