use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_policy::State;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::super::KubeRegistry;
use super::super::budget::Budget;
use super::*;

const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
const CLUSTER_WIDE: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";

/// As much of an API server as a list and a watch need.
#[derive(Clone, Default)]
struct Server {
    served: Arc<Mutex<Served>>,
    watched: Arc<Notify>,
}

#[derive(Default)]
struct Served {
    url: String,
    // By path; others are not found.
    objects: BTreeMap<&'static str, Vec<Value>>,
    forbidden: bool,
    asked: Vec<String>,
    watches: BTreeMap<String, mpsc::UnboundedSender<String>>,
}

impl Server {
    async fn start() -> (Self, KubeRegistry) {
        Self::start_in(None).await
    }

    async fn start_in(cluster: Option<&str>) -> (Self, KubeRegistry) {
        let server = Self::default();
        for path in [PODS, NAMESPACES, POLICIES] {
            server.served.lock().objects.insert(path, Vec::new());
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        server.served.lock().url = url;
        let serving = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().answer(stream));
            }
        });
        let registry = server.registry(cluster);
        (server, registry)
    }

    fn registry(&self, cluster: Option<&str>) -> KubeRegistry {
        let config = kube::Config::new(self.served.lock().url.parse().unwrap());
        let cluster = cluster.map(|cluster| cluster.parse().unwrap());
        KubeRegistry::new(config, cluster, &"m".parse().unwrap()).unwrap()
    }

    /// Waits until each of these kinds is watched.
    async fn watched(&self, paths: &[&str]) {
        let all = async {
            loop {
                let notified = self.watched.notified();
                if paths.iter().all(|path| self.served.lock().watches.contains_key(*path)) {
                    return;
                }
                notified.await;
            }
        };
        timeout(Duration::from_secs(20), all).await.unwrap();
    }

    async fn answer(self, mut stream: TcpStream) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let target = head.split(' ').nth(1).unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        if query.contains("watch=true") && self.served.lock().objects.contains_key(path) {
            let (sender, mut events) = mpsc::unbounded_channel::<String>();
            self.served.lock().watches.insert(path.to_owned(), sender);
            self.watched.notify_waiters();
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            while let Some(event) = events.recv().await {
                if stream.write_all(event.as_bytes()).await.is_err() {
                    return;
                }
            }
            return;
        }
        let (code, body) = self.list(path, query);
        let body = body.to_string();
        let head = format!(
            "HTTP/1.1 {code} Said\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    }

    fn list(&self, path: &str, query: &str) -> (u16, Value) {
        let status = |code: u16, message: &str| {
            let reason = if code == 403 { "Forbidden" } else { "NotFound" };
            let body = json!({
                "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": code,
            });
            (code, body)
        };
        let mut served = self.served.lock();
        let Some(objects) = served.objects.get(path).cloned() else { return status(404, "no such kind") };
        served.asked.push(format!("{path}?{query}"));
        if served.forbidden && path == PODS {
            return status(403, "pods is forbidden");
        }
        let field = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse::<usize>().ok())
        };
        let (from, most) = (field("continue").unwrap_or(0), field("limit").unwrap_or(usize::MAX));
        let until = (from + most).min(objects.len());
        let token = (until < objects.len()).then(|| until.to_string());
        let metadata = json!({"resourceVersion": "7", "continue": token});
        let kind = "List";
        (200, json!({"kind": kind, "apiVersion": "v1", "metadata": metadata, "items": objects[from..until]}))
    }

    fn say(&self, path: &str, event: &str, object: &Value) {
        let line = format!("{}\n", json!({"type": event, "object": object}));
        self.served.lock().watches[path].send(line).unwrap();
    }
}

/// What the feed comes to, as soon as that is so.
async fn until(feed: &Feed, state: &mut State, wanted: impl Fn(&State) -> bool) {
    let reached = async {
        loop {
            for event in feed.take() {
                state.take(event);
            }
            if wanted(state) {
                return;
            }
            feed.changed().await;
        }
    };
    timeout(Duration::from_secs(20), reached).await.unwrap();
}

fn pod(name: &str, node: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "n", "uid": format!("uid-{name}"), "resourceVersion": "8",
            "labels": {"app": "web"}, "annotations": {"much": "text"},
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "nodeName": node, "serviceAccountName": "web",
            "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 80}], "env": [{"name": "A"}]}],
        },
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [{"type": "Ready"}]},
    })
}

