//! Our routing table: routes through the mesh, and what catches packets when those are gone.
//!
//! Every mesh prefix has a blackhole at a worse metric. When the interface vanishes its routes vanish with it,
//! and the packets fall into the blackhole instead of onto the default route.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Serialize, Serializer};

use crate::local::{InterfaceName, Routing};

/// What a route does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum RouteKind {
    /// Through the mesh interface.
    Mesh {
        /// Path MTU in bytes.
        mtu: u16,
    },
    /// In clear, through a VXLAN device, to a peer that the operator has exempted.
    Cleartext {
        /// The device.
        device: InterfaceName,
        /// The peer's address on it.
        via: Ipv6Addr,
        /// Our mesh address, which the peer knows us by.
        source: Option<IpAddr>,
        /// Path MTU in bytes.
        mtu: u16,
    },
    /// On to the next table.
    Throw,
    /// Nowhere.
    Blackhole,
}

impl RouteKind {
    /// Its metric; the lowest wins.
    pub fn metric(&self) -> u32 {
        match self {
            Self::Mesh { .. } | Self::Cleartext { .. } => 100,
            Self::Throw => 200,
            Self::Blackhole => 1_000_000,
        }
    }

    /// Whether it leads anywhere.
    pub fn carries(&self) -> bool {
        matches!(self, Self::Mesh { .. } | Self::Cleartext { .. })
    }
}

/// One route of our table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Route {
    /// Where to.
    pub to: IpNet,
    /// What happens.
    #[serde(flatten)]
    pub kind: RouteKind,
}

impl Route {
    /// A route.
    pub fn new(to: IpNet, kind: RouteKind) -> Self {
        Self { to, kind }
    }
}

/// Our routing table as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteTable {
    /// Under which numbers it lives.
    #[serde(serialize_with = "routing")]
    pub routing: Routing,
    /// The mesh interface.
    pub interface: InterfaceName,
    /// The routes.
    pub routes: BTreeSet<Route>,
    /// The prefixes of this node's own pods.
    #[serde(skip)]
    pub own: BTreeSet<IpNet>,
}

/// A rule that keeps a prefix of this node's own pods to routes of its own. A route is asked for in table
/// `main`, and counts only if it is no wider than the prefix: a default route, halves of one, a company's
/// 10.0.0.0/8 or another VPN's networks lead packets for a pod that is gone away from this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum OwnRule {
    /// Asks the main table (`suppress_prefixlength`, ip-rule(8)); at our priority plus 1.
    Specific(IpNet),
    /// Lets what found nothing go nowhere; at our priority plus 2.
    Nowhere(IpNet),
}

impl OwnRule {
    /// How far behind the rule that consults our table it stands.
    pub fn offset(&self) -> u32 {
        match self {
            Self::Specific(_) => 1,
            Self::Nowhere(_) => 2,
        }
    }

    /// The prefix.
    pub fn to(&self) -> IpNet {
        match self {
            Self::Specific(net) | Self::Nowhere(net) => *net,
        }
    }
}

fn routing<S: Serializer>(routing: &Routing, serializer: S) -> Result<S::Ok, S::Error> {
    (routing.table, routing.priority, routing.protocol).serialize(serializer)
}

/// One change to our routing table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteChange {
    /// Consult our table, for one family.
    AddRule {
        /// IPv6 instead of IPv4.
        v6: bool,
    },
    /// Add a rule for a prefix of our own.
    AddOwn(OwnRule),
    /// Remove one.
    RemoveOwn(OwnRule),
    /// Add a route, or replace the one of the same prefix and metric.
    Set(Route),
    /// Take a route away.
    Remove(Route),
    /// Take a route away that carries our mark but that no plan ever asks for.
    RemoveStray(StrayRoute),
}

/// A route of our protocol in our table that is none of [`RouteKind`]: another metric, type or interface. It could
/// win over ours, so it is never left standing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StrayRoute {
    /// Where to.
    pub to: IpNet,
    /// Its metric.
    pub metric: u32,
    /// Its type, as the kernel numbers them (`RTN_*`).
    pub kind: u8,
}

/// Our routing table as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedRoutes {
    /// Whether the rule stands for IPv4.
    pub rule_v4: bool,
    /// Whether the rule stands for IPv6.
    pub rule_v6: bool,
    /// The rules for prefixes of our own.
    pub own: BTreeSet<OwnRule>,
    /// The routes of our protocol in our table.
    pub routes: BTreeSet<Route>,
    /// Routes of our protocol in our table that no plan ever asks for.
    pub strays: BTreeSet<StrayRoute>,
}

