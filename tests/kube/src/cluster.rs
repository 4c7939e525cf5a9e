//! A control plane: etcd and kube-apiserver in one host of a lab.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_policy::Kind;
use mesh_policy::kind::KINDS;
use netlab::{Host, Output, Process};
use serde_json::{Value, json};

use crate::pki::{Pki, write_private};
use crate::{eventually, programs};

const PORT: u16 = 6443;
const SERVICES: &str = "10.97.0.0/16";
// The first of them is the API's own.
const SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 97, 0, 1));
const COMMAND: Duration = Duration::from_secs(90);
/// A thousand objects of one manifest have taken more than half a minute beside another cluster.
const APPLY: Duration = Duration::from_secs(180);

/// A control plane, up.
pub struct Cluster {
    host: Host,
    address: IpAddr,
    dir: PathBuf,
    pki: Pki,
    etcd: Option<Process>,
    api: Option<Process>,
    // None: no controllers.
    controllers: Option<Vec<Process>>,
}

/// A folder of `deploy/`.
pub fn deployment(folder: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(folder).display().to_string()
}

/// What a service account token is bound to.
#[derive(Clone, Copy, Debug)]
pub enum Bound<'a> {
    /// Nothing.
    Nothing,
    /// A Node.
    Node(&'a str),
    /// A Pod of namespace `sennit`.
    Pod(&'a str),
}

impl Cluster {
    /// Starts one in this host, with its files in `dir`, and waits until it is ready.
    ///
    /// # Errors
    /// What does not come up, with its last words.
    pub fn start(host: &Host, dir: &Path) -> anyhow::Result<Self> {
        Self::launch(host, dir, None)
    }

    /// The same with controller-manager and scheduler, for whole nodes.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn start_whole(host: &Host, dir: &Path) -> anyhow::Result<Self> {
        let mut cluster = Self::launch(host, dir, Some(Vec::new()))?;
        cluster.start_controllers()?;
        Ok(cluster)
    }

    fn launch(host: &Host, dir: &Path, controllers: Option<Vec<Process>>) -> anyhow::Result<Self> {
        let address =
            *host.addresses().iter().find(|a| a.is_ipv4()).context("the host has no IPv4 address")?;
        std::fs::create_dir_all(dir)?;
        let pki = Pki::new(dir)?;
        // Pods know it by its Service.
        pki.issue("apiserver", "kube-apiserver", None, &[address, SERVICE])?;
        pki.issue("admin", "admin", Some("system:masters"), &[])?;
        let mut cluster = Self {
            host: host.clone(),
            address,
            dir: dir.to_owned(),
            pki,
            etcd: None,
            api: None,
            controllers,
        };
        cluster.kubeconfig_by_certificate("admin")?;
        cluster.start_etcd()?;
        cluster.start_api()?;
        Ok(cluster)
    }

    fn start_etcd(&mut self) -> anyhow::Result<()> {
        let (client, peer) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
        let etcd = self
            .host
            .command(programs::kubernetes("etcd"))
            .args(["--name", "test", "--data-dir", &self.dir.join("etcd").display().to_string()])
            .args(["--listen-client-urls", client, "--advertise-client-urls", client])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("test={peer}"), "--log-level", "warn"])
            // Nothing here outlives a crash of the machine.
            .arg("--unsafe-no-fsync")
            .log_to(self.dir.join("etcd.log"))
            .spawn()?;
        self.etcd = Some(etcd);
        Ok(())
    }

    fn stop_etcd(&mut self) -> anyhow::Result<()> {
        if let Some(etcd) = self.etcd.take() {
            etcd.kill()?;
            ensure!(etcd.wait(COMMAND)?.is_some(), "etcd does not end");
        }
        Ok(())
    }

    /// Copies all that the cluster holds, while its store is stopped for a moment.
    ///
    /// # Errors
    /// Fails if a program does not stop or start, or if the copy fails.
    pub fn back_up(&mut self) -> anyhow::Result<()> {
        self.stop_api()?;
        self.stop_etcd()?;
        self.copy("etcd", "backup")?;
        self.start_etcd()?;
        self.start_api()
    }

    /// Puts back what [`Cluster::back_up`] copied.
    ///
    /// # Errors
    /// As there.
    pub fn restore(&mut self) -> anyhow::Result<()> {
        self.stop_api()?;
        self.stop_etcd()?;
        std::fs::remove_dir_all(self.dir.join("etcd"))?;
        self.copy("backup", "etcd")?;
        self.start_etcd()?;
        self.start_api()
    }

    fn copy(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let [from, to] = [from, to].map(|name| self.dir.join(name).display().to_string());
        let copied = self.host.command("cp").args(["-a", &from, &to]).output(COMMAND)?;
        ensure!(copied.success(), "{}", copied.stderr_text());
        Ok(())
    }

    fn start_controllers(&mut self) -> anyhow::Result<()> {
        let mut started = Vec::new();
        for (program, extra) in [
            (
                "kube-controller-manager",
                vec![
                    "--use-service-account-credentials".to_owned(),
                    format!("--service-account-private-key-file={}", self.pki.path("sa.key")),
                    format!("--root-ca-file={}", self.pki.path("ca.crt")),
                    format!("--service-cluster-ip-range={SERVICES}"),
                    // Nodes that are made anew are noticed sooner than the default of 40 s.
                    "--node-monitor-grace-period=20s".to_owned(),
                ],
            ),
            ("kube-scheduler", Vec::new()),
        ] {
            let kubeconfig =
                self.client(&program.replace("kube-", ""), &format!("system:{program}"), None)?;
            let kubeconfig = kubeconfig.display().to_string();
            let command = self.host.command(programs::kubernetes(program)).args(extra);
            let flags = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"];
            let command = command.args(flags.map(|flag| format!("--{flag}={kubeconfig}")));
            let command = command.args(["--bind-address=127.0.0.1", "--leader-elect=false"]);
            started.push(command.log_to(self.dir.join(format!("{program}.log"))).spawn()?);
        }
        self.controllers = Some(started);
        Ok(())
    }

    /// Kills the controllers, and starts them again with the API.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn restart_controllers(&mut self) -> anyhow::Result<()> {
        if self.controllers.take().is_some() {
            self.start_controllers()?;
        }
        Ok(())
    }

    /// A kubeconfig file for somebody by certificate: `NAME.kubeconfig`.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn client(&self, file: &str, name: &str, group: Option<&str>) -> anyhow::Result<PathBuf> {
        self.pki.issue(file, name, group, &[])?;
        self.kubeconfig_by_certificate(file)
    }

    fn kubeconfig_by_certificate(&self, file: &str) -> anyhow::Result<PathBuf> {
        let [certificate, key] = ["crt", "key"].map(|kind| self.pki.path(&format!("{file}.{kind}")));
        self.write_kubeconfig(file, &json!({"client-certificate": certificate, "client-key": key}))
    }

    /// The file of the authority that clients' certificates are checked with.
    pub fn authority(&self) -> String {
        self.pki.path("ca.crt")
    }

    /// Starts the API server and waits until it is ready.
    ///
    /// # Errors
    /// With its last words.
    pub fn start_api(&mut self) -> anyhow::Result<()> {
        let pki = |file: &str| self.pki.path(file);
        let flags = [
            ("etcd-servers", "http://127.0.0.1:2379".to_owned()),
            ("bind-address", self.address.to_string()),
            ("advertise-address", self.address.to_string()),
            ("secure-port", PORT.to_string()),
            ("tls-cert-file", pki("apiserver.crt")),
            ("tls-private-key-file", pki("apiserver.key")),
            ("client-ca-file", pki("ca.crt")),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-account-key-file", pki("sa.pub")),
            ("service-account-signing-key-file", pki("sa.key")),
            ("authorization-mode", "Node,RBAC".to_owned()),
            ("enable-admission-plugins", "NodeRestriction".to_owned()),
            ("kubelet-client-certificate", pki("admin.crt")),
            ("kubelet-client-key", pki("admin.key")),
            ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            ("service-cluster-ip-range", SERVICES.to_owned()),
            ("allow-privileged", "true".to_owned()),
        ];
        // Without controllers nobody makes the service account of a namespace.
        let bare = self.controllers.is_none().then_some("--disable-admission-plugins=ServiceAccount");
        let process = self
            .host
            .command(programs::kubernetes("kube-apiserver"))
            .args(flags.map(|(flag, value)| format!("--{flag}={value}")))
            .args(bare)
            .log_to(self.dir.join("apiserver.log"))
            .spawn()?;
        let ready = eventually("the API server is ready", || {
            if let Some(status) = process.try_wait()? {
                bail!("it ended with {status}");
            }
            self.kubectl(&["get", "--raw", "/readyz"]).map(drop)
        });
        self.api = Some(process);
        ready.with_context(|| self.log("apiserver.log"))
    }

    /// Kills the API server.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn stop_api(&mut self) -> anyhow::Result<()> {
        if let Some(process) = self.api.take() {
            process.kill()?;
            ensure!(process.wait(COMMAND)?.is_some(), "the API server does not end");
        }
        Ok(())
    }

    /// Where the API is.
    pub fn server(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// Where the API's host is.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The administrator's kubeconfig file.
    pub fn admin(&self) -> String {
        self.dir.join("admin.kubeconfig").display().to_string()
    }

    fn write_kubeconfig(&self, name: &str, user: &Value) -> anyhow::Result<PathBuf> {
        let path = self.dir.join(format!("{name}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.server(), "certificate-authority": self.pki.path("ca.crt")}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        write_private(&path, &config.to_string())?;
        Ok(path)
    }

    /// A kubeconfig file for a service account token, which lies beside it in `NAME.token`, as a projected one does.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn kubeconfig(&self, name: &str, token: &str) -> anyhow::Result<PathBuf> {
        let file = self.dir.join(format!("{name}.token"));
        write_private(&file, token)?;
        self.write_kubeconfig(name, &json!({"tokenFile": file}))
    }

    /// A kubeconfig file with this user and this address of the server, whose certificate names its own.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn kubeconfig_for(&self, name: &str, server: &str, user: &Value) -> anyhow::Result<PathBuf> {
        let path = self.write_kubeconfig(name, user)?;
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        config["clusters"][0]["cluster"]["server"] = json!(server);
        config["clusters"][0]["cluster"]["tls-server-name"] = json!(self.address.to_string());
        write_private(&path, &config.to_string())?;
        Ok(path)
    }

    /// A kubeconfig for others, with all that it needs in it.
    ///
    /// # Errors
    /// When the authority's file cannot be read.
    pub fn portable_kubeconfig(&self, token: &str) -> anyhow::Result<Value> {
        use base64::Engine as _;
        let authority = std::fs::read(self.pki.path("ca.crt"))?;
        let authority = base64::engine::general_purpose::STANDARD.encode(authority);
        Ok(json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.server(), "certificate-authority-data": authority}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }))
    }

    /// Returns the cluster's host in the lab.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Starts a program of ours in the cluster's own host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, program: &str, args: &[&str], log: &str) -> anyhow::Result<Process> {
        let command = self.host.command(programs::ours(program)).args(args.iter().copied());
        Ok(command.log_to(self.dir.join(log)).spawn()?)
    }

    /// The end of a log of this cluster's.
    pub fn log(&self, name: &str) -> String {
        let log = std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Runs kubectl as somebody, whatever comes of it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn kubectl_as(&self, kubeconfig: &str, args: &[&str], input: &str) -> anyhow::Result<Output> {
        self.ask(kubeconfig, args, input, COMMAND)
    }

    fn ask(&self, kubeconfig: &str, args: &[&str], input: &str, within: Duration) -> anyhow::Result<Output> {
        let kubeconfig = self.dir.join(format!("{kubeconfig}.kubeconfig"));
        let command = self
            .host
            .command(programs::kubernetes("kubectl"))
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .args(args.iter().copied())
            .env("KUBECACHEDIR", self.dir.join("cache"))
            .stdin(input);
        Ok(command.output(within)?)
    }

    /// Runs kubectl as administrator; what it prints.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.checked(args, "")
    }

    /// The same for what takes longer.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl_within(&self, args: &[&str], within: Duration) -> anyhow::Result<String> {
        self.checked_within(args, "", within)
    }

    fn checked(&self, args: &[&str], input: &str) -> anyhow::Result<String> {
        self.checked_within(args, input, COMMAND)
    }

    fn checked_within(&self, args: &[&str], input: &str, within: Duration) -> anyhow::Result<String> {
        let output = self.ask("admin", args, input, within)?;
        ensure!(output.status.is_some(), "kubectl {}: not done after {} s", args.join(" "), within.as_secs());
        ensure!(output.success(), "kubectl {}: {}", args.join(" "), output.stderr_text().trim());
        Ok(output.stdout_text())
    }

    /// What an operator is told of a kind or a field, once the server tells it: it does so some seconds after it serves the kind.
    ///
    /// # Errors
    /// When it does not.
    pub fn explain(&self, field: &str) -> anyhow::Result<String> {
        eventually("a kind is explained", || self.kubectl(&["explain", field]))
    }

    /// Creates or changes objects.
    ///
    /// # Errors
    /// What the API server said.
    pub fn apply(&self, manifest: &Value) -> anyhow::Result<()> {
        let args = ["apply", "--server-side", "--field-manager=operator", "-f", "-"];
        self.checked_within(&args, &manifest.to_string(), APPLY).map(drop)
    }

    /// Installs what `deploy/kubernetes/base` holds, and waits until the admission policy bites.
    ///
    /// # Errors
    /// What the API server said.
    pub fn deploy(&self) -> anyhow::Result<()> {
        self.kubectl(&["apply", "--server-side", "-k", &deployment("kubernetes/base")])?;
        let mut wait = vec!["wait", "--for=condition=Established", "--timeout=30s"];
        wait.extend(["crd/meshnodes.sennit.dev", "crd/clusterlinks.sennit.dev", "crd/meshes.sennit.dev"]);
        self.checked(&wait, "")?;
        // A token bound to nothing is the first thing that the policy refuses.
        self.kubeconfig("nobody", &self.token(Bound::Nothing)?)?;
        self.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "policy-probe"}}))?;
        eventually("the admission policy is in force", || {
            let args = ["annotate", "node", "policy-probe", "--overwrite", "sennit.dev/probe=1"];
            let output = self.kubectl_as("nobody", &args, "")?;
            ensure!(
                !output.success() && output.stderr_text().contains("bound to no node"),
                "{}",
                output.stderr_text()
            );
            Ok(())
        })?;
        self.checked(&["delete", "node", "policy-probe"], "").map(drop)
    }

    /// Serves the kind MeshNode in our version, or only in one that nobody of ours knows, as an older release would.
    ///
    /// # Errors
    /// What the API server said.
    pub fn serve_mesh_nodes(&self, ours: bool) -> anyhow::Result<()> {
        let crd = self.get("crd", "meshnodes.sennit.dev")?;
        let mut versions = vec![crd["spec"]["versions"][0].clone(); 2];
        versions[0]["served"] = json!(ours);
        versions[1]["name"] = json!("v1alpha0");
        versions[1]["storage"] = json!(false);
        versions[1]["served"] = json!(true);
        let patch = json!({"spec": {"versions": versions}}).to_string();
        self.kubectl(&["patch", "crd", "meshnodes.sennit.dev", "--type=merge", "-p", &patch]).map(drop)
    }

    /// Serves the kind ClusterNetworkPolicy, whatever is in an object of it.
    ///
    /// # Errors
    /// What the API server said.
    pub fn serve_cluster_policies(&self) -> anyhow::Result<()> {
        let anything = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let name = "clusternetworkpolicies.policy.networking.k8s.io";
        self.apply(&json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {
                "name": name,
                // What the group asks of whoever defines kinds in it.
                "annotations": {"api-approved.kubernetes.io": "unapproved, test-only"},
            },
            "spec": {
                "group": "policy.networking.k8s.io", "scope": "Cluster",
                "names": {"kind": "ClusterNetworkPolicy", "plural": "clusternetworkpolicies", "singular": "clusternetworkpolicy"},
                "versions": [{
                    "name": "v1alpha2", "served": true, "storage": true, "schema": {"openAPIV3Schema": anything},
                    "subresources": {"status": {}},
                }],
            },
        }))?;
        let crd = format!("crd/{name}");
        self.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", &crd]).map(drop)
    }

    /// Serves Calico's kinds as Calico keeps them, whatever is in an object of one.
    ///
    /// # Errors
    /// What the API server said.
    pub fn serve_calico(&self) -> anyhow::Result<()> {
        self.serve_kinds(|kind| kind.stored)
    }

    /// Serves Calico's kinds as those of its versions do that keep them in its own group.
    ///
    /// # Errors
    /// What the API server said.
    pub fn serve_native_calico(&self) -> anyhow::Result<()> {
        self.serve_kinds(|kind| kind.stored.map(|_| kind.version))
    }

    fn serve_kinds(&self, version: impl Fn(&Kind) -> Option<&str>) -> anyhow::Result<()> {
        let anything = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let kinds = KINDS.iter().filter_map(|kind| Some((kind, version(kind)?.rsplit_once('/')?)));
        let mut crds = vec!["wait", "--for=condition=Established", "--timeout=30s"];
        let mut names = Vec::new();
        for (kind, (group, version)) in kinds {
            let name = format!("{}.{group}", kind.plural);
            self.apply(&json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                "metadata": {"name": name},
                "spec": {
                    "group": group, "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
                    "names": {"kind": kind.kind, "plural": kind.plural, "singular": kind.kind.to_lowercase()},
                    "versions": [{"name": version, "served": true, "storage": true, "schema": {"openAPIV3Schema": anything}}],
                },
            }))?;
            names.push(format!("crd/{name}"));
        }
        crds.extend(names.iter().map(String::as_str));
        self.kubectl(&crds).map(drop)
    }

    /// A token of the agents' service account.
    ///
    /// # Errors
    /// What the API server said.
    pub fn token(&self, bound: Bound<'_>) -> anyhow::Result<String> {
        self.token_of("sennit-agent", bound)
    }

    /// A token of a service account in namespace `sennit`.
    ///
    /// # Errors
    /// What the API server said.
    pub fn token_of(&self, account: &str, bound: Bound<'_>) -> anyhow::Result<String> {
        let mut args: Vec<String> =
            ["create", "token", account, "-n", "sennit"].into_iter().map(str::to_owned).collect();
        let object = match bound {
            Bound::Nothing => None,
            Bound::Node(name) => Some(("Node", name, vec!["get", "node", name])),
            Bound::Pod(name) => Some(("Pod", name, vec!["get", "pod", "-n", "sennit", name])),
        };
        if let Some((kind, name, mut get)) = object {
            get.extend(["-o", "jsonpath={.metadata.uid}"]);
            let uid = self.kubectl(&get)?;
            args.push(format!("--bound-object-kind={kind}"));
            args.push(format!("--bound-object-name={name}"));
            args.push(format!("--bound-object-uid={uid}"));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Ok(self.kubectl(&args)?.trim().to_owned())
    }

    /// An object as it stands.
    ///
    /// # Errors
    /// When it is not there.
    pub fn get(&self, kind: &str, name: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&["get", kind, name, "-o", "json"])?)?)
    }
}
