use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::*;
use crate::registry::kube::KubeRegistry;

/// A server that follows a script: what it holds, at which version, and how it ends a watch.
struct Scripted {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    version: u64,
    nodes: BTreeSet<String>,
    // What every request is refused with.
    refusal: Option<u16>,
    // Counts up when watches are to end, and how.
    breaks: (u64, End),
    lists: usize,
    // Of those, more than one object.
    whole_lists: usize,
    watches: usize,
    tokens: BTreeSet<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    // The connection is closed in the middle of the answer.
    Cut,
    // The answer ends as it should, long before its time.
    Early,
}

impl Scripted {
    async fn start(version: u64, nodes: &[&str]) -> (Arc<Self>, kube::Config) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = State {
            version,
            nodes: nodes.iter().map(ToString::to_string).collect(),
            refusal: None,
            breaks: (0, End::Cut),
            lists: 0,
            whole_lists: 0,
            watches: 0,
            tokens: BTreeSet::new(),
        };
        let scripted = Arc::new(Self { state: Mutex::new(state), changed: Notify::new() });
        let serving = Arc::clone(&scripted);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = Arc::clone(&serving);
                tokio::spawn(async move { while serving.answer(&stream).await.is_some() {} });
            }
        });
        (scripted, kube::Config::new(url.parse().unwrap()))
    }

    /// Goes on as something else, and ends what goes on.
    fn becomes(&self, end: End, change: impl FnOnce(&mut State)) {
        {
            let mut state = self.state.lock();
            change(&mut state);
            state.breaks = (state.breaks.0 + 1, end);
        }
        self.changed.notify_waiters();
    }

    async fn answer(&self, stream: &TcpStream) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            stream.readable().await.ok()?;
            let mut byte = [0];
            match stream.try_read(&mut byte) {
                Ok(0) => return None,
                Ok(_) => head.push(byte[0]),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let target = head.split(' ').nth(1)?.to_owned();
        let token = head.lines().find_map(|line| line.strip_prefix("authorization: Bearer "));
        self.state.lock().tokens.extend(token.map(str::to_owned));
        let is_nodes = target.starts_with("/api/v1/nodes");
        let (refusal, before) = {
            let state = self.state.lock();
            (state.refusal, state.breaks.0)
        };
        if let Some(code) = refusal {
            let status =
                json!({"kind": "Status", "code": code, "message": "no", "reason": "No", "status": "Failure"});
            return say(stream, &whole(code, &status.to_string())).await;
        }
        if target.contains("watch=true") {
            self.state.lock().watches += usize::from(is_nodes);
            say(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
            )
            .await?;
            loop {
                let changed = self.changed.notified();
                let (count, end) = self.state.lock().breaks;
                if count != before {
                    if end == End::Early {
                        say(stream, "0\r\n\r\n").await?;
                        return Some(());
                    }
                    return None;
                }
                changed.await;
            }
        }
        let list = {
            let mut state = self.state.lock();
            state.lists += usize::from(is_nodes);
            let item = |name: &String| json!({"metadata": {"name": name, "resourceVersion": "1"}});
            let items: Vec<Value> = state.nodes.iter().filter(|_| is_nodes).map(item).collect();
            let is_one = target.contains("limit=1&") || target.ends_with("limit=1");
            state.whole_lists += usize::from(is_nodes && !is_one);
            let items = if is_one { items[..items.len().min(1)].to_vec() } else { items };
            json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": state.version.to_string()}, "items": items})
        };
        say(stream, &whole(200, &list.to_string())).await
    }
}

