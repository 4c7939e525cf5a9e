//! Calico's objects, of a cluster that knows any.
//!
//! Most clusters know none, and are asked for their groups alone. Where Calico has an API server of its own, the objects are in two groups:
//! the one in which they are kept counts. Calico 3.32 can keep them in the other group itself: that one counts then, and what a migration
//! has left in the first does not.

use std::time::Duration;

use kube::Client;
use kube::api::GetParams;
use kube::core::Request;
use mesh_policy::calico::{API_VERSION, STORED_VERSION};
use mesh_policy::endpoints;
use mesh_policy::kind::{ACCOUNT, KINDS};

use super::{From, Told, UNKNOWN, begin, place};
use crate::registry::feed::Feed;
use crate::registry::kube::watch::RETRY_MOST;
use crate::registry::kube::{Watches, reason};

const NAME: &str = "Calico";
const API_SERVICE: &str = "v3.projectcalico.org";
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
pub(super) async fn follow(from: From, feed: Feed) {
    let mut watched: Option<(Group, Watches)> = None;
    let (mut missed, mut wait) = (0, RETRY);
    loop {
        wait = match group(&from.client).await {
            Ok(Some(group)) => {
                feed.trouble(NAME, None);
                if watched.as_ref().is_none_or(|(before, _)| *before != group) {
                    // Those of before end first: what they find missing would be taken for gone.
                    drop(watched.take());
                    let begin = if group == Group::Stored { all::<true> } else { all::<false> };
                    watched = Some((group, begin(&from, &feed)));
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

/// The group that counts; `None`: the cluster knows none.
async fn group(client: &Client) -> Result<Option<Group>, kube::Error> {
    let versions = versions(client).await?;
    let knows = |version: &str| versions.iter().any(|known| known == version);
    Ok(match (knows(STORED_VERSION), knows(API_VERSION)) {
        (true, true) if is_native(client).await? => Some(Group::Served),
        (true, _) => Some(Group::Stored),
        (false, true) => Some(Group::Served),
        (false, false) => None,
    })
}

/// Whether the cluster itself keeps what is in Calico's own group: no Service stands behind that (`APIService`). Where that may not be
/// read, no.
async fn is_native(client: &Client) -> Result<bool, kube::Error> {
    let request = Request::new("/apis/apiregistration.k8s.io/v1/apiservices");
    let request = request.get(API_SERVICE, &GetParams::default()).map_err(kube::Error::BuildRequest)?;
    match client.request::<serde_json::Value>(request).await {
        Ok(object) => Ok(object.pointer("/spec/service").is_none_or(serde_json::Value::is_null)),
        Err(kube::Error::Api(status)) if [403, 404].contains(&status.code) => Ok(false),
        Err(error) => Err(error),
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

fn all<const STORED: bool>(from: &From, feed: &Feed) -> Watches {
    Watches(vec![
        begin::<Told<{ place("ServiceAccount") }>>(from, feed, None),
        begin::<Told<{ place("EndpointSlice") }>>(from, feed, None),
        begin::<Told<{ place("Tier") }, STORED>>(from, feed, None),
        begin::<Told<{ place("NetworkSet") }, STORED>>(from, feed, None),
        begin::<Told<{ place("GlobalNetworkSet") }, STORED>>(from, feed, None),
        begin::<Told<{ place("HostEndpoint") }, STORED>>(from, feed, None),
        begin::<Told<{ place("GlobalNetworkPolicy") }, STORED>>(from, feed, None),
        begin::<Told<{ place("NetworkPolicy.projectcalico.org") }, STORED>>(from, feed, None),
        begin::<Told<{ place("StagedGlobalNetworkPolicy") }, STORED>>(from, feed, None),
        begin::<Told<{ place("StagedNetworkPolicy") }, STORED>>(from, feed, None),
        begin::<Told<{ place("StagedKubernetesNetworkPolicy") }, STORED>>(from, feed, None),
    ])
}
