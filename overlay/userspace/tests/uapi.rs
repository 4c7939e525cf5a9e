//! The UAPI protocol as pure functions, and its server over a socket pair.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use mesh_wg::config::{AllowedIpChange, DeviceSnapshot, DeviceUpdate, PeerSnapshot};
use mesh_wg::device::Device;
use mesh_wg::features::Features;
use mesh_wg::key::{PresharedKey, PrivateKey, PublicKey};
use mesh_wg::network::Network;
use mesh_wg::uapi::{
    Force, ListenError, MAX_LINE, Operation, Reader, RequestError, Server, SocketFile, SocketSnapshot,
    parse_set, render_get,
};
use proptest::prelude::*;

const KEY: &str = "0101010101010101010101010101010101010101010101010101010101010101";
const OTHER: &str = "0202020202020202020202020202020202020202020202020202020202020202";
const ZERO: &str = "0000000000000000000000000000000000000000000000000000000000000000";

fn scope_of(name: &str) -> Option<u32> {
    (name == "eth0").then_some(7)
}

fn parse(lines: &str) -> Result<DeviceUpdate, RequestError> {
    parse_set(lines, &scope_of)
}

fn parsed(lines: &str) -> DeviceUpdate {
    parse(lines).unwrap_or_else(|error| panic!("{lines}: {error}"))
}

fn peer_line(line: &str) -> Result<DeviceUpdate, RequestError> {
    parse(&format!("public_key={KEY}\n{line}\n"))
}

#[test]
fn a_full_request_is_understood() {
    let update = parsed(&format!(
        "private_key={KEY}\nlisten_port=51820\nfwmark=51820\nreplace_peers=true\n\
         public_key={KEY}\npreshared_key={OTHER}\nendpoint=192.0.2.1:1\npersistent_keepalive_interval=25\n\
         replace_allowed_ips=true\nallowed_ip=10.0.0.1/24\nallowed_ip=fd00::1/64\nprotocol_version=1\n\
         public_key={OTHER}\nremove=true\n"
    ));
    assert_eq!(update.private_key, Some(PrivateKey::new([1; 32])));
    assert_eq!((update.listen_port, update.fwmark, update.replace_peers), (Some(51820), Some(51820), true));
    let [first, second] = update.peers.as_slice() else { panic!("two peers") };
    assert_eq!(first.public_key, PublicKey::new([1; 32]));
    assert_eq!(first.preshared_key, Some(PresharedKey::new([2; 32])));
    assert_eq!(first.endpoint, Some("192.0.2.1:1".parse().unwrap()));
    assert_eq!(first.persistent_keepalive, Some(25));
    assert!(first.replace_allowed_ips && !first.remove && !first.update_only);
    assert_eq!(
        first.allowed_ips,
        [
            AllowedIpChange::Add("10.0.0.0/24".parse().unwrap()),
            AllowedIpChange::Add("fd00::/64".parse().unwrap())
        ],
        "host bits are cleared"
    );
    assert!(second.remove);
}

#[test]
fn zero_keys_take_keys_away() {
    let update = parsed(&format!("private_key={ZERO}\npublic_key={KEY}\npreshared_key={ZERO}\n"));
    assert_eq!(update.private_key, Some(None));
    assert_eq!(update.peers[0].preshared_key, Some(None));
}

#[test]
fn endpoints_of_all_kinds_are_understood() {
    for (text, address) in [
        ("192.0.2.1:51820", "192.0.2.1:51820"),
        ("[2001:db8::1]:51820", "[2001:db8::1]:51820"),
        ("[fe80::1%7]:1", "[fe80::1%7]:1"),
        ("[fe80::1%eth0]:1", "[fe80::1%7]:1"),
        ("[::ffff:192.0.2.1]:9", "192.0.2.1:9"),
    ] {
        let update = peer_line(&format!("endpoint={text}")).unwrap();
        assert_eq!(update.peers[0].endpoint, Some(address.parse::<SocketAddr>().unwrap()), "{text}");
    }
    for bad in
        ["", "192.0.2.1", "192.0.2.1:", "192.0.2.1:65536", "192.0.2.1:+1", "host:1", "2001:db8::1:51820"]
    {
        assert!(peer_line(&format!("endpoint={bad}")).is_err(), "{bad}");
    }
    for bad in ["[::1]", "[::1:1", "[fe80::1%nosuch]:1", "[192.0.2.1]:1", "[]:1", ":1", "[::1%]:1"] {
        assert!(peer_line(&format!("endpoint={bad}")).is_err(), "{bad}");
    }
}

