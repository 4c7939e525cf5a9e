use std::net::UdpSocket;
use std::time::{Duration, Instant};

use netlab::{HostSpec, LabSpec, SiteSpec};

use crate::{PATIENCE, build, wait_until};

#[test]
fn each_host_has_its_own_run_name_and_interfaces() {
    let Some(lab) = build("each_host_has_its_own_run_name_and_interfaces", &LabSpec::grid(1, 2, 1)) else {
        return;
    };
    let sh = |host: &str, script: &str| {
        let output = lab.host(host).unwrap().command("sh").args(["-c", script]).output(PATIENCE).unwrap();
        assert!(output.success(), "{script}: {}", output.stderr_text());
        output.stdout_text().trim().to_owned()
    };
    sh("s1-h1", "mkdir -p /var/run/wireguard && echo one > /var/run/wireguard/sennit0.sock");
    assert_eq!(sh("s1-h2", "ls /var/run/wireguard 2>&1 | grep -c sock || true"), "0");
    assert!(!std::path::Path::new("/run/wireguard/sennit0.sock").exists());
    assert_eq!(sh("s1-h2", "hostname"), "s1-h2");
    std::fs::write(lab.shared_dir().join("node"), "shared").unwrap();
    assert_eq!(sh("s1-h1", "cat /run/netlab/shared/node"), "shared");
    sh("s1-h2", "echo mine > /run/netlab/private/file");
    let private = lab.host("s1-h2").unwrap().private_dir().join("file");
    assert_eq!(std::fs::read_to_string(private).unwrap(), "mine\n");
    assert_eq!(sh("s1-h1", "ls /run/netlab/private"), "");
    if lab.warnings().is_empty() {
        assert_eq!(sh("s1-h1", "ls /sys/class/net | xargs"), "eth0 lo pod1");
        assert_eq!(sh("s1-h1", "cat /proc/1/comm"), "netlab-init");
        assert_eq!(sh("s1-h1", "test -d /proc/$$ && echo there"), "there");
    }
}

#[test]
fn binds_are_made_and_never_on_the_machines_own_files() {
    let test = "binds_are_made_and_never_on_the_machines_own_files";
    let dir = std::env::temp_dir().join(format!("netlab-bind-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("file"), "bound").unwrap();
    let with = |host: HostSpec| LabSpec::new().site(SiteSpec::new("s").host(host));
    let lab = build(test, &with(HostSpec::new("h").bind(&dir, "/run/sennit/registry")));
    if let Some(lab) = &lab {
        let cat = lab.host("h").unwrap().command("cat").arg("/run/sennit/registry/file");
        assert_eq!(cat.output(PATIENCE).unwrap().stdout_text(), "bound");
        let refused = netlab::Lab::build(&with(HostSpec::new("h").bind(&dir, "/etc/netlab-nothing-here")));
        assert!(refused.unwrap_err().to_string().contains("mount point"));
        assert!(!std::path::Path::new("/etc/netlab-nothing-here").exists());
    }
    drop(lab);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn commands_take_input_and_give_output_status_and_deadline() {
    let test = "commands_take_input_and_give_output_status_and_deadline";
    let Some(lab) = build(test, &LabSpec::grid(1, 1, 1)) else { return };
    let host = lab.host("s1-h1").unwrap();
    let script = "cat; echo $COLOUR; pwd; echo oops >&2; exit 3";
    let output = host
        .command("sh")
        .args(["-c", script])
        .stdin("given\n")
        .env("COLOUR", "red")
        .current_dir("/")
        .output(PATIENCE)
        .unwrap();
    assert_eq!(output.stdout_text(), "given\nred\n/\n");
    assert_eq!(output.stderr_text(), "oops\n");
    assert_eq!(output.status.unwrap().code(), Some(3));

    let started = Instant::now();
    let output =
        host.command("sh").args(["-c", "echo begun; sleep 1000"]).output(Duration::from_millis(200)).unwrap();
    assert!(output.status.is_none() && !output.success());
    assert_eq!(output.stdout_text(), "begun\n");
    assert!(started.elapsed() < PATIENCE);

    let log = lab.shared_dir().join("log");
    let process = host.command("sh").args(["-c", "echo logged; sleep 1000"]).log_to(&log).spawn().unwrap();
    wait_until("the log", || std::fs::read_to_string(&log).is_ok_and(|text| text == "logged\n"));
    assert!(process.try_wait().unwrap().is_none());
    process.signal(15).unwrap();
    assert!(process.wait(PATIENCE).unwrap().is_some());
    process.kill().unwrap();

    let error = host.command("no-such-program").spawn().unwrap_err().to_string();
    assert!(error.contains("no-such-program") && error.contains("s1-h1"), "{error}");
}

#[test]
fn closures_and_commands_of_one_namespace_do_not_wait_for_each_other() {
    let test = "closures_and_commands_of_one_namespace_do_not_wait_for_each_other";
    let Some(lab) = build(test, &LabSpec::grid(1, 1, 1)) else { return };
    let pod = lab.pod("s1-h1-p1").unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let stuck = pod.spawn(move || released.recv().is_ok()).unwrap();
    let sleeper = pod.command("sleep").arg("1000").spawn().unwrap();
    // A socket made inside stays inside, also when it is moved out, and so do threads started inside.
    let socket =
        pod.run(|| std::thread::spawn(|| UdpSocket::bind("10.1.1.10:0")).join().unwrap()).unwrap().unwrap();
    assert_eq!(socket.local_addr().unwrap().ip().to_string(), "10.1.1.10");
    assert!(pod.command("true").output(PATIENCE).unwrap().success());
    let panicked = pod.run(|| panic!("on purpose"));
    assert!(panicked.is_err());
    assert_eq!(pod.run(|| 7).unwrap(), 7);
    sleeper.kill().unwrap();
    release.send(()).unwrap();
    assert!(stuck.join().unwrap());
}
