//! Runs mesh scenarios in a lab of network namespaces.
//!
//! A scenario is a YAML file with sites, nodes and pods on the one hand and steps on the other: who reaches
//! whom, what is killed meanwhile, what may be seen on the wire. [`run_file`] builds the lab, starts a real
//! agent on every node, walks the steps and tears everything down; the [`Report`] prints as text, JSON and
//! JUnit XML.
//!
//! ```no_run
//! let report = meshlab::run_file("deploy/examples/two-sites.yaml".as_ref(), meshlab::Options::default())?;
//! assert!(report.passed(), "{}", report.to_text());
//! # Ok::<(), meshlab::RunError>(())
//! ```

pub mod agents;
pub mod condition;
pub mod control;
mod dump;
pub mod junit;
pub mod layout;
pub mod manifest;
mod pcap;
pub mod picture;
pub mod report;
mod run;
pub mod scenario;
pub mod selector;
pub mod stage;
pub mod status;
mod steps;

pub use report::{Outcome, Report, StepReport};
pub use run::{Event, Hold, Observer, Options, RunError, run, run_file, run_text};
pub use scenario::{Scenario, ScenarioError};
pub use stage::Stage;
