//! Calico's objects, of a cluster that knows any.
//!
//! Most clusters know none, and are asked for their groups alone. Where Calico has an API server of its own, the objects are in two groups:
//! the one in which they are kept counts.

use std::time::Duration;

use kube::Client;
use mesh_keyring::ClusterName;
use mesh_policy::calico::{API_VERSION, STORED_VERSION};
use mesh_policy::kind::{ACCOUNT, KINDS};

use super::{Told, UNKNOWN, begin, place};
use crate::registry::feed::Feed;
use crate::registry::kube::watch::RETRY_MOST;
use crate::registry::kube::{Watches, reason};

const NAME: &str = "Calico";
// The first wait after a failure.
const RETRY: Duration = Duration::from_millis(500);

/// Watches them as soon as the cluster knows them. Dropped, it watches no more.
pub(super) async fn follow(client: Client, cluster: Option<ClusterName>, feed: Feed) {
    let (mut told, mut retry) = (false, RETRY);
    loop {
        let wait = match versions(&client).await {
            Ok(versions) => {
                feed.trouble(NAME, None);
                let knows = |version: &str| versions.iter().any(|known| known == version);
                let watches = match (knows(STORED_VERSION), knows(API_VERSION)) {
                    (true, _) => Some(all::<true>(&client, cluster.as_ref(), &feed)),
                    (false, true) => Some(all::<false>(&client, cluster.as_ref(), &feed)),
                    (false, false) => None,
                };
                if let Some(watches) = watches {
                    std::future::pending::<()>().await;
                    drop(watches);
                }
                // There are none.
                if !std::mem::replace(&mut told, true) {
                    let kinds = KINDS.iter().filter(|kind| kind.stored.is_some() || kind.name == ACCOUNT);
                    kinds.for_each(|kind| feed.push(kind.all([])));
                }
                retry = RETRY;
                UNKNOWN
            }
            Err(error) => {
                feed.trouble(NAME, Some(reason(&error)));
                retry = (retry * 2).min(RETRY_MOST);
                retry
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Groups and versions that the cluster knows.
async fn versions(client: &Client) -> Result<Vec<String>, kube::Error> {
    match client.list_api_groups().await {
        Ok(list) => {
            let versions = list.groups.into_iter().flat_map(|group| group.versions);
            Ok(versions.map(|version| version.group_version).collect())
        }
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn all<const STORED: bool>(client: &Client, cluster: Option<&ClusterName>, feed: &Feed) -> Watches {
    Watches(vec![
        begin::<Told<{ place("ServiceAccount") }>>(client, cluster, feed, None),
        begin::<Told<{ place("Tier") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("NetworkSet") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("GlobalNetworkSet") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("HostEndpoint") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("GlobalNetworkPolicy") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("NetworkPolicy.projectcalico.org") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("StagedGlobalNetworkPolicy") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("StagedNetworkPolicy") }, STORED>>(client, cluster, feed, None),
        begin::<Told<{ place("StagedKubernetesNetworkPolicy") }, STORED>>(client, cluster, feed, None),
    ])
}
