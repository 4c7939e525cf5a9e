use std::fmt::Write as _;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::super::KubeRegistry;
use super::*;

const NODES: &str = "/api/v1/nodes";

/// Small, so that a test is quick; the proportions are those of the real ones.
const SMALL: Budget =
    Budget { page: 64 << 10, answer: 256 << 10, list: 4 << 20, objects: 50, kept: 256 << 10 };

/// What a hostile server does with a request for Nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trick {
    /// None: it has this many Nodes.
    Honest(usize),
    /// A body that does not end.
    EndlessBody,
    /// A refusal whose message does not end.
    EndlessRefusal,
    /// Headers that do not end.
    EndlessHeaders,
    /// Empty pages, each with a next one.
    EndlessPages,
    /// A watch with one line that does not end.
    EndlessLine,
    /// A watch with ever new objects.
    EndlessObjects,
    /// Nodes with large annotations and labels.
    Heavy(usize),
}

struct Hostile {
    trick: Mutex<Trick>,
    // Bytes that a client took.
    sent: AtomicU64,
    lists: AtomicUsize,
}

impl Hostile {
    async fn start(trick: Trick) -> (Arc<Self>, kube::Config) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let hostile =
            Arc::new(Self { trick: Mutex::new(trick), sent: AtomicU64::new(0), lists: AtomicUsize::new(0) });
        let serving = Arc::clone(&hostile);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = Arc::clone(&serving);
                tokio::spawn(async move { serving.answer(stream).await });
            }
        });
        (hostile, kube::Config::new(url.parse().unwrap()))
    }

    async fn say(&self, stream: &mut TcpStream, text: &str) -> Option<()> {
        stream.write_all(text.as_bytes()).await.ok()?;
        self.sent.fetch_add(text.len() as u64, Ordering::Relaxed);
        Some(())
    }

    async fn for_ever(&self, stream: &mut TcpStream, text: &str) -> Option<()> {
        loop {
            self.say(stream, text).await?;
        }
    }

    async fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).ok()?;
        let (path, query) = head.split(' ').nth(1)?.split_once('?').unwrap_or_default();
        let query = query.to_owned();
        let stream = &mut stream;
        let begins = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
        if path != NODES {
            self.say(stream, begins).await?;
            if query.contains("watch=true") {
                return std::future::pending().await;
            }
            return self.say(stream, r#"{"metadata":{"resourceVersion":"1"},"items":[]}"#).await;
        }
        let trick = *self.trick.lock();
        let is_watch = query.contains("watch=true");
        if !is_watch {
            self.lists.fetch_add(1, Ordering::Relaxed);
        }
        let letters = "a".repeat(16 << 10);
        match trick {
            Trick::EndlessHeaders => {
                self.say(stream, "HTTP/1.1 200 OK\r\n").await?;
                self.for_ever(stream, &format!("X-{}: b\r\n", &letters[..100])).await
            }
            Trick::EndlessBody if !is_watch => {
                self.say(stream, begins).await?;
                self.say(stream, r#"{"metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":""#)
                    .await?;
                self.for_ever(stream, &letters).await
            }
            Trick::EndlessRefusal => {
                self.say(stream, &begins.replace("200 OK", "500 No")).await?;
                self.for_ever(stream, &letters).await
            }
            Trick::EndlessPages => {
                self.say(stream, begins).await?;
                self.say(stream, r#"{"metadata":{"resourceVersion":"1","continue":"x"},"items":[]}"#).await
            }
            Trick::EndlessLine if is_watch => {
                self.say(stream, begins).await?;
                self.say(stream, r#"{"type":"ADDED","object":{"metadata":{"name":""#).await?;
                self.for_ever(stream, &letters).await
            }
            Trick::EndlessObjects if is_watch => {
                self.say(stream, begins).await?;
                let mut n = 0;
                loop {
                    n += 1;
                    let node = node(&format!("new-{n}"), 0);
                    self.say(stream, &format!("{{\"type\":\"ADDED\",\"object\":{node}}}\n")).await?;
                }
            }
            _ if is_watch => {
                self.say(stream, begins).await?;
                std::future::pending().await
            }
            Trick::Honest(count) => self.list(stream, begins, count, 0, &query).await,
            Trick::Heavy(count) => self.list(stream, begins, count, 20 << 10, &query).await,
            _ => self.list(stream, begins, 1, 0, &query).await,
        }
    }

    async fn list(
        &self,
        stream: &mut TcpStream,
        begins: &str,
        count: usize,
        ballast: usize,
        query: &str,
    ) -> Option<()> {
        let field = |name: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        };
        let (from, most): (usize, usize) = (field("continue").unwrap_or(0), field("limit")?);
        let until = (from + most).min(count);
        let next = if until < count { until.to_string() } else { String::new() };
        let mut items = String::new();
        for n in from..until {
            let comma = if n > from { "," } else { "" };
            let _ = write!(items, "{comma}{}", node(&format!("node-{n:05}"), ballast));
        }
        let page =
            format!(r#"{{"metadata":{{"resourceVersion":"1","continue":"{next}"}},"items":[{items}]}}"#);
        self.say(stream, begins).await?;
        self.say(stream, &page).await
    }
}

fn node(name: &str, ballast: usize) -> String {
    let ballast = "z".repeat(ballast);
    format!(
        r#"{{"metadata":{{"name":"{name}","resourceVersion":"1","annotations":{{"other.io/a":"{ballast}"}}}},"spec":{{}}}}"#
    )
}

async fn registry(trick: Trick) -> (Arc<Hostile>, KubeRegistry, Arc<Notify>) {
    let (hostile, config) = Hostile::start(trick).await;
    let bell = Arc::new(Notify::new());
    let registry = KubeRegistry::with_bell(config, None, Arc::clone(&bell), SMALL).unwrap();
    (hostile, registry, bell)
}

/// Waits until the registry says something that is wanted.
async fn until(
    registry: &KubeRegistry,
    wanted: impl Fn(&Result<usize, String>) -> bool,
) -> Result<usize, String> {
    let reached = async {
        loop {
            let said = registry.own_and_mirrors();
            let said = said.map(|(own, _)| own.nodes.len()).map_err(|e| e.to_string());
            if wanted(&said) {
                return said;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let Ok(reached) = timeout(Duration::from_secs(30), reached).await else {
        panic!(
            "{} bytes, {:?}",
            registry.bytes_read(),
            registry.own_and_mirrors().map(|(own, _)| own.nodes.len())
        );
    };
    reached
}

/// A trick is named, costs no more than what is said, and is over as soon as the server is honest.
async fn survives(trick: Trick, named: &str, most: u64) {
    let (hostile, registry, _bell) = registry(trick).await;
    let said =
        until(&registry, |said| said.as_ref().is_err_and(|why| why.contains(named))).await.unwrap_err();
    assert!(said.contains("Nodes") && said.contains("stays in force"), "{said}");
    // For each list that was begun; what lies in the sockets' buffers comes on top.
    let lists = hostile.lists.load(Ordering::Relaxed).max(1) as u64;
    assert!(registry.bytes_read() <= most * lists, "{} bytes for {lists} lists", registry.bytes_read());
    *hostile.trick.lock() = Trick::Honest(3);
    until(&registry, Result::is_ok).await.unwrap();
}

#[tokio::test]
async fn an_endless_body_is_cut_and_named() {
    survives(Trick::EndlessBody, "an answer of the API server is larger than the 256 KiB", 600 << 10).await;
}

#[tokio::test]
async fn an_endless_error_message_is_cut() {
    survives(
        Trick::EndlessRefusal,
        "an error message of the API server is larger than the 64 KiB",
        128 << 10,
    )
    .await;
}

#[tokio::test]
async fn endless_headers_are_cut() {
    survives(Trick::EndlessHeaders, "message head is too large", 64 << 10).await;
}

#[tokio::test]
async fn endless_pages_end_the_list() {
    survives(Trick::EndlessPages, "a list of more than 4 MiB is not read", 5 << 20).await;
}

#[tokio::test]
async fn an_endless_watch_line_is_cut() {
    survives(Trick::EndlessLine, "a line of a watch of the API server is larger than the 256 KiB", 600 << 10)
        .await;
}

#[tokio::test]
async fn endless_new_objects_end_the_watch() {
    survives(Trick::EndlessObjects, "the kind has more than 50 objects", 600 << 10).await;
}

#[tokio::test]
async fn too_many_objects_leave_the_last_good_state() {
    let (hostile, registry, _bell) = registry(Trick::Honest(50)).await;
    until(&registry, |said| *said == Ok(50)).await.unwrap();
    assert_eq!(hostile.lists.load(Ordering::Relaxed), 1);
    // A new agent meets one object too many, and the count comes down again.
    let (hostile, registry, _bell) = self::registry(Trick::Honest(51)).await;
    let why = until(&registry, Result::is_err).await.unwrap_err();
    assert!(why.contains("Nodes"), "{why}");
    until(&registry, |said| said.as_ref().is_err_and(|why| why.contains("more than 50 objects")))
        .await
        .unwrap_err();
    *hostile.trick.lock() = Trick::Honest(50);
    assert_eq!(until(&registry, |said| *said == Ok(50)).await, Ok(50));
}

#[tokio::test]
async fn large_objects_come_in_smaller_pages() {
    // 40 Nodes of 20 KiB: more than a page of 64 KiB, each less than an answer.
    let (hostile, registry, _bell) = registry(Trick::Heavy(40)).await;
    assert_eq!(until(&registry, |said| *said == Ok(40)).await, Ok(40));
    assert!(hostile.lists.load(Ordering::Relaxed) > 40);
}

#[tokio::test]
async fn another_link_is_not_concerned() {
    let (_hostile, bad, _bell) = registry(Trick::EndlessBody).await;
    let (_honest, good, _bell) = registry(Trick::Honest(2)).await;
    assert_eq!(until(&good, |said| *said == Ok(2)).await, Ok(2));
    until(&bad, |said| said.as_ref().is_err_and(|why| why.contains("larger than"))).await.unwrap_err();
    assert_eq!(until(&good, Result::is_ok).await, Ok(2));
}

#[test]
fn only_a_line_that_is_too_long_counts() {
    let limit = Exceeded { what: Part::Line, most: 10 };
    let mut body = Bounded { inner: (), limit, used: 0, read: Arc::default() };
    for _ in 0..1000 {
        assert_eq!(body.take(b"0123456\n89"), Ok(()));
        assert_eq!(body.take(b"0123\n"), Ok(()));
    }
    assert_eq!(body.take(b"01234567890"), Err(limit));
    let mut body = Bounded { inner: (), limit, used: 0, read: Arc::default() };
    assert_eq!(body.take(b"\n\n01234567890\n"), Err(limit));
}

/// The containers of all workloads in deploy/kubernetes, each with its file.
fn containers() -> Vec<(String, serde_json::Value)> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes");
    let mut all = Vec::new();
    for folder in std::fs::read_dir(root).unwrap().flatten() {
        for file in std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.path()) {
            let text = std::fs::read_to_string(&file).unwrap();
            for document in crate::manifest::documents(text.as_bytes()).unwrap() {
                let Some(pod) = document.pointer("/spec/template/spec") else { continue };
                for kind in ["containers", "initContainers"] {
                    let found = pod[kind].as_array().into_iter().flatten();
                    all.extend(found.map(|container| (file.display().to_string(), container.clone())));
                }
            }
        }
    }
    all
}

fn bytes(quantity: &serde_json::Value) -> u64 {
    let text = quantity.as_str().unwrap();
    let (number, shift) = match (text.strip_suffix("Gi"), text.strip_suffix("Mi")) {
        (Some(number), _) => (number, 30),
        (_, Some(number)) => (number, 20),
        _ => panic!("{text}"),
    };
    number.parse::<u64>().unwrap() << shift
}

#[test]
fn memory_limits_hold_what_is_read() {
    let containers = containers();
    assert!(containers.len() >= 5, "{containers:?}");
    // As the comments in the manifests have it: pages three times, nodes twice, pods and policies once.
    let pages = 4 * 3 * Budget::OWN.answer;
    let nodes = 2 * 2 * Budget::OWN.kept as u64;
    let policy = 2 * (Budget::OWN.objects * super::super::census::UNIT) as u64;
    let remote = 2 * 3 * Budget::REMOTE.answer + 2 * 2 * Budget::REMOTE.kept as u64;
    for (file, container) in containers {
        let limit =
            container.pointer("/resources/limits/memory").unwrap_or_else(|| panic!("{file}: no limit"));
        let needed = match container["name"].as_str().unwrap() {
            "agent" => (57 << 20) + pages + nodes + policy,
            "federate" => pages + nodes + 2 * remote,
            "cleanup" | "stay" => pages + nodes,
            "device" => 4 * (66 << 20),
            // It copies one file at a time.
            "boot-guard" => 64 << 20,
            other => panic!("{file}: {other}"),
        };
        assert!(bytes(limit) >= needed, "{file}: {limit} for {} MiB", needed >> 20);
    }
    let values = include_str!("../../../../../deploy/helm/sennit/values.yaml");
    let values = &crate::manifest::documents(values.as_bytes()).unwrap()[0];
    for (part, limit) in [("agent", 1 << 30), ("device", 512 << 20)] {
        assert_eq!(bytes(&values[part]["resources"]["limits"]["memory"]), limit, "{part}");
    }
}
