//! The lab at a glance, for a person: map, reachability, tunnels, what the wire showed. Data in, text out.

mod map;

use std::fmt::Write;

use serde::Serialize;

use crate::scenario::Family;

/// Everything that the picture shows; parts that were not measured stay empty and are left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Picture {
    /// The scenario's name.
    pub name: String,
    /// The sites in order.
    pub sites: Vec<SiteView>,
    /// Live tunnels per pair of sites; a pair of a site with itself counts its inner tunnels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tunnels: Vec<TunnelCount>,
    /// The last pod matrix of each family.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matrices: Vec<Matrix>,
    /// Ages of the handshakes in seconds, one per direction.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub handshake_ages: Vec<f64>,
    /// Bytes that all nodes sent through tunnels.
    pub encrypted_bytes: u64,
    /// The recorded links.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<LinkView>,
    /// Seconds from the agents' start until every pair had a handshake.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_to_handshakes: Option<f64>,
    /// Seconds from the agents' start until every pod reached every pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_to_reachability: Option<f64>,
    /// The streams that ran.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamView>,
}

/// A site on the map.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteView {
    /// The site's name.
    pub name: String,
    /// Its nodes' names.
    pub nodes: Vec<String>,
    /// Its pods, on all nodes.
    pub pods: usize,
    /// Bytes.
    pub mtu: u16,
    /// `none`, `cone` or `symmetric`.
    pub nat: String,
    /// Its pod prefixes.
    pub prefixes: Vec<String>,
}

/// Tunnels between two sites.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TunnelCount {
    /// One site.
    pub a: String,
    /// The other.
    pub b: String,
    /// Pairs of nodes with a live tunnel.
    pub up: usize,
    /// All pairs of nodes.
    pub total: usize,
}

/// Who reaches whom, pod by pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// The family that was probed.
    pub family: Family,
    /// The pods, in the order of rows and columns.
    pub pods: Vec<String>,
    /// `rows[from][to]`: whether it was reached; none where it was not probed.
    pub rows: Vec<Vec<Option<bool>>>,
}

/// What one recorded link showed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkView {
    /// The link's name.
    pub name: String,
    /// Frames in both directions.
    pub packets: u64,
    /// Of these WireGuard.
    pub wireguard: u64,
    /// Frames with the marker.
    pub marker_hits: u64,
    /// Frames with a pod address outside any tunnel.
    pub inner_addresses: u64,
    /// The first frame with the marker: time, protocol, addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_marked: Option<String>,
    /// The first frame with a pod address outside any tunnel, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_inner: Option<String>,
}

/// A stream and what it lost.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamView {
    /// The stream's name.
    pub name: String,
    /// Packets sent.
    pub sent: u64,
    /// Packets unanswered.
    pub lost: u64,
    /// The longest silence in milliseconds.
    pub longest_gap_ms: f64,
}

impl Picture {
    /// The picture as text, at most about 100 columns wide.
    pub fn render(&self) -> String {
        let mut text = map::render(self);
        match self.matrices.as_slice() {
            // Two equal matrices would only hide that they are equal.
            [a, b] if a.pods == b.pods && a.rows == b.rows => {
                render_matrix(&mut text, a, &format!("{} and {}", a.family.label(), b.family.label()));
            }
            matrices => {
                matrices.iter().for_each(|matrix| render_matrix(&mut text, matrix, matrix.family.label()))
            }
        }
        self.render_links(&mut text);
        for stream in &self.streams {
            let _ = writeln!(
                text,
                "stream {}: {} sent, {} lost, longest silence {:.0} ms",
                stream.name, stream.sent, stream.lost, stream.longest_gap_ms
            );
        }
        if !self.streams.is_empty() {
            text.push('\n');
        }
        self.render_figures(&mut text);
        text
    }

    fn render_links(&self, text: &mut String) {
        if self.links.is_empty() {
            return;
        }
        let width = self.links.iter().map(|link| link.name.len()).max().unwrap_or(0).max(16);
        let _ = writeln!(
            text,
            "{:<width$}  {:>9}  {:>9}  {:>11}  {:>13}",
            "on the underlay", "packets", "WireGuard", "marker hits", "pod addresses"
        );
        for link in &self.links {
            let LinkView { name, packets, wireguard, marker_hits, inner_addresses, .. } = link;
            let _ = writeln!(
                text,
                "{name:<width$}  {packets:>9}  {wireguard:>9}  {marker_hits:>11}  {inner_addresses:>13}"
            );
        }
        text.push('\n');
    }

