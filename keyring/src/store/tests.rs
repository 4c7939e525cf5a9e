use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn refusal(file: &KeyFile) -> String {
    match file.load_or_create() {
        Ok(_) => panic!("accepted"),
        Err(e) => e.to_string(),
    }
}

fn store_with(content: &[u8], mode: u32) -> (tempfile::TempDir, KeyFile) {
    let dir = tempfile::tempdir().unwrap();
    let file = KeyFile::new(dir.path(), "private.key");
    fs::write(file.path(), content).unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
    (dir, file)
}

#[test]
fn a_new_key_is_private_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = KeyFile::new(&dir.path().join("state/keys"), "private.key");
    let first = file.load_or_create().unwrap();
    assert!(first.created);
    assert_eq!(mode(file.path()), 0o600);
    assert_eq!(mode(file.dir()), 0o700);
    let second = file.load_or_create().unwrap();
    assert!(!second.created);
    assert_eq!(first.key.public(), second.key.public());
    assert_eq!(fs::read_dir(file.dir()).unwrap().count(), 1, "temporary file left behind");
}

#[test]
fn a_key_file_that_others_can_read_is_refused_by_name_and_kept() {
    for exposed in [0o640, 0o604, 0o666, 0o610] {
        let key = PrivateKey::generate().unwrap().to_base64();
        let (_dir, file) = store_with(key.as_bytes(), exposed);
        let message = refusal(&file);
        assert!(message.contains("private.key") && message.contains(&format!("{exposed:04o}")), "{message}");
        assert_eq!(fs::read(file.path()).unwrap(), key.as_bytes());
    }
}

#[test]
fn a_key_file_that_is_no_key_is_refused_by_name_and_kept() {
    let key = PrivateKey::generate().unwrap().to_base64();
    let long = [key.as_bytes(), b"\n", key.as_bytes()].concat();
    let zero = format!("{}=\n", "A".repeat(43));
    for content in [&b""[..], b"\n", &key.as_bytes()[..20], &[0xff; 44], &long, zero.as_bytes()] {
        let (_dir, file) = store_with(content, 0o600);
        let message = refusal(&file);
        assert!(message.contains("private.key"), "{message}");
        assert!(!message.contains(&key[..20]), "the secret is in the message");
        assert_eq!(fs::read(file.path()).unwrap(), content);
    }
}

#[test]
fn a_link_or_directory_in_place_of_the_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = KeyFile::new(dir.path(), "private.key");
    std::os::unix::fs::symlink("/etc/hostname", file.path()).unwrap();
    assert!(refusal(&file).contains("no regular file"));
    fs::remove_file(file.path()).unwrap();
    fs::create_dir(file.path()).unwrap();
    assert!(refusal(&file).contains("no regular file"));
}

#[test]
fn a_loose_directory_of_ours_is_tightened() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    KeyFile::new(dir.path(), "private.key").load_or_create().unwrap();
    assert_eq!(mode(dir.path()), 0o700);
}

#[test]
fn agents_starting_at_once_agree_on_one_key() {
    let dir = tempfile::tempdir().unwrap();
    let barrier = std::sync::Barrier::new(4);
    let keys: Vec<_> = std::thread::scope(|scope| {
        let start = |i: usize| {
            let (dir, barrier) = (dir.path(), &barrier);
            scope.spawn(move || {
                barrier.wait();
                KeyFile { path: dir.join("private.key"), temporary_tag: format!("{i}") }
                    .load_or_create()
                    .unwrap()
            })
        };
        let threads: Vec<_> = (0..4).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(keys.iter().filter(|k| k.created).count(), 1);
    assert!(keys.iter().all(|k| k.key.public() == keys[0].key.public()));
}

#[test]
fn an_existing_file_is_never_overwritten_by_a_racing_creation() {
    let (_dir, file) = store_with(PrivateKey::generate().unwrap().to_base64().as_bytes(), 0o600);
    let before = fs::read(file.path()).unwrap();
    assert!(file.create().is_err());
    assert_eq!(fs::read(file.path()).unwrap(), before);
}

#[test]
fn a_key_is_replaced_in_one_step() {
    let dir = tempfile::tempdir().unwrap();
    let file = KeyFile::new(&dir.path().join("keys"), "private.key");
    let before = file.load_or_create().unwrap().key.public();
    let next = PrivateKey::generate().unwrap();
    file.replace(&next).unwrap();
    assert_eq!(mode(file.path()), 0o600);
    let after = file.load_or_create().unwrap();
    assert!(!after.created && after.key.public() == next.public() && next.public() != before);
    assert_eq!(fs::read_dir(file.dir()).unwrap().count(), 1, "temporary file left behind");
}