fn policy(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "n", "resourceVersion": "8"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    })
}

fn parsed<T: Counted>(object: Value) -> Item<T> {
    serde_json::from_value(object).unwrap()
}

#[test]
fn of_a_pod_only_what_counts_is_kept() {
    let item = parsed::<Pod>(pod("a", "node-1", "10.0.0.1"));
    assert_eq!(item.metadata.resource_version.as_deref(), Some("8"));
    assert_eq!((item.metadata.labels, item.metadata.managed_fields), (None, None));
    let read = item.read.unwrap();
    assert_eq!(read.key, Key::new(Some("n"), "a"));
    assert_eq!(read.uid, "uid-a");
    assert_eq!(read.node.as_deref(), Some("node-1"));
    assert_eq!(read.labels["app"], "web");
    assert_eq!(read.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.1"]);
    assert_eq!(read.ports.first().unwrap().port, 80);
    let mut other = pod("a", "node-1", "10.0.0.1");
    other["status"]["conditions"] = json!([]);
    other["metadata"]["resourceVersion"] = json!("9");
    assert_eq!(parsed::<Pod>(other).read.unwrap(), read, "a change of nothing that counts");
}

#[test]
fn an_object_that_is_wrong_spoils_no_page() {
    let mut bare = pod("bare", "", "");
    bare["status"] = Value::Null;
    bare["metadata"]["labels"] = Value::Null;
    let mut shapeless = pod("shapeless", "node-1", "10.0.0.2");
    shapeless["spec"] = json!({"containers": 5});
    let page = json!([pod("a", "node-1", "10.0.0.1"), pod("bad", "node-1", "nonsense"), shapeless, bare]);
    let page: Vec<Item<Pod>> = serde_json::from_value(page).unwrap();
    let half = page[1].read.as_ref().unwrap();
    assert!(half.addresses.is_empty() && half.fault.as_ref().unwrap().to_string().contains("nonsense"));
    let faults: Vec<Option<String>> = page.into_iter().map(|item| item.read.err()).collect();
    assert_eq!((&faults[0], &faults[3]), (&None, &None));
    assert!(faults[2].as_ref().unwrap().starts_with("spec: "), "{faults:?}");
}

#[test]
fn a_policy_that_is_wrong_comes_through_and_isolates() {
    let mut wrong = policy("p");
    wrong["spec"]["ingress"] = json!([{"from": [{"nonsense": {}}]}]);
    let read = parsed::<Told<NETWORK_POLICY>>(wrong).read.unwrap().said;
    assert!(read.refusal().is_some());
    assert!(matches!(&read, Said::Policy(read) if read.policy.ingress.is_some()));
    assert_eq!(read.id().to_string(), "NetworkPolicy n/p");
    assert_eq!(parsed::<Told<NETWORK_POLICY>>(policy("p")).read.unwrap().said.refusal(), None);
}

#[test]
fn a_namespace_has_its_labels_and_its_name() {
    let namespace = json!({"metadata": {"name": "n", "labels": {"team": "a"}}, "spec": {"finalizers": []}});
    let read = parsed::<Namespace>(namespace).read.unwrap();
    assert_eq!((read.labels.len(), read.labels["team"].as_str()), (3, "a"));
}

#[test]
fn the_places_in_the_api_are_kubernetes_own() {
    assert_eq!(Item::<Pod>::url_path(&(), None), PODS);
    assert_eq!(Item::<Namespace>::url_path(&(), None), NAMESPACES);
    assert_eq!(Item::<Told<NETWORK_POLICY>>::url_path(&(), None), POLICIES);
    assert_eq!(Item::<Told<CLUSTER_NETWORK_POLICY>>::url_path(&(), None), CLUSTER_WIDE);
    const TIER: usize = place("Tier");
    assert_eq!(Item::<Told<TIER>>::url_path(&(), None), "/apis/projectcalico.org/v3/tiers");
    assert_eq!(Item::<Told<TIER, true>>::url_path(&(), None), "/apis/crd.projectcalico.org/v1/tiers");
}

#[tokio::test]
async fn what_is_listed_and_what_changes_comes_out_of_the_feed() {
    let (server, mut registry) = Server::start().await;
    {
        let mut served = server.served.lock();
        let pods =
            (0..1203).map(|n| pod(&format!("p-{n}"), "node-1", &format!("10.0.{}.{}", n / 250, n % 250)));
        served.objects.insert(PODS, pods.collect());
        served.objects.insert(NAMESPACES, vec![json!({"metadata": {"name": "n", "labels": {"a": "b"}}})]);
        served.objects.insert(POLICIES, vec![policy("p")]);
    }
    assert!(!registry.feed().complete());
    registry.watch_policy();
    let feed = registry.feed().clone();
    let mut state = State::default();
    until(&feed, &mut state, |_| feed.complete()).await;
    until(&feed, &mut state, |state| state.world.pods().count() == 1203).await;
    assert_eq!(state.world.namespaces().count(), 1);
    assert_eq!(state.policies.iter().count(), 1);
    let lists =
        |path: &str| server.served.lock().asked.iter().filter(|asked| asked.starts_with(path)).count();
    assert_eq!((lists(PODS), lists(NAMESPACES)), (3, 1), "in pages");

    server.watched(&[PODS, NAMESPACES, POLICIES]).await;
    let key = Key::new(Some("n"), "p-1");
    let node = |state: &State, key: &Key| {
        let pod = state.world.pods().find(|pod| pod.key == *key)?;
        pod.node.clone()
    };
    server.say(PODS, "MODIFIED", &pod("p-1", "node-2", "10.0.0.1"));
    server.say(PODS, "ADDED", &pod("new", "node-2", "10.9.0.1"));
    server.say(PODS, "DELETED", &pod("p-2", "node-1", "10.0.0.2"));
    server.say(NAMESPACES, "ADDED", &json!({"metadata": {"name": "other", "resourceVersion": "9"}}));
    server.say(POLICIES, "DELETED", &policy("p"));
    until(&feed, &mut state, |state| {
        node(state, &key).as_deref() == Some("node-2")
            && node(state, &Key::new(Some("n"), "new")).is_some()
            && node(state, &Key::new(Some("n"), "p-2")).is_none()
            && state.world.namespaces().count() == 2
            && state.policies.iter().count() == 0
    })
    .await;
    assert_eq!(feed.problems(), Vec::<String>::new());
    assert_eq!(feed.staleness(), None);
}

#[tokio::test]
async fn a_refused_object_is_named_and_not_there_until_it_is_mended() {
    let (server, mut registry) = Server::start_in(Some("east")).await;
    let wrong = |name: &str| {
        let mut wrong = pod(name, "node-1", "10.0.0.9");
        wrong["spec"]["containers"] = json!(5);
        wrong
    };
    server.served.lock().objects.insert(PODS, vec![pod("a", "node-1", "10.0.0.1"), wrong("b")]);
    registry.watch_policy();
    let feed = registry.feed().clone();
    let mut state = State::default();
    let names = |state: &State| -> Vec<String> {
        state.world.pods().map(|pod| format!("{} on {}", pod.key.name, pod.node.clone().unwrap())).collect()
    };
    until(&feed, &mut state, |state| names(state) == ["a on node-1.east"]).await;
    let problem =
        |name: &str| feed.problems().iter().all(|text| text.starts_with(&format!("Pod n/{name}: spec: ")));
    assert!(feed.problems().len() == 1 && problem("b"), "{:?}", feed.problems());
    server.watched(&[PODS]).await;
    server.say(PODS, "MODIFIED", &wrong("a"));
    server.say(PODS, "MODIFIED", &pod("b", "node-1", "10.0.0.2"));
    until(&feed, &mut state, |state| names(state) == ["b on node-1.east"]).await;
    assert!(feed.problems().len() == 1 && problem("a"), "{:?}", feed.problems());
    server.say(PODS, "DELETED", &wrong("a"));
    until(&feed, &mut state, |_| feed.problems().is_empty()).await;
}

#[tokio::test]
async fn where_pods_may_not_be_read_the_others_are_and_the_remedy_is_told() {
    let (server, mut registry) = Server::start().await;
    server.served.lock().forbidden = true;
    server.served.lock().objects.insert(POLICIES, vec![policy("p")]);
    registry.watch_policy();
    let feed = registry.feed().clone();
    let mut state = State::default();
    until(&feed, &mut state, |state| state.policies.iter().count() == 1 && feed.staleness().is_some()).await;
    let told = feed.staleness().unwrap();
    assert!(told.starts_with("Pod: pods is forbidden (403); apply the ClusterRole sennit-agent"), "{told}");
    assert!(!feed.complete());
    server.served.lock().forbidden = false;
    until(&feed, &mut state, |_| feed.complete() && feed.staleness().is_none()).await;
}

fn cluster_policy(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "resourceVersion": "8"},
        "spec": {"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}]},
    })
}

