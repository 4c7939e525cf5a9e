//! Runs the scenarios of deploy/examples/troubleshooting, which docs/troubleshooting.md links.

macro_rules! scenarios {
    ($($name:ident: $file:literal,)*) => {
        $(
            #[test]
            fn $name() {
                let text = include_str!(concat!("../../../deploy/examples/troubleshooting/", $file));
                // Commands of a scenario look for programs on PATH alone.
                let agent = format!("command: {} ", e2e::programs().join("mesh-agent").display());
                e2e::passes(stringify!($name), &text.replace("command: mesh-agent ", &agent));
            }
        )*

        #[test]
        fn every_scenario_is_run() {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/examples/troubleshooting");
            let mut found: Vec<_> = std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            let mut run = vec![$($file),*];
            found.sort();
            run.sort_unstable();
            assert_eq!(found, run);
        }

        #[test]
        fn every_scenario_is_in_the_page() {
            let page = include_str!("../../../docs/troubleshooting.md");
            for file in [$($file),*] {
                let link = format!("(../deploy/examples/troubleshooting/{file})");
                assert!(page.contains(&link), "docs/troubleshooting.md does not name {file}");
            }
        }
    };
}

scenarios! {
    no_peer_was_ever_reached: "all-waiting.yaml",
    udp_between_two_hosts_is_filtered: "peer-blocked.yaml",
    nothing_comes_through_the_tunnel: "unreached.yaml",
    forwarding_is_off: "forwarding-off.yaml",
    a_firewall_drops_forwarded_packets: "forwarding-dropped.yaml",
    a_vpn_takes_all_traffic: "rule-ahead.yaml",
    direct_udp_is_blocked: "vxlan-instead-of-direct.yaml",
    a_path_carries_less: "mtu.yaml",
    a_symmetric_nat: "symmetric-nats.yaml",
    a_program_goes_past_the_routes: "guard-drops.yaml",
    a_deleted_node_is_kept: "kept-prefix.yaml",
    no_site_has_a_grant: "no-grants.yaml",
    a_lease_inside_the_mesh: "lan-inside-the-mesh.yaml",
    a_prefix_outside_of_its_grant: "refused.yaml",
    a_node_that_says_nothing: "not-published.yaml",
    pods_beside_the_host: "pods-beside-the-host.yaml",
    a_policy_denies: "policy-denies.yaml",
    a_host_without_wireguard: "no-wireguard.yaml",
    an_agent_that_is_down: "agent-down.yaml",
    a_registry_that_is_away: "registry-away.yaml",
    a_configuration_with_a_fault: "wrong-configuration.yaml",
    few_file_descriptors: "few-descriptors.yaml",
    a_second_host_with_a_taken_name: "duplicate-name.yaml",
    a_cloned_host: "clone.yaml",
    a_node_that_its_peers_refuse: "refused-by-peers.yaml",
    a_mistyped_mesh: "another-mesh.yaml",
    an_api_that_is_away: "api-unreachable.yaml",
    an_api_that_refuses: "api-refuses.yaml",
}
