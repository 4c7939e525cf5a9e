//! `capture` and `assertNoCleartext`.

use netlab::{CaptureSpec, Link};

use super::{Trouble, Verdict, shortened};
use crate::picture::LinkView;
use crate::report::count;
use crate::scenario::step::NoCleartext;
use crate::stage::{MARKER, Recording, Stage};

/// Starts recording every node's link to its LAN and every router's uplink; ends earlier recordings.
pub(super) fn start(stage: &mut Stage) -> Verdict {
    stage.recordings.clear();
    let folder = stage.lab.shared_dir().join("recordings");
    std::fs::create_dir_all(&folder)
        .map_err(|error| Trouble::failed(format!("cannot make {}: {error}", folder.display())))?;
    let mut links: Vec<(String, Link)> = Vec::new();
    for site in &stage.layout.sites {
        links.push((format!("{} uplink", site.name), stage.lab.site(&site.name)?.uplink().clone()));
        for node in &site.nodes {
            links.push((
                format!("{} LAN, {}", site.name, node.name),
                stage.lab.host(&node.name)?.link().clone(),
            ));
        }
    }
    for (name, link) in links {
        let pcap = folder.join(format!("{}.pcap", name.replace([' ', ','], "-").replace("--", "-")));
        let spec = CaptureSpec {
            markers: vec![MARKER.to_vec()],
            pcap: Some(pcap.clone()),
            wireguard_ports: stage.wireguard_ports.clone(),
            ..CaptureSpec::new()
        };
        let capture = link.capture(spec)?;
        stage.recordings.push(Recording { name, pcap, capture });
    }
    Ok(format!("{} recorded", count(stage.recordings.len(), "link")))
}

/// Ends the recordings and judges them.
pub(super) fn assert_no_cleartext(stage: &mut Stage, bounds: NoCleartext) -> Verdict {
    if stage.recordings.is_empty() {
        return Err(Trouble::failed("nothing is recorded any more; put a new `capture: underlay` before"));
    }
    let views = stage.stop_recordings()?;
    let failures: Vec<String> = views.iter().flat_map(|view| complaints(view, bounds)).collect();
    let packets: u64 = views.iter().map(|view| view.packets).sum();
    let encrypted: u64 = views.iter().map(|view| view.wireguard).sum();
    let links = views.len();
    stage.picture.links = views;
    if failures.is_empty() {
        Ok(format!(
            "{packets} packets on {}, {encrypted} encrypted, marker seen 0 times",
            count(links, "link")
        ))
    } else {
        Err(Trouble::Failed(shortened(failures)))
    }
}

fn complaints(view: &LinkView, bounds: NoCleartext) -> Vec<String> {
    let LinkView { name, packets, wireguard, marker_hits, inner_addresses, first_marked, first_inner } = view;
    let first =
        |frame: &Option<String>| frame.as_ref().map_or(String::new(), |f| format!("; the first is {f}"));
    let mut found = Vec::new();
    if *marker_hits > 0 {
        found.push(format!(
            "{name}: {marker_hits} of {packets} frames carry the marker in clear{}",
            first(first_marked)
        ));
    }
    if *inner_addresses > 0 {
        found.push(format!(
            "{name}: {inner_addresses} of {packets} frames carry a pod address outside any tunnel{}",
            first(first_inner)
        ));
    }
    if *wireguard < bounds.min_encrypted {
        found.push(format!(
            "{name}: only {wireguard} encrypted packets were seen, at least {} are needed for the recording to \
             prove anything",
            bounds.min_encrypted
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_proves_nothing() {
        let view = LinkView { name: "aws uplink".into(), packets: 3, ..LinkView::default() };
        assert!(complaints(&view, NoCleartext::default())[0].contains("only 0 encrypted"));
        assert!(complaints(&LinkView { wireguard: 1, ..view }, NoCleartext::default()).is_empty());
    }

    #[test]
    fn a_marker_and_a_pod_address_are_told_apart() {
        let view = LinkView { wireguard: 9, marker_hits: 1, inner_addresses: 2, ..LinkView::default() };
        assert_eq!(complaints(&view, NoCleartext::default()).len(), 2);
    }
}
