//! Multi-site network labs in Linux network namespaces.
//!
//! ```text
//!                      core
//!            s1 /       |       \ s3          veth pairs, one per site
//!        uplink/        |        \uplink
//!         site "aws"  site "gcp"  site "onprem"    NAT, stateful firewall, bridge `lan`
//!          h1|  |h2                                veth pairs, one per host
//!       eth0 |  | eth0
//!        "aws-1" "aws-2"                           own mount, UTS namespace; forwards
//!      pod1|  |pod2
//!     eth0 |  | eth0
//!        pod   pod                                 /32 and /128 addresses, own MTU
//! ```
//!
//! What it owns: namespaces, links between them, addresses and underlay routes, one nftables table
//! `inet netlab` per namespace, captures, probes and processes started inside. What it never does: write to
//! the network namespace, sysctls, nftables or `/var/run/netns` of the machine it runs on, and it knows
//! nothing of the software that is tested in it.
//!
//! Flow: [`LabSpec`] → (pure) plan of addresses and per-namespace scripts → [`Lab::build`] → handles
//! ([`Site`], [`Host`], [`Pod`], all of which are also a [`Namespace`], and [`Link`]s).
//!
//! ```no_run
//! use netlab::probe::{Echo, Kind, Probe};
//! use netlab::{CaptureSpec, Lab, LabSpec, Nat, Rule};
//!
//! # fn main() -> netlab::Result<()> {
//! netlab::enter_userns()?; // not needed as root
//! let mut spec = LabSpec::grid(2, 1, 1).routed_pods();
//! spec.sites[0].nat = Nat::Cone;
//! let lab = Lab::build(&spec)?;
//! let _echo = Echo::serve(lab.namespaces(), 7777)?;
//! let (from, to) = (lab.pod("s1-h1-p1")?, lab.pod("s2-h1-p1")?);
//! let capture = lab.site("s2")?.uplink().capture(CaptureSpec::new().marker("in clear"))?;
//! let answer = Probe::new(from, to.addresses()[0], Kind::Udp(7777)).payload("in clear").ask();
//! assert!(answer.is_ok() && !capture.stop()?.is_clean());
//! lab.site("s1")?.block(Rule::udp_port(7777))?;
//! # Ok(())
//! # }
//! ```
//!
//! Nothing stays behind: namespaces have no names and are held only by threads of this process, and every
//! process started in a lab lives in a PID namespace whose init dies with the lab, however it ends.

mod asking;
mod conntrack;
mod echo;
mod error;
mod firewall;
mod frame;
mod lab;
mod link;
mod mounts;
mod namespace;
mod pcap;
mod pidspace;
mod plan;
mod process;
mod script;
mod spec;
mod sys;
mod tool;
mod tun;
mod workdir;

pub mod capability;
pub mod capture;
pub mod flow;
pub mod probe;

pub use capability::{Capabilities, Capability, Feature, capabilities, enter_userns};
pub use capture::{Capture, CaptureReport, CaptureSpec, CaptureStats};
pub use error::Error;
pub use firewall::{BlockId, Direction, Ports, Protocol, Rule};
pub use ipnet::IpNet;
pub use lab::{Host, Lab, Pod, Site};
pub use link::{Link, Rate};
pub use namespace::{Namespace, NamespacePaths};
pub use process::{Command, Output, Process};
pub use spec::{Bind, Families, HostSpec, LabSpec, Nat, PodSpec, SiteSpec};
pub use tun::Tun;

/// Result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;
