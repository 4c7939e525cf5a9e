//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

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
    Run {
        /// Its configuration.
        #[arg(long, env = "SENNIT_CONFIG", default_value = "/etc/sennit/agent.yaml")]
        config: PathBuf,
    },
    /// Register this host, which has no Kubernetes, with a cluster, and write its configuration and credentials.
    Join(Join),
    /// Mirror the nodes of other clusters into MeshNodes of this one.
    Federate(Federate),
    /// Tell what will not work on this host and why, before anything is changed. Writes nothing.
    InstallCheck {
        /// The configuration that the agent would run with.
        #[arg(long, env = "SENNIT_CONFIG", default_value = "/etc/sennit/agent.yaml")]
        config: PathBuf,
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
    /// Remove all that the agent ever made on this host: device, routes, rules, guard, state, publication.
    Cleanup {
        /// The configuration that it ran with.
        #[arg(long, env = "SENNIT_CONFIG", default_value = "/etc/sennit/agent.yaml")]
        config: PathBuf,
        /// Leave the node's private key where it is.
        #[arg(long)]
        keep_key: bool,
    },
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
