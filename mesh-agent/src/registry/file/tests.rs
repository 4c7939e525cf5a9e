use super::*;
use mesh_keyring::PrivateKey;

fn node(name: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [10.0.0.0/24]}}\n")
}

fn claim() -> Advertisement {
    Advertisement {
        public_key: PrivateKey::from_bytes(&[5; 32]).unwrap().public(),
        epoch: 7,
        site: "aws".parse().unwrap(),
        endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
        internal_endpoints: vec![],
        mtu: Some(1500),
        reflexive_endpoints: Vec::new(),
        paths: Default::default(),
        encrypts: true,
    }
}

fn registry() -> (tempfile::TempDir, FileRegistry) {
    let dir = tempfile::tempdir().unwrap();
    let registry = FileRegistry::new(dir.path());
    (dir, registry)
}

fn names(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.nodes.iter().map(|n| n.name.as_str()).collect()
}

async fn soon(registry: &mut FileRegistry, mut done: impl FnMut(&mut FileRegistry) -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !done(registry) {
        tokio::time::timeout_at(deadline, registry.changed()).await.expect("no change was noticed in time");
    }
}

#[test]
fn a_publication_is_read_back_as_it_was_claimed() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    let name = "a".parse().unwrap();
    assert!(registry.publish(&name, &claim()).unwrap());
    assert!(!registry.publish(&name, &claim()).unwrap(), "an equal publication is not written again");
    let snapshot = registry.read().unwrap();
    assert_eq!(Advertisement::parse(&snapshot.nodes[0].annotations).unwrap(), Some(claim()));
    registry.withdraw(&name).unwrap();
    registry.withdraw(&name).unwrap();
    assert!(registry.read().unwrap().nodes[0].annotations.is_empty());
}

#[test]
fn a_file_that_becomes_unreadable_counts_with_what_it_held() {
    let (dir, mut registry) = registry();
    let path = dir.path().join("nodes.yaml");
    for ruined in [&b"apiVersion: v1\nkind: [No"[..], &[0xff, 0, 1], b"{\"kind\":"] {
        fs::write(&path, node("a")).unwrap();
        assert_eq!(registry.read().unwrap().problems, []);
        fs::write(&path, ruined).unwrap();
        let snapshot = registry.read().unwrap();
        assert_eq!(names(&snapshot), ["a"]);
        assert!(snapshot.problems[0].text.starts_with("nodes.yaml: "), "{:?}", snapshot.problems);
    }
    fs::remove_file(&path).unwrap();
    assert!(registry.read().unwrap().nodes.is_empty(), "a removed file is removed");
}

#[test]
fn pipes_hidden_and_oversized_files_do_not_disturb() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    fs::write(dir.path().join(".nodes.yaml.tmp"), "{{{").unwrap();
    fs::write(dir.path().join("README.md"), "{{{").unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::create_dir(dir.path().join("folder.yaml")).unwrap();
    File::create(dir.path().join("big.yaml")).unwrap().set_len(manifest::FILE_MOST + 1).unwrap();
    let snapshot = registry.read().unwrap();
    assert_eq!(names(&snapshot), ["a"]);
    let text = snapshot.problems.iter().map(|p| p.text.as_str()).collect::<Vec<_>>().join("\n");
    assert!(
        text.contains("pipe.yaml") && text.contains("folder.yaml") && text.contains("big.yaml"),
        "{text}"
    );
    assert_eq!(snapshot.problems.len(), 3);
}

#[test]
fn an_absent_directory_is_an_error_and_is_not_made() {
    let (dir, _) = registry();
    let gone = dir.path().join("gone");
    let mut registry = FileRegistry::new(&gone);
    assert!(registry.read().is_err());
    assert!(registry.publish(&"a".parse().unwrap(), &claim()).is_err());
    assert!(!gone.exists());
}

#[tokio::test]
async fn changes_are_noticed_also_after_the_directory_vanished_and_returned() {
    let (dir, _) = registry();
    let inner = dir.path().join("registry");
    fs::create_dir(&inner).unwrap();
    let mut registry = FileRegistry::new(&inner);
    fs::write(inner.join("a.yaml"), node("a")).unwrap();
    soon(&mut registry, |r| r.read().is_ok_and(|s| names(&s) == ["a"])).await;
    fs::write(inner.join("b.yaml"), node("b")).unwrap();
    soon(&mut registry, |r| r.read().is_ok_and(|s| names(&s) == ["a", "b"])).await;
    let away = dir.path().join("away");
    fs::rename(&inner, &away).unwrap();
    soon(&mut registry, |r| r.read().is_err()).await;
    fs::rename(&away, &inner).unwrap();
    soon(&mut registry, |r| r.read().is_ok_and(|s| names(&s) == ["a", "b"])).await;
    fs::remove_file(inner.join("a.yaml")).unwrap();
    soon(&mut registry, |r| r.read().is_ok_and(|s| names(&s) == ["b"])).await;
}