fn only(state: &State, name: &str) -> bool {
    state.policies.iter().map(|policy| policy.id.name.as_str()).eq([name])
}

#[tokio::test]
async fn policies_of_the_whole_cluster_count_as_soon_as_it_knows_the_kind() {
    let (server, mut registry) = Server::start().await;
    registry.watch_policy();
    let feed = registry.feed().clone();
    let mut state = State::default();
    until(&feed, &mut state, |_| feed.complete()).await;
    assert_eq!(feed.staleness(), None, "a cluster without the kind has none");
    server.served.lock().objects.insert(CLUSTER_WIDE, vec![cluster_policy("c")]);
    until(&feed, &mut state, |state| only(state, "c")).await;
    assert!(state.faults.is_empty(), "{:?}", state.faults);
    server.watched(&[CLUSTER_WIDE]).await;
    server.say(CLUSTER_WIDE, "ADDED", &cluster_policy("d"));
    server.say(CLUSTER_WIDE, "DELETED", &cluster_policy("c"));
    until(&feed, &mut state, |state| only(state, "d")).await;
}

#[tokio::test]
async fn a_server_that_knows_less_for_a_moment_takes_no_policy_away() {
    for comes_back in [true, false] {
        let (server, mut registry) = Server::start().await;
        server.served.lock().objects.insert(CLUSTER_WIDE, vec![cluster_policy("c")]);
        registry.watch_policy();
        let feed = registry.feed().clone();
        let mut state = State::default();
        until(&feed, &mut state, |state| only(state, "c")).await;
        server.watched(&[CLUSTER_WIDE]).await;
        {
            let mut served = server.served.lock();
            served.objects.remove(CLUSTER_WIDE);
            served.watches.remove(CLUSTER_WIDE);
        }
        until(&feed, &mut state, |state| only(state, "c") && feed.staleness().is_some()).await;
        if comes_back {
            server.served.lock().objects.insert(CLUSTER_WIDE, vec![cluster_policy("e")]);
            until(&feed, &mut state, |state| only(state, "e") && feed.staleness().is_none()).await;
        } else {
            until(&feed, &mut state, |state| state.policies.iter().count() == 0).await;
            until(&feed, &mut state, |_| feed.staleness().is_none()).await;
        }
    }
}