impl RouteTable {
    /// The changes from `observed` to this table. Blackholes come first and go last. Where `up` is false the
    /// interface does not exist yet, and routes through it wait.
    pub fn diff(&self, observed: &ObservedRoutes, up: bool) -> Vec<RouteChange> {
        let mut changes = Vec::new();
        let (mesh, still): (Vec<Route>, Vec<Route>) =
            (self.routes.difference(&observed.routes)).copied().partition(|route| route.kind.carries());
        // `throw` before blackhole: our own pods are never cut off, not even for a moment.
        let (throws, holes): (Vec<Route>, Vec<Route>) =
            still.into_iter().partition(|route| route.kind == RouteKind::Throw);
        changes.extend(throws.into_iter().chain(holes).map(RouteChange::Set));
        changes.extend((!observed.rule_v4).then_some(RouteChange::AddRule { v6: false }));
        changes.extend((!observed.rule_v6).then_some(RouteChange::AddRule { v6: true }));
        let own: BTreeSet<OwnRule> =
            self.own.iter().flat_map(|net| [OwnRule::Specific(*net), OwnRule::Nowhere(*net)]).collect();
        // The way to pods stands before what ends all others, and goes after it.
        changes.extend(own.difference(&observed.own).copied().map(RouteChange::AddOwn));
        changes.extend(observed.strays.iter().copied().map(RouteChange::RemoveStray));
        if up {
            changes.extend(mesh.into_iter().map(RouteChange::Set));
        }
        let slot = |route: &Route| (route.to, route.kind.metric());
        let kept: BTreeSet<_> = self.routes.iter().map(slot).collect();
        let mut surplus: Vec<Route> =
            observed.routes.difference(&self.routes).filter(|r| !kept.contains(&slot(r))).copied().collect();
        let mut former: Vec<OwnRule> = observed.own.difference(&own).copied().collect();
        former.sort_by_key(|rule| std::cmp::Reverse(rule.offset()));
        changes.extend(former.into_iter().map(RouteChange::RemoveOwn));
        surplus.sort_by_key(|route| route.kind.metric());
        changes.extend(surplus.into_iter().map(RouteChange::Remove));
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn table(routes: &[Route]) -> RouteTable {
        RouteTable {
            routing: Routing::default(),
            interface: "sennit0".parse().unwrap(),
            routes: routes.iter().copied().collect(),
            own: BTreeSet::new(),
        }
    }

    fn three() -> RouteTable {
        table(&[
            Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1420 }),
            Route::new(net("10.2.0.0/24"), RouteKind::Blackhole),
            Route::new(net("10.1.0.0/24"), RouteKind::Throw),
        ])
    }

    fn standing(routes: BTreeSet<Route>) -> ObservedRoutes {
        ObservedRoutes { rule_v4: true, rule_v6: true, routes, ..ObservedRoutes::default() }
    }

    #[test]
    fn a_stray_route_goes_once_the_blackholes_stand() {
        let stray = StrayRoute { to: net("10.2.0.0/24"), metric: 5, kind: 1 };
        let observed = ObservedRoutes { strays: BTreeSet::from([stray]), ..ObservedRoutes::default() };
        let changes = three().diff(&observed, true);
        let at = |wanted: &RouteChange| changes.iter().position(|change| change == wanted).unwrap();
        let hole = RouteChange::Set(Route::new(net("10.2.0.0/24"), RouteKind::Blackhole));
        let mesh = RouteChange::Set(Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1420 }));
        let gone = at(&RouteChange::RemoveStray(stray));
        assert!(at(&hole) < gone && gone < at(&mesh), "{changes:?}");
    }

    #[test]
    fn blackholes_stand_before_the_rule_and_the_mesh_routes() {
        let changes = three().diff(&ObservedRoutes::default(), true);
        assert_eq!(
            changes,
            [
                RouteChange::Set(Route::new(net("10.1.0.0/24"), RouteKind::Throw)),
                RouteChange::Set(Route::new(net("10.2.0.0/24"), RouteKind::Blackhole)),
                RouteChange::AddRule { v6: false },
                RouteChange::AddRule { v6: true },
                RouteChange::Set(Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1420 })),
            ]
        );
        assert!(
            !three()
                .diff(&ObservedRoutes::default(), false)
                .iter()
                .any(|c| matches!(c, RouteChange::Set(Route { kind: RouteKind::Mesh { .. }, .. })))
        );
    }

    #[test]
    fn own_prefixes_get_their_way_before_their_end() {
        let mut table = three();
        table.own = BTreeSet::from([net("10.1.0.0/24")]);
        let changes = table.diff(&standing(three().routes), true);
        let rules = [OwnRule::Specific(net("10.1.0.0/24")), OwnRule::Nowhere(net("10.1.0.0/24"))];
        assert_eq!(changes, rules.map(RouteChange::AddOwn));
        let observed = ObservedRoutes { own: rules.into(), ..standing(three().routes) };
        assert_eq!(table.diff(&observed, true), []);
        let [specific, nowhere] = rules.map(RouteChange::RemoveOwn);
        assert_eq!(three().diff(&observed, true), [nowhere, specific]);
    }

    #[test]
    fn a_table_that_is_right_is_left_alone() {
        let observed = standing(three().routes);
        assert_eq!(three().diff(&observed, true), []);
    }

    #[test]
    fn a_changed_mtu_replaces_the_route_without_taking_it_away() {
        let mut routes = three().routes;
        routes.remove(&Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1420 }));
        routes.insert(Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1320 }));
        let observed = standing(routes);
        let wanted = Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1420 });
        assert_eq!(three().diff(&observed, true), [RouteChange::Set(wanted)]);
    }

    #[test]
    fn the_blackhole_of_a_prefix_goes_after_its_mesh_route() {
        let observed = standing(three().routes);
        let changes = table(&[]).diff(&observed, true);
        assert_eq!(changes.len(), 3);
        assert_eq!(
            changes[0],
            RouteChange::Remove(Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1420 }))
        );
        assert_eq!(changes[2], RouteChange::Remove(Route::new(net("10.2.0.0/24"), RouteKind::Blackhole)));
    }
}
