//! One suite for all backends: the pretended ones in memory, and the real ones each in a fresh namespace.

// All of this is tests.
#![allow(clippy::unwrap_used)]

#[path = "backends/cleartext.rs"]
mod cleartext;
#[path = "backends/lab.rs"]
mod lab;
#[path = "backends/namespace.rs"]
mod namespace;
#[path = "backends/net.rs"]
mod net;
#[path = "backends/surroundings.rs"]
mod surroundings;
#[path = "backends/wireguard.rs"]
mod wireguard;

use std::future::Future;
use std::io::Write as _;

use lab::{Kind, Lab};

fn run<F: Future<Output = ()>>(kind: Kind, module: &str, case: &str, body: impl FnOnce(Lab) -> F) {
    let test = format!("{module}::{case}");
    if kind == Kind::Kernel && !mesh_overlay::wireguard::kernel::available() {
        // Named and known, so not a failure under CI: `make kernel-test` runs it on a kernel that has it.
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: this kernel has no WireGuard");
        return;
    }
    let programs: Vec<&str> = kind.program().into_iter().collect();
    if kind != Kind::Fake && !namespace::inside(&test, &programs) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { body(Lab::new(kind)).await });
}

macro_rules! suite {
    ($module:ident, $kind:expr, $($from:ident::$case:ident,)*) => {
        mod $module {
            $(
                #[test]
                fn $case() {
                    super::run($kind, stringify!($module), stringify!($case), super::$from::$case);
                }
            )*
        }
    };
}

macro_rules! suite_on_all {
    ($($from:ident::$case:ident,)*) => {
        suite!(on_fake, super::Kind::Fake, $($from::$case,)*);
        suite!(on_wireguard_go, super::Kind::WireguardGo, $($from::$case,)*);
        suite!(on_mesh_wg, super::Kind::MeshWg, $($from::$case,)*);
        suite!(on_kernel, super::Kind::Kernel, $($from::$case,)*);
    };
}

suite_on_all!(
    wireguard::a_second_pass_writes_nothing,
    wireguard::a_restarted_agent_adopts_what_it_finds,
    wireguard::adding_a_peer_touches_no_other,
    wireguard::a_removed_peer_is_gone,
    wireguard::an_allowed_ip_moves_to_the_peer_that_is_given_it,
    wireguard::a_roamed_endpoint_is_left_alone,
    wireguard::keepalive_zero_ends_it,
    wireguard::a_wedged_device_is_replaced,
    wireguard::a_device_that_stalls_a_moment_is_kept,
    wireguard::a_living_device_that_hangs_up_is_kept_a_while,
    wireguard::a_device_without_our_mark_is_ours_by_its_key_alone,
    wireguard::a_dead_device_is_made_again,
    wireguard::a_device_whose_link_was_deleted_is_made_again,
    wireguard::a_foreign_interface_is_refused_and_left_alone,
    wireguard::a_taken_port_is_named,
    wireguard::removing_takes_the_device_and_its_routes,
    wireguard::a_thousand_peers_are_set_in_time,
    net::a_guard_is_replaced_by_the_next,
    net::a_changed_guard_is_noticed,
    net::a_mesh_route_goes_with_its_device_and_the_blackhole_stays,
    net::a_route_of_another_mtu_replaces_the_one_before,
    net::stray_routes_of_ours_are_seen_and_removed,
    net::setting_a_rule_or_address_twice_is_no_error,
    net::removing_all_takes_our_routes_and_rules_alone,
    net::a_vxlan_device_is_made_kept_changed_and_removed,
    cleartext::a_route_in_clear_is_set_known_again_and_removed,
);

// What only a real kernel shows, and no device has a part in.
suite!(
    on_host,
    super::Kind::WireguardGo,
    net::no_packet_slips_out_while_the_guard_is_replaced,
    net::a_guard_of_every_shape_is_known_again,
    net::a_vxlan_device_of_somebody_else_is_left_alone_and_their_port_is_shared,
    net::a_packet_to_a_pod_that_is_gone_does_not_leave_in_clear,
    net::nobody_on_the_underlay_speaks_as_one_of_our_pods,
    net::own_prefixes_pass_no_new_interface,
    net::a_protected_address_inside_of_the_mesh_passes_in_clear,
    cleartext::what_is_exempt_passes_until_its_end,
    cleartext::vxlan_in_clear_comes_in_from_those_that_are_exempt_only,
    cleartext::vxlan_in_clear_does_not_come_in_in_pieces,
    cleartext::a_guard_of_before_the_outer_chain_is_replaced_step_by_step,
    wireguard::what_remains_of_the_other_kind_is_no_success,
    wireguard::a_device_that_somebody_else_runs_is_waited_for_and_left_to_them,
    wireguard::a_port_that_the_device_before_still_holds_is_waited_for,
    net::a_missing_nft_names_its_package,
    net::the_underlay_is_what_the_default_routes_leave_through,
    net::a_host_without_ipv6_is_told_so,
    net::a_watch_tells_of_changes_and_survives_too_many,
    surroundings::interfaces_outside_are_told_from_those_of_pods,
    surroundings::rules_and_routes_of_others_are_read,
    surroundings::links_of_pods_beside_the_host_are_seen_and_counted,
);
