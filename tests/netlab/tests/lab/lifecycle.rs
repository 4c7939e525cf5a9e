use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use netlab::probe::{Kind, Probe};
use netlab::{Error, Feature, Lab, LabSpec};

use crate::{PATIENCE, build, probed, skip, v4, wait_until};

/// Processes of the machine in a namespace, by the link below `/proc/PID/ns`.
fn members(kind: &str, namespace: &Path) -> Vec<PathBuf> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    processes
        .filter(|path| std::fs::read_link(path.join("ns").join(kind)).is_ok_and(|link| link == namespace))
        .collect()
}

fn pid_space(lab: &Lab) -> PathBuf {
    std::fs::read_link(lab.core().paths().pid).unwrap()
}

#[test]
fn two_labs_at_the_same_time_do_not_meet() {
    let spec = LabSpec::grid(2, 1, 1).routed_pods();
    let Some(one) = build("two_labs_at_the_same_time_do_not_meet", &spec) else { return };
    let two = Lab::build(&spec).unwrap();
    let block = two.core().block(netlab::Rule::any()).unwrap();
    let ask = |lab: &Lab| {
        let to = v4(lab.pod("s2-h1-p1").unwrap().addresses());
        Probe::new(lab.pod("s1-h1-p1").unwrap(), to, Kind::Icmp).deadline(crate::SILENCE).ask()
    };
    assert!(ask(&one).is_ok());
    assert!(ask(&two).is_err());
    two.core().unblock(block).unwrap();
    drop(one);
    assert!(ask(&two).is_ok());
}

#[test]
fn a_daemon_and_all_files_end_with_the_lab() {
    let Some(mut lab) = build("a_daemon_and_all_files_end_with_the_lab", &LabSpec::grid(1, 1, 1)) else {
        return;
    };
    let space = pid_space(&lab);
    let pod = lab.namespace("s1-h1-p1").unwrap().clone();
    for namespace in [lab.namespace("s1-h1").unwrap(), &pod, lab.core()] {
        let script = "setsid sleep 1000 >/dev/null 2>&1 &";
        assert!(namespace.command("sh").args(["-c", script]).output(PATIENCE).unwrap().success());
        namespace.command("sleep").arg("1000").spawn().unwrap().detach();
    }
    wait_until("three daemons, three others and the init", || members("pid", &space).len() == 7);
    let files = lab.shared_dir().to_owned();
    assert!(files.exists());
    let started = Instant::now();
    lab.shutdown();
    assert!(started.elapsed().as_secs() < 1, "{:?}", started.elapsed());
    assert_eq!(members("pid", &space), [] as [PathBuf; 0]);
    assert!(!files.exists());
    assert!(matches!(pod.run(|| ()), Err(Error::Gone { .. })));
    assert!(matches!(pod.command("true").spawn(), Err(Error::Gone { .. })));
    lab.shutdown();
}

#[test]
fn a_panic_takes_the_lab_down() {
    let Some(lab) = build("a_panic_takes_the_lab_down", &LabSpec::grid(1, 1, 1)) else { return };
    let (space, net) = (pid_space(&lab), lab.core().paths().net);
    let test = std::thread::spawn(move || {
        lab.host("s1-h1").unwrap().command("sleep").arg("1000").spawn().unwrap().detach();
        panic!("on purpose");
    });
    assert!(test.join().is_err());
    assert_eq!(members("pid", &space), [] as [PathBuf; 0]);
    assert!(!net.exists());
}

#[test]
fn the_machine_outside_is_not_touched() {
    let read = || {
        let links = Command::new("ip").args(["-o", "link"]).output().unwrap().stdout;
        let forward = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        (String::from_utf8(links).unwrap(), forward, mounts)
    };
    let before = read();
    let Some(lab) = build("the_machine_outside_is_not_touched", &LabSpec::grid(2, 1, 1)) else { return };
    assert_eq!(read(), before);
    drop(lab);
    assert_eq!(read(), before);
}

/// A `netlab hold` and what it said before it was ready, as key and rest of line.
struct Holder {
    child: Child,
    said: Vec<(String, String)>,
}

impl Holder {
    fn start(command: &mut Command) -> Result<Holder, String> {
        let mut child = command
            .arg("hold")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut said = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if line == "ready" {
                return Ok(Holder { child, said });
            }
            let (key, rest) = line.split_once(' ').unwrap();
            said.push((key.to_owned(), rest.to_owned()));
        }
        Err(String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap())
    }

    fn said(&self, key: &str) -> PathBuf {
        PathBuf::from(&self.said.iter().find(|(said, _)| said == key).unwrap().1)
    }
}

#[test]
fn a_killed_lab_leaves_no_process_and_no_namespace() {
    let test = "a_killed_lab_leaves_no_process_and_no_namespace";
    if let Err(missing) = probed().require(crate::NEEDED) {
        return skip(test, &missing.to_string());
    }
    let mut holder = Holder::start(&mut Command::new(env!("CARGO_BIN_EXE_netlab"))).unwrap();
    let (space, net, files) = (holder.said("pid"), holder.said("net"), holder.said("files"));
    assert_eq!(members("pid", &space).len(), 2, "the init and the daemon");
    let path = format!("/proc/{}/task", holder.child.id());
    let holds = |net: &Path| {
        let tasks = std::fs::read_dir(&path).into_iter().flatten().flatten();
        tasks
            .filter(|task| std::fs::read_link(task.path().join("ns/net")).is_ok_and(|link| link == net))
            .count()
    };
    assert_eq!(holds(&net), 1, "the thread of the namespace");
    holder.child.kill().unwrap();
    holder.child.wait().unwrap();
    wait_until("all its processes are gone", || members("pid", &space).is_empty());
    assert_eq!(members("net", &net), [] as [PathBuf; 0]);
    // Only files are left, and the next lab removes them.
    let lab = Lab::build(&LabSpec::new()).unwrap();
    assert!(!files.exists(), "{files:?}");
    drop(lab);
}

#[test]
fn an_unprivileged_user_builds_a_lab_in_a_user_namespace() {
    let test = "an_unprivileged_user_builds_a_lab_in_a_user_namespace";
    if !probed().has(Feature::UserNamespaces) {
        return skip(test, &format!("{}", probed()));
    }
    // The binary may lie where nobody else can read it.
    let dir = std::env::temp_dir().join(format!("netlab-userns-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let binary = dir.join("netlab");
    std::fs::copy(env!("CARGO_BIN_EXE_netlab"), &binary).unwrap();
    let mut command = Command::new(&binary);
    let nobody = 65534;
    if probed().has(Feature::Privilege) {
        command.uid(nobody).gid(nobody);
        std::os::unix::fs::chown(&dir, Some(nobody), Some(nobody)).unwrap();
    }
    let holder = Holder::start(command.env("TMPDIR", &dir).current_dir("/"));
    match holder {
        Ok(mut holder) => {
            for (key, rest) in &holder.said {
                assert!(!rest.ends_with(" lost"), "{key} {rest}");
                if key == "warning" {
                    eprintln!("{test}: warning {rest}");
                }
            }
            assert!(holder.said.iter().any(|(_, rest)| rest.ends_with(" reached")));
            let space = holder.said("pid");
            drop(holder.child.stdin.take());
            assert!(holder.child.wait().unwrap().success());
            wait_until("all its processes are gone", || members("pid", &space).is_empty());
            assert!(!holder.said("files").exists());
        }
        Err(why) => skip(test, &why),
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