#[test]
fn allowed_ips_are_added_removed_and_replaced_in_order() {
    let update =
        peer_line("allowed_ip=10.0.0.0/8\nallowed_ip=-10.1.0.0/16\nallowed_ip=+10.2.0.0/16").unwrap();
    assert_eq!(
        update.peers[0].allowed_ips,
        [
            AllowedIpChange::Add("10.0.0.0/8".parse().unwrap()),
            AllowedIpChange::Remove("10.1.0.0/16".parse().unwrap()),
            AllowedIpChange::Add("10.2.0.0/16".parse().unwrap()),
        ]
    );
    let update =
        peer_line("allowed_ip=10.0.0.0/8\nreplace_allowed_ips=true\nallowed_ip=10.1.0.0/16").unwrap();
    assert_eq!(update.peers[0].allowed_ips.len(), 1, "what came before the replacement is void");
}

#[test]
fn bad_values_and_unknown_keys_are_invalid() {
    for line in [
        "private_key=00".to_owned(),
        format!("private_key={KEY}0"),
        format!("private_key={}", KEY.replace('1', "x")),
        "listen_port=65536".into(),
        "listen_port=-1".into(),
        "listen_port=".into(),
        "listen_port=+1".into(),
        "fwmark=4294967296".into(),
        "replace_peers=false".into(),
        "nonsense=1".into(),
        "remove=true".into(),
        "allowed_ip=10.0.0.0/8".into(),
        "public_key=00".into(),
    ] {
        assert_eq!(parse(&line), Err(RequestError::Invalid { line: 2 }), "{line}");
    }
    for line in [
        "remove=1",
        "update_only=yes",
        "preshared_key=1",
        "persistent_keepalive_interval=65536",
        "persistent_keepalive_interval=off",
        "replace_allowed_ips=",
        "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.0.0/8",
        "allowed_ip=fd00::/129",
        "allowed_ip=",
        "allowed_ip=-",
        "allowed_ip=10.0.0.0/+8",
        "protocol_version=2",
        "private_key=0101010101010101010101010101010101010101010101010101010101010101",
        "listen_port=1",
        "last_handshake_time_sec=1",
    ] {
        assert_eq!(peer_line(line), Err(RequestError::Invalid { line: 3 }), "{line}");
    }
    assert_eq!(parse("nonsense"), Err(RequestError::Protocol { line: 2 }));
}

#[test]
fn nothing_of_a_bad_request_survives_and_the_next_one_is_fresh() {
    let mut reader = Reader::new(&scope_of);
    for line in ["set=1", "listen_port=7", "nonsense=1", "also nonsense"] {
        assert_eq!(reader.line(line.as_bytes()), None);
    }
    assert_eq!(reader.line(b""), Some(Err(RequestError::Invalid { line: 3 })));
    assert!(reader.is_fresh());
    reader.line(b"get=1");
    assert_eq!(reader.line(b""), Some(Ok(Operation::Get)));
    for bad in ["get=2", "set=0", "get", "hello", "=1", "get=1\0"] {
        reader.line(bad.as_bytes());
        assert_eq!(reader.line(b""), Some(Err(RequestError::Protocol { line: 1 })), "{bad}");
    }
    reader.line(b"get=1");
    reader.line(b"listen_port=1");
    assert_eq!(reader.line(b""), Some(Err(RequestError::Protocol { line: 2 })));
    assert_eq!(reader.line(b""), Some(Err(RequestError::Protocol { line: 1 })), "an empty request");
    reader.line(&vec![b'x'; MAX_LINE + 1]);
    assert_eq!(reader.line(b""), Some(Err(RequestError::TooLong { line: 1 })));
    reader.line(b"\xff=1");
    assert_eq!(reader.line(b""), Some(Err(RequestError::Protocol { line: 1 })));
}