#[tokio::test]
async fn a_feed_that_lost_events_is_filled_by_another_list() {
    let (server, mut registry) = Server::start().await;
    server.served.lock().objects.insert(PODS, vec![pod("a", "node-1", "10.0.0.1")]);
    registry.watch_policy();
    let feed = registry.feed().clone();
    until(&feed, &mut State::default(), |state| state.world.pods().count() == 1).await;
    server.watched(&[PODS]).await;
    (0..=100_000).for_each(|n| feed.push(Event::PodGone(Key::new(None, &format!("gone-{n}")))));
    assert!(feed.lost(Kind::POD));
    server.say(PODS, "ADDED", &pod("b", "node-1", "10.0.0.2"));
    until(&feed, &mut State::default(), |state| state.world.pods().count() == 1).await;
    assert!(!feed.lost(Kind::POD));
}

#[tokio::test]
async fn nobody_asks_for_pods_who_was_not_told_to() {
    let (server, untold) = Server::start().await;
    let mut told = server.registry(None);
    told.watch_policy();
    server.watched(&[PODS, NAMESPACES, POLICIES]).await;
    assert_eq!(server.served.lock().asked.len(), 3, "one of them asks");
    until(told.feed(), &mut State::default(), |_| told.feed().complete()).await;
    assert!(!untold.feed().complete());
}

fn in_namespace(mut object: Value, namespace: &str, name: &str) -> Value {
    object["metadata"]["namespace"] = json!(namespace);
    object["metadata"]["name"] = json!(name);
    object
}

const FEW: Budget = Budget { objects: 20, ..Budget::OWN };

