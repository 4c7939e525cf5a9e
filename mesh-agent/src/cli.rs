//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_overlay::local::InterfaceName;
use mesh_overlay::wireguard::Choice;

use crate::commands::join::Join;
use crate::federate::Federate;

/// A node of an encrypted mesh.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent in the foreground.
    Run(Configured),
    /// Run this host's userspace WireGuard device in the foreground, for an agent with `wireguard.externalDevice`. Where the
    /// kernel's WireGuard is used, wait.
    Device(Device),
    /// Register this host, which has no Kubernetes, with a cluster, and write its configuration and credentials.
    Join(Join),
    /// Mirror the nodes of other clusters into MeshNodes of this one.
    Federate(Federate),
    /// Tell what will not work on this host and why, before anything is changed. Writes nothing.
    InstallCheck {
        /// The configuration.
        #[command(flatten)]
        configured: Configured,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = StatusOutput::Table)]
        output: StatusOutput,
    },
    /// Show peers, paths, handshakes and refusals of the running agent.
    Status {
        /// Its socket.
        #[arg(long, env = "SENNIT_SOCKET", default_value = "/run/sennit/agent.sock")]
        socket: PathBuf,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = StatusOutput::Table)]
        output: StatusOutput,
        /// Print what is amiss only, and fail unless the node is ready: published, and all as it should be.
        #[arg(long)]
        probe: bool,
        /// With --probe: fail as well when a peer is not reached.
        #[arg(long, requires = "probe")]
        peers: bool,
        /// Show it again every second, until interrupted.
        #[arg(short, long, conflicts_with = "probe")]
        watch: bool,
    },
    /// Explain how a peer is reached: what was decided of late and why, and what is known of each of its addresses.
    Trace {
        /// The peer.
        peer: String,
        /// The running agent's socket.
        #[arg(long, env = "SENNIT_SOCKET", default_value = "/run/sennit/agent.sock")]
        socket: PathBuf,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = StatusOutput::Table)]
        output: StatusOutput,
    },
    /// Compute a node's plan from a directory of manifests, touching nothing.
    Plan {
        /// The directory.
        #[arg(long)]
        state: PathBuf,
        /// The node.
        #[arg(long)]
        node: String,
        /// A configuration to take the sites' grants and the mesh's name from.
        #[arg(long)]
        config: Option<PathBuf>,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = PlanOutput::Json)]
        output: PlanOutput,
    },
    /// Judge flows by the policies of a directory of manifests, touching nothing.
    Policy {
        /// What to do.
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Show, restore or release what the guard keeps in the mesh.
    Guard {
        /// What to do.
        #[command(subcommand)]
        command: GuardCommand,
    },
    /// Make a new key with a later generation, for this host. A running agent goes on with it at once.
    Rekey {
        /// The generation that peers remember of this node, where `status` says that they do.
        #[arg(long, value_name = "GENERATION")]
        after: Option<u64>,
        /// The configuration.
        #[command(flatten)]
        configured: Configured,
    },
    /// Forget what this host remembers of another node: its key, its generation and which prefixes it held
    /// first. What the guard keeps stays.
    Forget {
        /// The other node.
        name: String,
        /// The configuration.
        #[command(flatten)]
        configured: Configured,
    },
    /// Remove all that the agent ever made on this host: device, routes, rules, guard, state, publication.
    Cleanup {
        /// The configuration.
        #[command(flatten)]
        configured: Configured,
        /// Leave the node's private key where it is.
        #[arg(long)]
        keep_key: bool,
        /// When all is removed, wait for SIGTERM: for a DaemonSet, which would start it again.
        #[arg(long)]
        stay: bool,
    },
}

/// What `device` runs. Not by agent.yaml: a mistake there must not touch a device that works.
#[derive(Debug, Args)]
pub struct Device {
    /// The interface, as the agent has it in `wireguard.interface`.
    #[arg(long, env = "SENNIT_INTERFACE", default_value = "sennit0")]
    pub interface: InterfaceName,
    /// The implementation, as the agent has it in `wireguard.backend`.
    #[arg(long, env = "SENNIT_BACKEND", default_value = "auto", value_parser = backend)]
    pub backend: Choice,
    /// The userspace program: a name on PATH or a path.
    #[arg(long, default_value = "mesh-wg")]
    pub userspace_binary: PathBuf,
    /// Only tell by the exit code whether it runs and answers.
    #[arg(long)]
    pub probe: bool,
}

fn backend(text: &str) -> Result<Choice, String> {
    match text {
        "auto" => Ok(Choice::Auto),
        "kernel" => Ok(Choice::Kernel),
        "userspace" => Ok(Choice::Userspace),
        _ => Err("auto, kernel or userspace".to_owned()),
    }
}