    fn render_figures(&self, text: &mut String) {
        let (up, total) = self.handshake_pairs();
        if total > 0 {
            let _ = writeln!(text, "{up} of {total} node pairs with a handshake");
        }
        for matrix in &self.matrices {
            let (reached, probed) = matrix.count();
            let _ = writeln!(text, "{reached} of {probed} pod pairs reached over {}", matrix.family.label());
        }
        if let Some((least, median, most)) = spread(&self.handshake_ages) {
            let _ =
                writeln!(text, "handshake age {least:.0} / {median:.0} / {most:.0} s (min / median / max)");
        }
        if total > 0 {
            let _ = writeln!(text, "{} sent through the tunnels", bytes(self.encrypted_bytes));
        }
        if !self.links.is_empty() {
            let sum = |of: fn(&LinkView) -> u64| self.links.iter().map(of).sum::<u64>();
            let _ = writeln!(
                text,
                "{} packets seen on {}, {} of them WireGuard, {} with the marker in clear, \
                 {} with a pod address in clear",
                sum(|l| l.packets),
                crate::report::count(self.links.len(), "underlay link"),
                sum(|l| l.wireguard),
                sum(|l| l.marker_hits),
                sum(|l| l.inner_addresses)
            );
        }
        match (self.seconds_to_handshakes, self.seconds_to_reachability) {
            (Some(handshakes), Some(pods)) => {
                let _ = writeln!(
                    text,
                    "agents started -> all handshakes {handshakes:.1} s -> all pods {pods:.1} s"
                );
            }
            (Some(seconds), None) => {
                let _ = writeln!(text, "agents started -> all handshakes {seconds:.1} s");
            }
            (None, Some(seconds)) => {
                let _ = writeln!(text, "agents started -> all pods reachable {seconds:.1} s");
            }
            (None, None) => {}
        }
    }

    /// Node pairs with a live tunnel, and all node pairs.
    pub fn handshake_pairs(&self) -> (usize, usize) {
        self.tunnels.iter().fold((0, 0), |(up, total), count| (up + count.up, total + count.total))
    }
}

impl Matrix {
    /// An empty matrix over these pods.
    pub fn new(family: Family, pods: Vec<String>) -> Self {
        let rows = vec![vec![None; pods.len()]; pods.len()];
        Self { family, pods, rows }
    }

    /// Notes one probe; names that are not in the matrix are passed over.
    pub fn note(&mut self, from: &str, to: &str, reached: bool) {
        let position = |name: &str| self.pods.iter().position(|pod| pod == name);
        if let (Some(row), Some(column)) = (position(from), position(to)) {
            self.rows[row][column] = Some(reached);
        }
    }

    /// Pairs reached, and pairs probed.
    pub fn count(&self) -> (usize, usize) {
        let probed = self.rows.iter().flatten().flatten();
        probed.fold((0, 0), |(reached, all), hit| (reached + usize::from(*hit), all + 1))
    }
}

/// A row per pod; columns in groups per node. Too wide a matrix shows only the rows with gaps.
fn render_matrix(text: &mut String, matrix: &Matrix, families: &str) {
    let (reached, probed) = matrix.count();
    let _ = writeln!(
        text,
        "pods over {families}: {reached} of {probed} pairs   (o reached, X not, - not probed, \\ itself)"
    );
    let width = matrix.pods.iter().map(|pod| pod.len()).max().unwrap_or(0);
    let narrow = matrix.pods.len() <= 48;
    let mut hidden = 0;
    for (row, from) in matrix.pods.iter().enumerate() {
        if !narrow && !matrix.rows[row].contains(&Some(false)) {
            hidden += 1;
            continue;
        }
        let mut line = format!("  {from:<width$}  ");
        for (column, to) in matrix.pods.iter().enumerate() {
            if column > 0 && node_of(to) != node_of(&matrix.pods[column - 1]) {
                line.push(' ');
            }
            line.push(match matrix.rows[row][column] {
                _ if row == column => '\\',
                Some(true) => 'o',
                Some(false) => 'X',
                None => '-',
            });
        }
        if narrow {
            let _ = writeln!(text, "{line}");
        } else {
            let missing = matrix.rows[row].iter().filter(|hit| **hit == Some(false)).count();
            let _ = writeln!(text, "  {from:<width$}  misses {missing}");
        }
    }
    if hidden > 0 {
        let _ = writeln!(text, "  {hidden} pods reach every pod");
    }
    text.push('\n');
}

fn node_of(pod: &str) -> &str {
    pod.rsplit_once("-pod-").map_or(pod, |(node, _)| node)
}

fn spread(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some((*sorted.first()?, sorted[sorted.len() / 2], *sorted.last()?))
}

fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests;
