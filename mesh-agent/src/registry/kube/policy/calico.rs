//! Calico's objects, of a cluster that knows any.
//!
//! Most clusters know none, and are asked for their groups alone. Where Calico has an API server of its own, the objects are in two groups:
//! the one in which they are kept counts.

use std::time::Duration;

use kube::Client;
use mesh_keyring::ClusterName;
use mesh_policy::calico::{API_VERSION, STORED_VERSION};
use mesh_policy::endpoints;
use mesh_policy::kind::{ACCOUNT, KINDS};

use super::{Told, UNKNOWN, begin, place};
use crate::registry::feed::Feed;
use crate::registry::kube::watch::RETRY_MOST;
use crate::registry::kube::{Watches, reason};

const NAME: &str = "Calico";
// The first wait after a failure, or as long as there is nothing.
const RETRY: Duration = Duration::from_secs(1);
// So often has there to be nothing before that is believed: right after its start a server may not know yet what it will.
const MISSED_FIRST: u32 = 3;
// How often a cluster that has Calico's kinds is asked which.
const AGAIN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Stored,
    Served,
}

/// Watches them as soon as the cluster knows them, in the group in which it does. Dropped, it watches no more.
pub(super) async fn follow(client: Client, cluster: Option<ClusterName>, feed: Feed) {
    let mut watched: Option<(Group, Watches)> = None;
    let (mut missed, mut wait) = (0, RETRY);
    loop {
        let found = versions(&client).await.map(|versions| {
            let knows = |version: &str| versions.iter().any(|known| known == version);
            match (knows(STORED_VERSION), knows(API_VERSION)) {
                (true, _) => Some(Group::Stored),
                (false, true) => Some(Group::Served),
                (false, false) => None,
            }
        });
        wait = match found {
            Ok(Some(group)) => {
                feed.trouble(NAME, None);
                if watched.as_ref().is_none_or(|(before, _)| *before != group) {
                    // Those of before end first: what they find missing would be taken for gone.
                    drop(watched.take());
                    let begin = if group == Group::Stored { all::<true> } else { all::<false> };
                    watched = Some((group, begin(&client, cluster.as_ref(), &feed)));
                }
                missed = 0;
                AGAIN
            }
            // Its watches will tell, when all of it is gone.
            Ok(None) if watched.is_some() => {
                feed.trouble(NAME, None);
                AGAIN
            }
            Ok(None) => {
                feed.trouble(NAME, None);
                missed += 1;
                if missed == MISSED_FIRST {
                    let only_here = [ACCOUNT, endpoints::KIND];
                    let kinds =
                        KINDS.iter().filter(|kind| kind.stored.is_some() || only_here.contains(&kind.name));
                    kinds.for_each(|kind| feed.push(kind.all([])));
                }
                if missed < MISSED_FIRST { RETRY } else { (wait * 2).min(UNKNOWN) }
            }
            Err(error) => {
                feed.trouble(NAME, Some(reason(&error)));
                (wait * 2).min(RETRY_MOST)
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
        begin::<Told<{ place("EndpointSlice") }>>(client, cluster, feed, None),
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