/// A server with this many pods and policies in namespace `big`, and two of each in `small`.
async fn crowded(pods: usize, policies: usize) -> (Server, KubeRegistry) {
    let (server, _) = Server::start().await;
    let crowd = |count: usize| (0..count).map(|n| ("big", n)).chain((0..2).map(|n| ("small", n)));
    {
        let mut served = server.served.lock();
        let place = |(namespace, n): (&str, usize)| {
            let third = if namespace == "big" { 1 } else { 2 };
            in_namespace(pod("", "node-1", &format!("10.0.{third}.{n}")), namespace, &format!("p-{n:02}"))
        };
        served.objects.insert(PODS, crowd(pods).map(place).collect());
        let all =
            crowd(policies).map(|(namespace, n)| in_namespace(policy(""), namespace, &format!("p-{n:02}")));
        served.objects.insert(POLICIES, all.collect());
    }
    let config = kube::Config::new(server.served.lock().url.parse().unwrap());
    let mut registry = KubeRegistry::within(config, None, &"m".parse().unwrap(), FEW).unwrap();
    registry.watch_policy();
    (server, registry)
}

fn count_of(state: &State, namespace: &str) -> (usize, usize) {
    let policies = state.policies.iter().filter(|policy| policy.id.namespace.as_deref() == Some(namespace));
    (state.world.pods_of(namespace).count(), policies.count())
}

#[tokio::test]
async fn too_many_objects_of_one_namespace_spare_others() {
    let (server, registry) = crowded(30, 30).await;
    let feed = registry.feed().clone();
    let mut state = State::default();
    // A new agent comes to know everything that it may, though there are too many.
    until(&feed, &mut state, |_| feed.complete()).await;
    until(&feed, &mut state, |state| count_of(state, "small") == (2, 2)).await;
    assert_eq!(count_of(&state, "big").0, 18);
    let told = feed.staleness().unwrap();
    assert!(told.contains("more objects than the 20") && told.contains("big"), "{told}");
    // No policy of the namespace counts but one that isolates all of its pods.
    let isolating: Vec<_> =
        state.policies.iter().filter(|policy| policy.id.namespace.as_deref() == Some("big")).collect();
    assert_eq!(isolating.len(), 1);
    let policy = isolating[0];
    assert!(
        policy.ingress.as_ref().is_some_and(Vec::is_empty)
            && policy.egress.as_ref().is_some_and(Vec::is_empty)
    );
    assert!(
        state.refusals().any(|told| told.contains("NetworkPolicy big") && told.contains("delete some")),
        "it is named"
    );
    // It recovers when there are fewer, as soon as it is listed anew.
    server.served.lock().objects.get_mut(POLICIES).unwrap().drain(..25);
    server.watched(&[POLICIES]).await;
    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old", "reason": "Expired"}});
    server.served.lock().watches[POLICIES].send(format!("{gone}\n")).unwrap();
    until(&feed, &mut state, |state| count_of(state, "big").1 == 5).await;
    assert!(!state.refusals().any(|told| told.contains("NetworkPolicy big")));
}

#[tokio::test]
async fn a_watch_keeps_no_more_than_a_list() {
    let (server, registry) = crowded(17, 17).await;
    let feed = registry.feed().clone();
    let mut state = State::default();
    until(&feed, &mut state, |_| feed.complete()).await;
    server.watched(&[PODS, POLICIES]).await;
    for n in 50..70 {
        let name = format!("p-{n}");
        server.say(PODS, "ADDED", &in_namespace(pod("", "node-1", &format!("10.0.3.{n}")), "big", &name));
        server.say(POLICIES, "ADDED", &in_namespace(policy(""), "big", &name));
    }
    server.say(PODS, "ADDED", &in_namespace(pod("", "node-1", "10.0.4.1"), "small", "new"));
    server.say(POLICIES, "ADDED", &in_namespace(policy(""), "small", "new"));
    until(&feed, &mut state, |state| count_of(state, "small") == (3, 3)).await;
    assert_eq!(count_of(&state, "big"), (17, 1), "isolated as a whole");
}

#[test]
fn labels_above_the_bound_refuse_the_object() {
    let mut large = pod("a", "node-1", "10.0.0.1");
    let labels: BTreeMap<String, String> = (0..500).map(|n| (format!("l-{n}"), "v".repeat(60))).collect();
    large["metadata"]["labels"] = json!(labels.clone());
    let why = parsed::<Pod>(large).read.unwrap_err();
    assert!(why.contains("metadata.labels") && why.contains("32 KiB"), "{why}");
    let mut isolating = policy("p");
    isolating["metadata"]["labels"] = json!(labels);
    assert!(parsed::<Told<NETWORK_POLICY>>(isolating).read.is_ok(), "it isolates all the same");
}
