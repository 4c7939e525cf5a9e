//! Problems between this agent and its API.

use mesh_keyring::NodeName;

use super::KubeRegistry;
use super::listing::Named as _;
use crate::problem::Problem;

/// The API does not let us watch something.
const REFUSES: &str = "registry-refuses";
/// The API cannot be reached, or does not answer.
const SILENT: &str = "registry-unreachable";
/// Nobody has registered this node.
const UNREGISTERED: &str = "own-node-missing";

impl KubeRegistry {
    /// Tells all that is wrong now.
    pub fn problems(&self, node: &NodeName) -> Vec<Problem> {
        let (refusals, silence, found) = {
            let directory = self.shared.directory.lock();
            let silence = directory.silence();
            // An object that is not listed yet is not missing.
            let found = directory.find(node, self.cluster.as_ref());
            let object = found.map(|(kind, entry)| format!("{} {}", kind.as_str(), entry.name()));
            let known = directory.obstacle().is_none();
            (directory.refusals(), silence, if known { Some(object) } else { None })
        };
        let mut problems: Vec<Problem> = Vec::new();
        let refusals: Vec<(&str, String)> = refusals.into_iter().chain(self.feed.refusals()).collect();
        if !refusals.is_empty() {
            let all: Vec<String> = refusals.iter().map(|(kind, why)| format!("{kind}: {why}")).collect();
            problems.push(self.refuses(&all));
        } else if let Some(why) = silence {
            let remedy = "see that the server runs and that nothing is in the way; it is tried again";
            problems.push(Problem::new(SILENT, self.object(), why, remedy));
        }
        if let Some(object) = found {
            match object {
                None => problems.push(
                    Problem::new(
                        UNREGISTERED,
                        format!("node {node}"),
                        "the cluster has neither a Node nor a MeshNode of this name: others take this node out of the mesh",
                        "register it again, or take it out of the mesh: stop its agent and run `mesh-agent cleanup`",
                    )
                    .blocking(true),
                ),
                Some(object) => problems.extend(self.foreign(&object)),
            }
        }
        problems.extend(self.mistrust());
        problems
    }

    fn object(&self) -> String {
        format!("API server {}", self.server)
    }

    fn refuses(&self, all: &[String]) -> Problem {
        let text = format!(
            "it refuses what this agent has to watch, so that changes are not seen, also not who was revoked: {}",
            all.join("; ")
        );
        let remedy = if text.contains("(401)") {
            "renew the credentials: they are read again as soon as they change"
        } else {
            "apply the ClusterRole sennit-agent of this version (deploy/kubernetes/base, or the chart)"
        };
        Problem::new(REFUSES, self.object(), text, remedy).blocking(true)
    }
}
