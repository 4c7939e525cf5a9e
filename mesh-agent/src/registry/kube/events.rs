//! Events about this node, as `kubectl describe` shows them (events.k8s.io/v1).

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, PostParams};
use kube::{Api, Client};

use super::directory::Kind;
use super::resource;
use crate::registry::Notice;

/// Events about what has no namespace are kept here; the API allows no other.
const NAMESPACE: &str = "default";
/// Who reports. Admission lets agents write Events of this reporter only.
const REPORTER: &str = "sennit.dev/agent";
/// The longest name of a reporter's instance, in bytes.
const INSTANCE_MOST: usize = 128;
/// The longest note that the API takes, in bytes.
const NOTE_MOST: usize = 1024;

fn event(kind: Kind, name: &str, uid: Option<String>, notice: &Notice) -> Event {
    let resource = resource(kind);
    let mut note = notice.note.clone();
    while note.len() > NOTE_MOST {
        note.pop();
    }
    Event {
        metadata: ObjectMeta {
            generate_name: Some("sennit-agent-".to_owned()),
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
            uid,
            ..ObjectReference::default()
        }),
        reporting_controller: Some(REPORTER.to_owned()),
        reporting_instance: Some(name.chars().take(INSTANCE_MOST).collect()),
        type_: Some(if notice.warning { "Warning" } else { "Normal" }.to_owned()),
        ..Event::default()
    }
}

/// Writes one Event. `kubectl describe` finds it by the object's UID.
pub(super) async fn write(client: Client, kind: Kind, name: &str, notice: &Notice) -> kube::Result<()> {
    let objects = Api::<DynamicObject>::all_with(client.clone(), &resource(kind));
    let event = event(kind, name, objects.get_metadata(name).await?.metadata.uid, notice);
    Api::<Event>::namespaced(client, NAMESPACE).create(&PostParams::default(), &event).await.map(drop)
}