#[test]
fn what_get_shows_is_what_the_protocol_says() {
    let device = DeviceSnapshot {
        private_key: PrivateKey::new([0x48; 32]),
        peers: vec![PeerSnapshot {
            public_key: PublicKey::new([1; 32]),
            preshared_key: None,
            endpoint: Some("[fe80::1%7]:51820".parse().unwrap()),
            last_handshake: Some(std::time::UNIX_EPOCH + Duration::new(1_700_000_000, 5)),
            tx_bytes: 10,
            rx_bytes: 20,
            persistent_keepalive: 25,
            allowed_ips: vec!["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()],
        }],
    };
    let shown = render_get(&device, SocketSnapshot { listen_port: 51820, fwmark: 1 });
    assert_eq!(
        shown,
        format!(
            "private_key={}\nlisten_port=51820\nfwmark=1\npublic_key={KEY}\npreshared_key={ZERO}\n\
             protocol_version=1\nendpoint=[fe80::1%7]:51820\nlast_handshake_time_sec=1700000000\n\
             last_handshake_time_nsec=5\ntx_bytes=10\nrx_bytes=20\npersistent_keepalive_interval=25\n\
             allowed_ip=10.0.0.0/24\nallowed_ip=fd00::/64\nerrno=0\n\n",
            "48".repeat(32)
        )
    );
    assert_eq!(render_get(&DeviceSnapshot::default(), SocketSnapshot::default()), "errno=0\n\n");
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn ask(&mut self, request: &str) -> String {
        self.stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\n\n") {
            self.stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        String::from_utf8(answer).unwrap()
    }
}

fn client() -> Client {
    let network = Network::new(Features::without("udp-gro").unwrap()).unwrap();
    let force = Force { features: Features { tun_tso: true, ..Features::NONE }, threads: 3 };
    let server = Server::new(Arc::new(Device::new()), Arc::new(network), force);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    std::thread::spawn(move || server.serve(theirs));
    Client { stream: ours }
}

#[test]
fn several_operations_share_a_connection() {
    let mut client = client();
    assert_eq!(client.ask("get=1\n\n"), "errno=0\n\n");
    assert_eq!(client.ask(&format!("set=1\nprivate_key={KEY}\npublic_key={OTHER}\n\n")), "errno=0\n\n");
    assert_eq!(client.ask("set=1\nlisten_port=x\n\n"), format!("errno=-{}\n\n", libc::EINVAL));
    assert_eq!(client.ask("bonjour\n\n"), format!("errno=-{}\n\n", libc::EPROTO));
    assert!(client.ask("get=1\n\n").contains(&format!("public_key={OTHER}\n")));
}

#[test]
fn what_is_in_force_is_told_to_whoever_asks() {
    let mut client = client();
    assert_eq!(
        client.ask("features=1\n\n"),
        "tun-tso=on\ntun-uso=off\nudp-gso=on\nudp-gro=off\nthreads=3\nerrno=0\n\n"
    );
    assert_eq!(client.ask("features=1\nget=1\n\n"), format!("errno=-{}\n\n", libc::EPROTO));
}

#[test]
fn a_bad_line_at_the_end_leaves_everything_as_it_was() {
    let mut client = client();
    let request =
        format!("set=1\nprivate_key={KEY}\nlisten_port=0\npublic_key={OTHER}\nallowed_ip=10.0.0.0/40\n\n");
    assert_eq!(client.ask(&request), format!("errno=-{}\n\n", libc::EINVAL));
    assert_eq!(client.ask("get=1\n\n"), "errno=0\n\n", "no key, no port, no peer");
}

#[test]
fn five_thousand_peers_fit_into_one_request() {
    let mut client = client();
    let mut request = format!("set=1\nprivate_key={KEY}\nreplace_peers=true\n");
    for i in 0..5000u32 {
        request += &format!("public_key={i:064x}\npreshared_key={OTHER}\nreplace_allowed_ips=true\n");
        for j in 0..4 {
            request += &format!("allowed_ip=10.{}.{}.{}/32\n", i >> 8, i & 255, j);
        }
    }
    assert_eq!(client.ask(&(request + "\n")), "errno=0\n\n");
    assert_eq!(client.ask("get=1\n\n").matches("allowed_ip=").count(), 20_000);
}

#[test]
fn garbage_without_end_does_not_grow_the_server() {
    let mut client = client();
    let garbage = vec![b'x'; 1 << 20];
    for _ in 0..8 {
        client.stream.write_all(&garbage).unwrap();
    }
    assert_eq!(client.ask("\n\n"), format!("errno=-{}\n\n", libc::E2BIG));
    assert_eq!(client.ask("get=1\n\n"), "errno=0\n\n");
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0, "the server hangs up too");
}

#[test]
fn socket_files_of_the_dead_are_replaced_and_those_of_the_living_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let name = "wg0".parse().unwrap();
    let (file, listener) = SocketFile::listen(directory.path(), &name).unwrap();
    assert!(matches!(SocketFile::listen(directory.path(), &name), Err(ListenError::InUse(_))));
    assert!(file.is_ours());
    drop(listener);
    let (new, _listener) = SocketFile::listen(directory.path(), &name).unwrap();
    assert!(!file.is_ours() && new.is_ours());
    drop(file);
    assert!(new.is_ours(), "the old owner does not remove the new owner's file");
    drop(new);
    std::fs::write(directory.path().join("wg0.sock"), "").unwrap();
    assert!(matches!(SocketFile::listen(directory.path(), &name), Err(ListenError::NotASocket(_))));
}

proptest! {
    #[test]
    fn no_line_makes_the_reader_panic(lines in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..20)) {
        let mut reader = Reader::new(&scope_of);
        for line in &lines {
            reader.line(line);
        }
    }

    #[test]
    fn near_misses_never_panic(
        lines in proptest::collection::vec(
            ("(set|get|private_key|public_key|endpoint|allowed_ip|listen_port|fwmark|remove|preshared_key|persistent_keepalive_interval)",
             "(true|1|0|[0-9a-f]{64}|[0-9.:/%\\[\\]+-]{0,24}|-?10\\.0\\.0\\.[0-9]{1,3}/[0-9]{1,3})"),
            0..20,
        ),
    ) {
        let mut reader = Reader::new(&scope_of);
        for (key, value) in &lines {
            reader.line(format!("{key}={value}").as_bytes());
        }
        prop_assert!(reader.line(b"").is_some());
    }
}
