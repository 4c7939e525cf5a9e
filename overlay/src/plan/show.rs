//! A plan in the forms that other tools read.

use std::fmt::Write as _;

use crate::plan::MeshPlan;
use crate::route::RouteKind;

impl MeshPlan {
    /// As `wg setconf` takes it, without the private key.
    pub fn to_wg(&self) -> String {
        let mut text = format!("[Interface]\nListenPort = {}\n", self.device.listen_port);
        for (name, peer) in self.peers.iter().filter(|(_, peer)| peer.encrypted) {
            let allowed: Vec<String> = peer.allowed_ips.iter().map(ToString::to_string).collect();
            let _ = write!(
                text,
                "\n# {name} ({})\n[Peer]\nPublicKey = {}\nAllowedIPs = {}\n",
                peer.site,
                peer.public_key,
                allowed.join(", ")
            );
            if let Some(endpoint) = peer.candidates.first() {
                let _ = writeln!(text, "Endpoint = {endpoint}");
            }
            if let Some(keepalive) = self.device.peers.get(&peer.public_key).and_then(|p| p.keepalive) {
                let _ = writeln!(text, "PersistentKeepalive = {keepalive}");
            }
        }
        text
    }

    /// As `ip -batch` takes it.
    pub fn to_routes(&self) -> String {
        let table = &self.routes;
        let routing = table.routing;
        let mut text = String::new();
        for route in &table.routes {
            let metric = route.kind.metric();
            let tail = format!("table {} proto {} metric {metric}", routing.table, routing.protocol);
            let _ = match route.kind {
                RouteKind::Mesh { mtu } => {
                    writeln!(text, "route replace {} dev {} {tail} mtu {mtu}", route.to, table.interface)
                }
                RouteKind::Cleartext { device, via, source, mtu } => {
                    let source = source.map(|ip| format!(" src {ip}")).unwrap_or_default();
                    writeln!(
                        text,
                        "route replace {} via inet6 {via} dev {device}{source} {tail} mtu {mtu}",
                        route.to
                    )
                }
                RouteKind::Throw => writeln!(text, "route replace throw {} {tail}", route.to),
                RouteKind::Blackhole => writeln!(text, "route replace blackhole {} {tail}", route.to),
            };
        }
        for family in ["-4", "-6"] {
            let _ = writeln!(text, "{family} rule add priority {} table {}", routing.priority, routing.table);
        }
        for net in &table.own {
            let (family, length) = (if net.addr().is_ipv4() { "-4" } else { "-6" }, net.prefix_len());
            let (first, second) = (routing.priority + 1, routing.priority + 2);
            let only = length.saturating_sub(1);
            let _ = writeln!(
                text,
                "{family} rule add priority {first} to {net} table main suppress_prefixlength {only}\n\
                 {family} rule add priority {second} to {net} blackhole"
            );
        }
        text
    }

    /// As Graphviz takes it: this node, its peers by site, and how each is reached.
    pub fn to_dot(&self) -> String {
        let mut text = format!("graph mesh {{\n  node [shape=box];\n  \"{}\" [style=bold];\n", self.node);
        let mut sites: Vec<_> = self.peers.values().map(|p| &p.site).collect();
        sites.sort();
        sites.dedup();
        for site in sites {
            let _ = writeln!(text, "  subgraph \"cluster_{site}\" {{\n    label=\"{site}\";");
            for (name, _) in self.peers.iter().filter(|(_, p)| p.site == *site) {
                let _ = writeln!(text, "    \"{name}\";");
            }
            text.push_str("  }\n");
        }
        for (name, peer) in &self.peers {
            let via = peer.candidates.first().map_or("it dials us".to_owned(), ToString::to_string);
            let _ = writeln!(text, "  \"{}\" -- \"{name}\" [label=\"{via}, MTU {}\"];", self.node, peer.mtu);
        }
        text.push_str("}\n");
        text
    }
}
