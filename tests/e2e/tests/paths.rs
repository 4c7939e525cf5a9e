//! Paths that die, shrink, move and come back: the scenarios of deploy/examples/paths.

macro_rules! scenarios {
    ($($name:ident: $file:literal,)*) => {
        $(
            #[test]
            fn $name() {
                e2e::passes(stringify!($name), include_str!(concat!("../../../deploy/examples/paths/", $file)));
            }
        )*

        #[test]
        fn every_scenario_is_run() {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/examples/paths");
            let mut found: Vec<_> = std::fs::read_dir(folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            let mut run = vec![$($file),*];
            found.sort();
            run.sort_unstable();
            assert_eq!(found, run);
        }
    };
}

scenarios! {
    a_port_that_is_blocked_both_ways: "blocked-both-ways.yaml",
    a_port_that_is_blocked_one_way: "blocked-one-way.yaml",
    nothing_passes_but_vxlan: "only-vxlan-passes.yaml",
    nothing_passes_at_all: "all-blocked.yaml",
    a_firewall_that_flaps: "flapping-firewall.yaml",
    a_path_that_shrinks: "mtu-shrinks.yaml",
    a_nat_that_gives_other_ports: "nat-rebinding.yaml",
    two_nats: "two-nats.yaml",
    a_pair_that_is_exempt_from_encryption: "exemption.yaml",
    five_nodes_behind_one_nat: "five-behind-one-nat.yaml",
}