fn whole(code: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn say(stream: &TcpStream, text: &str) -> Option<()> {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        stream.writable().await.ok()?;
        match stream.try_write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
    Some(())
}

fn registry(config: impl Into<crate::registry::kube::access::Access>) -> (KubeRegistry, Arc<Notify>) {
    let bell = Arc::new(Notify::new());
    (KubeRegistry::with_bell(config, None, Arc::clone(&bell), Budget::OWN).unwrap(), bell)
}

async fn until(bell: &Notify, what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = async {
        while !is_so() {
            let _ = timeout(Duration::from_millis(100), bell.notified()).await;
        }
    };
    timeout(Duration::from_secs(60), waited).await.unwrap_or_else(|_| panic!("never {what}"));
}

fn names(registry: &KubeRegistry) -> Vec<String> {
    let nodes = registry.read().map(|snapshot| snapshot.nodes).unwrap_or_default();
    nodes.iter().map(|node| node.name.to_string()).collect()
}

#[tokio::test]
async fn a_server_that_went_back_is_listed_anew() {
    for end in [End::Cut, End::Early] {
        let (server, config) = Scripted::start(1000, &["a", "b"]).await;
        let (registry, bell) = registry(config);
        until(&bell, "listed", || names(&registry) == ["a", "b"] && server.state.lock().watches > 0).await;
        // A backup without the last changes; and a revocation since, which no watch from the old version tells.
        server.becomes(end, |state| {
            state.version = 900;
            state.nodes.remove("b");
        });
        until(&bell, "listed anew", || names(&registry) == ["a"]).await;
    }
}

#[tokio::test]
async fn a_server_that_went_back_and_on_is_listed_anew() {
    let (server, config) = Scripted::start(1000, &["a", "b"]).await;
    let (registry, bell) = registry(config);
    until(&bell, "listed", || names(&registry) == ["a", "b"] && server.state.lock().watches > 0).await;
    // It has overtaken the version that was known, so that its version tells nothing.
    server.becomes(End::Cut, |state| {
        state.version = 1001;
        state.nodes.remove("b");
    });
    until(&bell, "listed anew", || names(&registry) == ["a"]).await;
}

#[tokio::test]
async fn large_kinds_are_listed_anew_by_version() {
    let many: Vec<String> = (0..=ANEW_MOST).map(|n| format!("n{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let (server, config) = Scripted::start(1000, &many).await;
    let (registry, bell) = registry(config);
    until(&bell, "listed", || names(&registry).len() == many.len() && server.state.lock().watches > 0).await;
    let lists = server.state.lock().lists;
    server.becomes(End::Cut, |state| state.version = 1005);
    until(&bell, "watched again", || server.state.lock().watches > 1).await;
    assert_eq!(server.state.lock().lists, lists + 1, "one object tells the version");
    server.becomes(End::Cut, |state| {
        state.version = 900;
        state.nodes.remove("n7");
    });
    until(&bell, "listed anew", || names(&registry).len() == many.len() - 1).await;
}

#[tokio::test]
async fn what_ends_every_watch_costs_no_lists() {
    let (server, config) = Scripted::start(1000, &["a", "b"]).await;
    let (registry, bell) = registry(config);
    for n in 1..=HABIT as usize + 2 {
        until(&bell, "watched", || server.state.lock().watches >= n).await;
        server.becomes(End::Early, |_| {});
    }
    until(&bell, "watched again", || server.state.lock().watches > HABIT as usize + 2).await;
    let whole_lists = server.state.lock().whole_lists;
    assert_eq!(whole_lists, 1 + HABIT as usize, "and later ones ask for one object");
    // A server that went back is still found out.
    server.becomes(End::Early, |state| {
        state.version = 900;
        state.nodes.remove("b");
    });
    until(&bell, "listed anew", || names(&registry) == ["a"]).await;
}

#[tokio::test]
async fn refusals_block_and_end_with_them() {
    for (code, remedy) in [(401, "credentials"), (403, "ClusterRole")] {
        let (server, config) = Scripted::start(1, &["a"]).await;
        let (registry, bell) = registry(config);
        let node = "a".parse().unwrap();
        let problems = || registry.problems(&node);
        until(&bell, "listed", || names(&registry) == ["a"]).await;
        server.becomes(End::Cut, |state| state.refusal = Some(code));
        let refused = || problems().into_iter().find(|problem| problem.code == "registry-refuses");
        until(&bell, "refused", || {
            refused().is_some_and(|problem| problem.text.contains(&format!("({code})")))
        })
        .await;
        let problem = refused().unwrap();
        assert!(problem.blocks && problem.remedy.contains(remedy), "{problem}");
        assert_eq!(names(&registry), ["a"], "what was known stays");
        server.becomes(End::Cut, |state| state.refusal = None);
        until(&bell, "let in again", || problems().is_empty()).await;
        server.becomes(End::Cut, |state| {
            state.nodes.remove("a");
        });
        until(&bell, "missing", || problems().iter().any(|one| one.code == "own-node-missing" && one.blocks))
            .await;
    }
}

#[tokio::test]
async fn a_new_token_counts_at_once() {
    let (server, config) = Scripted::start(1, &["a"]).await;
    let dir = tempfile::tempdir().unwrap();
    let (token, kubeconfig) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    std::fs::write(&token, "one\n").unwrap();
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": config.cluster_url.to_string()}}],
        "users": [{"name": "u", "user": {"tokenFile": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    });
    std::fs::write(&kubeconfig, text.to_string()).unwrap();
    let access = crate::registry::kube::api_config(Some(&kubeconfig)).await.unwrap();
    let (registry, bell) = registry(access);
    until(&bell, "listed", || names(&registry) == ["a"] && server.state.lock().watches > 0).await;
    assert_eq!(server.state.lock().tokens, BTreeSet::from(["one".to_owned()]));
    // Nothing ends the watch but the new token.
    std::fs::write(&token, "another").unwrap();
    until(&bell, "used", || server.state.lock().tokens.contains("another")).await;
    // Nor does a wait after many failures keep it from being used.
    server.becomes(End::Cut, |state| state.refusal = Some(401));
    until(&bell, "refused", || !registry.problems(&"a".parse().unwrap()).is_empty()).await;
    std::fs::write(&token, "third one").unwrap();
    server.state.lock().refusal = None;
    until(&bell, "let in again", || registry.problems(&"a".parse().unwrap()).is_empty()).await;
    assert!(server.state.lock().tokens.contains("third one"));
}
