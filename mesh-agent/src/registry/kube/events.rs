//! Events about this node, as `kubectl describe` shows them (events.k8s.io/v1).

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};

use super::directory::Kind;
use super::resource;
use crate::registry::Notice;

/// Events about what has no namespace are kept here; the API allows no other.
const NAMESPACE: &str = "default";
/// Who reports. Admission lets agents write Events of this reporter only.
const REPORTER: &str = "sennit.dev/agent";
/// The longest note that the API takes, in bytes.
const NOTE_MOST: usize = 1024;

pub(super) fn event(kind: Kind, name: &str, notice: &Notice) -> Event {
    let resource = resource(kind);
    let mut note = notice.note.clone();
    while note.len() > NOTE_MOST {
        note.pop();
    }
    Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{name}.")),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        action: Some("Encrypt".to_owned()),
        event_time: Some(MicroTime(Timestamp::now())),
        note: Some(note),
        reason: Some(notice.reason.to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some(resource.api_version),
            kind: Some(resource.kind),
            name: Some(name.to_owned()),
            // `kubectl describe node` looks for events by this, as the kubelet writes them.
            uid: Some(name.to_owned()),
            ..ObjectReference::default()
        }),
        reporting_controller: Some(REPORTER.to_owned()),
        reporting_instance: Some(name.to_owned()),
        type_: Some(if notice.warning { "Warning" } else { "Normal" }.to_owned()),
        ..Event::default()
    }
}

pub(super) async fn write(client: Client, event: Event) -> kube::Result<()> {
    Api::<Event>::namespaced(client, NAMESPACE).create(&PostParams::default(), &event).await.map(drop)
}