#[tokio::test]
async fn the_first_publication_is_noticed_though_its_folder_was_not_there() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("a.yaml"), node("a")).unwrap();
    soon(&mut registry, |r| r.read().is_ok()).await;
    FileRegistry::new(dir.path()).publish(&"a".parse().unwrap(), &claim()).unwrap();
    soon(&mut registry, |r| r.read().is_ok_and(|s| !s.nodes[0].annotations.is_empty())).await;
}

#[tokio::test]
async fn a_change_is_not_forgotten_when_the_wait_for_it_is_cut_short() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("a.yaml"), node("a")).unwrap();
    soon(&mut registry, |r| r.read().is_ok()).await;
    // Settle: whatever the first file stirred is over.
    while tokio::time::timeout(QUIET * 4, registry.changed()).await.is_ok() {}
    fs::write(dir.path().join("b.yaml"), node("b")).unwrap();
    // Others that are waited for beside it end the wait again and again, each time within the quiet time.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    for _ in 0..3 {
        // A busy host may take longer to end the wait than the quiet time lasts.
        if tokio::time::timeout(QUIET / 3, registry.changed()).await.is_ok() {
            return;
        }
    }
    tokio::time::timeout_at(deadline, registry.changed()).await.expect("the change was forgotten");
}

#[test]
fn only_the_file_of_its_name_speaks_for_a_node() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    registry.publish(&"a".parse().unwrap(), &claim()).unwrap();
    let own = fs::read_to_string(dir.path().join("published/a.yaml")).unwrap();
    for other in ["a.yml", "a.json", "0.yaml", "A.yaml"] {
        fs::write(dir.path().join("published").join(other), own.replace("aws", "evil")).unwrap();
    }
    let snapshot = registry.read().unwrap();
    assert_eq!(snapshot.nodes[0].annotations["sennit.dev/site"], "aws");
    assert_eq!(snapshot.problems.len(), 4, "{:?}", snapshot.problems);
}

#[test]
fn a_flood_of_strangers_hides_nobody_and_is_named_briefly() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("nodes.yaml"), node("z")).unwrap();
    registry.publish(&"z".parse().unwrap(), &claim()).unwrap();
    for n in 0..500 {
        fs::write(dir.path().join(format!("published/0{n}.yaml")), "{{{").unwrap();
    }
    let snapshot = registry.read().unwrap();
    assert!(snapshot.nodes[0].annotations.contains_key("sennit.dev/public-key"));
    assert_eq!(snapshot.problems.len(), STRANGERS_MOST);
}

#[test]
fn a_publication_that_is_a_pipe_a_link_or_too_large_is_neither_followed_nor_waited_for() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    fs::create_dir(dir.path().join(PUBLISHED)).unwrap();
    let path = dir.path().join("published/a.yaml");
    let name = "a".parse().unwrap();
    for n in 0..3 {
        match n {
            0 => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            1 => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
            _ => File::create(&path).unwrap().set_len(manifest::PUBLICATION_MOST + 1).unwrap(),
        }
        let snapshot = registry.read().unwrap();
        assert!(snapshot.unreadable.contains(&name), "{:?}", snapshot.problems);
        // Our own agent replaces what was planted in its place.
        assert!(registry.publish(&name, &claim()).unwrap());
        assert_eq!(registry.read().unwrap().problems, []);
        fs::remove_file(&path).unwrap();
        registry.read().unwrap();
    }
}

#[test]
fn a_file_of_the_operator_that_never_could_be_read_makes_the_snapshot_incomplete() {
    let (dir, mut registry) = registry();
    fs::write(dir.path().join("a.yaml"), node("a")).unwrap();
    fs::write(dir.path().join("b.yaml"), "kind: [").unwrap();
    assert!(registry.read().unwrap().incomplete);
    fs::write(dir.path().join("b.yaml"), node("b")).unwrap();
    assert!(!registry.read().unwrap().incomplete);
    fs::write(dir.path().join("b.yaml"), "kind: [").unwrap();
    assert!(!registry.read().unwrap().incomplete, "what it held is known");
}

/// How many policies the feed was told of last; `None`: of none at all.
/// How many policies there are by what the feed was told so far; `None`: it was told nothing since.
fn told(registry: &FileRegistry, state: &mut mesh_policy::State) -> Option<usize> {
    let events = registry.feed().take();
    let told = !events.is_empty();
    for event in events {
        state.take(event);
    }
    told.then(|| state.policies.iter().count())
}

