use proptest::prelude::*;
use serde_json::{Value, json};

use mesh_policy::State;
use mesh_policy::object::{Namespace, Pod};

use super::*;
use crate::manifest;

fn object() -> impl Strategy<Value = Value> {
    let label = || (0..3_u8).prop_map(|n| json!({"v": n.to_string()}));
    let kinds =
        prop_oneof![Just("Pod"), Just("Namespace"), Just("NetworkPolicy"), Just("Mesh"), Just("Node")];
    (kinds, 0..3_u8, label()).prop_map(|(kind, name, labels)| {
        let metadata = json!({"name": format!("n{name}"), "labels": labels});
        match kind {
            "Pod" => json!({"apiVersion": "v1", "kind": kind, "metadata": metadata, "status": {"podIP": format!("10.0.0.{name}")}}),
            "NetworkPolicy" => json!({"apiVersion": "networking.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": {"podSelector": {"matchLabels": labels}}}),
            "Mesh" => json!({"apiVersion": "sennit.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": {}}),
            _ => json!({"apiVersion": "v1", "kind": kind, "metadata": metadata}),
        }
    })
}

fn file() -> impl Strategy<Value = Arc<Parsed>> {
    prop::collection::vec(object(), 0..5).prop_map(|items| {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        Arc::new(manifest::parse(list.to_string().as_bytes()).unwrap())
    })
}

type Said = (Vec<Pod>, Vec<String>, Vec<mesh_policy::model::Policy>);

fn said(state: &State) -> Said {
    let pods = state.world.pods().map(|pod| Pod::clone(pod)).collect();
    (pods, state.world.namespaces().cloned().collect(), state.policies.iter().cloned().collect())
}

proptest! {
    #[test]
    fn what_is_said_one_by_one_is_what_is_said_as_a_whole(
        changes in prop::collection::vec((0..4_u8, prop::option::of(file())), 1..12)
    ) {
        let (mut files, mut told) = (Files::new(), Files::new());
        let (mut state, mut problems) = (State::default(), BTreeMap::new());
        for (path, file) in changes {
            match file {
                Some(file) => drop(files.insert(format!("{path}.yaml"), file)),
                None => drop(files.remove(&format!("{path}.yaml"))),
            }
            for event in difference(&told, &files, &mut problems).unwrap() {
                state.take(event);
            }
            told = files.clone();
            let whole = all(&files);
            let mut from_scratch = State::default();
            for event in whole.events {
                from_scratch.take(event);
            }
            prop_assert_eq!(said(&state), said(&from_scratch));
            prop_assert_eq!(&problems, &whole.problems);
            prop_assert!(difference(&told, &files, &mut problems).unwrap().is_empty());
        }
    }
}

#[test]
fn of_too_much_all_is_said_again() {
    let pods: Vec<Value> = (0..=SINGLE_MOST)
        .map(|n| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("p{n}")}}))
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": pods});
    let parsed = Arc::new(manifest::parse(list.to_string().as_bytes()).unwrap());
    let now = Files::from([("many.yaml".to_owned(), parsed)]);
    assert_eq!(difference(&Files::new(), &now, &mut BTreeMap::new()), None);
    assert!(
        matches!(&all(&now).events[..], [Event::Namespaces(namespaces), ..] if *namespaces == Vec::<Namespace>::new())
    );
}