/// What can be done with the guard.
#[derive(Debug, Subcommand)]
pub enum GuardCommand {
    /// Put up guard and blackhole routes as they stood last, from the state directory alone. A unit that runs before the network is
    /// up does this at boot. It takes nothing away, and does nothing where a guard stands.
    Restore {
        /// The agent's configuration, for its `stateDir` only; it may be broken otherwise.
        #[arg(long, env = "SENNIT_CONFIG", default_value = "/etc/sennit/agent.yaml")]
        config: PathBuf,
        /// The state directory, instead of the configuration's.
        #[arg(long, env = "SENNIT_STATE_DIR")]
        state_dir: Option<PathBuf>,
    },
    /// Install a systemd unit on this host that runs `guard restore` at boot, with all that it needs: for an init container of the
    /// agent's pod, which has the host's folders below ROOT.
    Install {
        /// Where the host's root is; its folders /opt/sennit and /etc/systemd/system are written.
        #[arg(long, value_name = "ROOT", default_value = "/")]
        root: PathBuf,
        /// The state directory on the host.
        #[arg(long, env = "SENNIT_STATE_DIR", default_value = "/var/lib/sennit")]
        state_dir: PathBuf,
        /// Remove it instead.
        #[arg(long)]
        remove: bool,
    },
    /// Take prefixes out of the guard that nobody holds any more. Packets to them may leave in clear from then on.
    Release {
        /// Prefixes, names of the nodes that held them last, or `site/NAME`.
        #[arg(required = true)]
        what: Vec<String>,
        /// The configuration.
        #[command(flatten)]
        configured: Configured,
    },
}

/// Which configuration a command works with.
#[derive(Debug, Args)]
pub struct Configured {
    /// The agent's configuration.
    #[arg(long, env = "SENNIT_CONFIG", default_value = "/etc/sennit/agent.yaml")]
    pub config: PathBuf,
    /// This node's name, where the configuration has none; without either it is the host's name.
    #[arg(long, env = "SENNIT_NODE")]
    pub node: Option<String>,
}

/// What can be asked of policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Judge many flows at once: verdict and deciding rule of each.
    Evaluate {
        /// The directory.
        #[arg(long)]
        state: PathBuf,
        /// A JSON array of probes; `-` reads it from standard input.
        #[arg(long)]
        probes: PathBuf,
        /// A configuration to take the policy section from.
        #[arg(long)]
        config: Option<PathBuf>,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = PolicyOutput::Json)]
        output: PolicyOutput,
    },
    /// Write a node's nftables ruleset as text.
    Compile {
        /// The directory.
        #[arg(long)]
        state: PathBuf,
        /// The node.
        #[arg(long)]
        node: String,
        /// A configuration to take the interfaces' names and the policy section from.
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Judge recorded flows by other policies, and list what they would decide differently.
    Replay {
        /// Logs of flows, as agents write them; `-` is standard input.
        #[arg(long, required = true, num_args = 1..)]
        flows: Vec<PathBuf>,
        /// The directory with the policies to be tried.
        #[arg(long)]
        state: PathBuf,
        /// A configuration to take the policy section from.
        #[arg(long)]
        config: Option<PathBuf>,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = PolicyOutput::Table)]
        output: PolicyOutput,
    },
    /// Tell which manifests of policies would be enforced and which would not, with the line of each fault. Nothing has to be converted:
    /// Calico's objects are read as they are.
    Import {
        /// The directory: the same files of it that all commands and an agent read.
        #[arg(long, value_name = "DIR")]
        check: PathBuf,
        /// And the folders in it: manifests that go to a cluster. Of a registry directory no folder counts.
        #[arg(short, long)]
        recursive: bool,
        /// Form of the output.
        #[arg(short, long, value_enum, default_value_t = PolicyOutput::Table)]
        output: PolicyOutput,
    },
    /// Tell what decides about a flow, which rules came near, and what would allow it.
    Explain {
        /// The directory.
        #[arg(long)]
        state: PathBuf,
        /// Who begins it: NAMESPACE/POD, node/NAME or an address.
        #[arg(long)]
        from: String,
        /// Whom it is for.
        #[arg(long)]
        to: String,
        /// Port and protocol, such as 80/TCP; ICMP has no port.
        #[arg(long)]
        port: String,
        /// 4 or 6.
        #[arg(long)]
        family: Option<u8>,
        /// A configuration to take the policy section from.
        #[arg(long)]
        config: Option<PathBuf>,
    },
}

/// Forms of what policies answer.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PolicyOutput {
    /// For programs.
    Json,
    /// For people.
    Table,
}

/// Forms of the status.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum StatusOutput {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Forms of a plan.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PlanOutput {
    /// Everything.
    Json,
    /// `wg setconf`, without the private key.
    Wg,
    /// `ip -batch`.
    Routes,
    /// Graphviz.
    Dot,
}