#[test]
fn a_name_whose_file_is_gone_says_nothing_any_more() {
    let (dir, mut registry) = registry();
    let mut state = mesh_policy::State::default();
    let target = dir.path().join("target");
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    fs::write(
        &target,
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {}\n",
    )
    .unwrap();
    std::os::unix::fs::symlink(&target, dir.path().join("policies.yaml")).unwrap();
    registry.read().unwrap();
    registry.accepted();
    assert_eq!(told(&registry, &mut state), Some(1));
    fs::remove_file(&target).unwrap();
    registry.read().unwrap();
    registry.accepted();
    assert_eq!(told(&registry, &mut state), Some(0));
}

#[test]
fn no_node_speaks_for_the_mesh() {
    let dir = tempfile::tempdir().unwrap();
    let mut registry = FileRegistry::of_mesh(dir.path(), &"m".parse().unwrap());
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    fs::create_dir(dir.path().join(PUBLISHED)).unwrap();
    let mesh = "apiVersion: sennit.dev/v1alpha1\nkind: Mesh\nmetadata: {name: m}\nspec: {}\n";
    fs::write(dir.path().join(PUBLISHED).join("a.yaml"), mesh).unwrap();
    assert_eq!(registry.read().unwrap().mesh, MeshWord::Silent);
    fs::write(dir.path().join("z.yaml"), mesh).unwrap();
    assert!(matches!(registry.read().unwrap().mesh, MeshWord::Said(_)));
}

#[test]
fn policy_is_told_of_what_was_accepted_and_of_nothing_half_read() {
    const POLICY: &str =
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {}\n";
    let (dir, mut registry) = registry();
    let mut state = mesh_policy::State::default();
    let policies = dir.path().join("policies.yaml");
    fs::write(dir.path().join("nodes.yaml"), node("a")).unwrap();
    fs::write(&policies, "a: [").unwrap();
    registry.read().unwrap();
    registry.accepted();
    assert!(
        told(&registry, &mut state).is_none() && !registry.feed().complete(),
        "what a file holds that was never read"
    );
    fs::write(&policies, POLICY).unwrap();
    registry.read().unwrap();
    assert_eq!(told(&registry, &mut state), None, "nobody has accepted it");
    registry.accepted();
    assert_eq!(told(&registry, &mut state), Some(1));
    registry.read().unwrap();
    registry.accepted();
    assert_eq!(told(&registry, &mut state), None, "nothing is new");
    // The directory is emptied, which nobody takes for the operator's will, and comes back with a file cut in the middle.
    let whole = fs::read(dir.path().join("nodes.yaml")).unwrap();
    fs::remove_file(dir.path().join("nodes.yaml")).unwrap();
    fs::remove_file(&policies).unwrap();
    registry.read().unwrap();
    fs::write(dir.path().join("nodes.yaml"), whole).unwrap();
    fs::write(&policies, &POLICY[..60]).unwrap();
    registry.read().unwrap();
    registry.accepted();
    assert!(
        matches!(told(&registry, &mut state), None | Some(1)) && state.policies.iter().count() == 1,
        "what it held before"
    );
    // The operator takes it away.
    fs::remove_file(&policies).unwrap();
    registry.read().unwrap();
    registry.accepted();
    assert_eq!(told(&registry, &mut state), Some(0));
}

#[test]
fn files_beyond_the_budget_keep_what_they_held() {
    let (dir, mut registry) = registry();
    for name in ["a", "b"] {
        fs::write(dir.path().join(format!("{name}.yaml")), node(name)).unwrap();
    }
    registry.bytes_most = 1 << 20;
    assert_eq!(registry.read().unwrap().nodes.len(), 2);
    // A large file comes first by name, and none that was known is lost by it.
    fs::write(dir.path().join("0.yaml"), format!("# {}\n", "x".repeat((1 << 20) - 100))).unwrap();
    fs::write(dir.path().join("c.yaml"), node("c")).unwrap();
    let snapshot = registry.read().unwrap();
    assert_eq!(snapshot.nodes.len(), 2);
    assert!(snapshot.incomplete, "node c is not known");
    let told: Vec<&str> = snapshot.problems.iter().map(|problem| problem.text.as_str()).collect();
    assert!(told.iter().any(|told| told.contains("b.yaml") && told.contains("stays in force")), "{told:?}");
    assert!(told.iter().any(|told| told.contains("c.yaml") && told.contains("take some away")), "{told:?}");
    fs::remove_file(dir.path().join("0.yaml")).unwrap();
    let snapshot = registry.read().unwrap();
    assert_eq!((snapshot.nodes.len(), snapshot.incomplete), (3, false));
    assert_eq!(snapshot.problems, []);
}

#[test]
fn of_too_many_files_the_first_count() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..10 {
        fs::write(dir.path().join(format!("{n}.yaml")), "").unwrap();
    }
    let Listing { manifests: files, surplus, .. } = list(dir.path(), 4).unwrap();
    let names: Vec<_> = files.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!((names, surplus), (vec!["0.yaml", "1.yaml", "2.yaml", "3.yaml"], 6));
}
