//! The map: a box per site, and a triangle of tunnel counts.

use std::fmt::Write;

use super::{Picture, SiteView};

const PER_ROW: usize = 4;

/// Boxes side by side, then the tunnels between each two sites.
pub(super) fn render(picture: &Picture) -> String {
    let mut text = format!("{}\n\n", picture.name);
    for row in picture.sites.chunks(PER_ROW) {
        let boxes: Vec<Vec<String>> = row.iter().map(|site| content(site, picture)).collect();
        let height = boxes.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = boxes
            .iter()
            .map(|lines| lines.iter().map(|line| line.chars().count()).max().unwrap_or(0))
            .collect();
        let border = |text: &mut String| {
            let edges: Vec<String> =
                widths.iter().map(|width| format!("+{}+", "-".repeat(width + 2))).collect();
            let _ = writeln!(text, "  {}", edges.join("  "));
        };
        border(&mut text);
        for line in 0..height {
            let cells: Vec<String> = boxes
                .iter()
                .zip(&widths)
                .map(|(lines, width)| format!("| {:<width$} |", lines.get(line).map_or("", String::as_str)))
                .collect();
            let _ = writeln!(text, "  {}", cells.join("  "));
        }
        border(&mut text);
    }
    text.push('\n');
    tunnels(&mut text, picture);
    text
}

fn content(site: &SiteView, picture: &Picture) -> Vec<String> {
    let mut lines = vec![site.name.clone(), String::new()];
    if site.nodes.len() <= 6 {
        lines.extend(site.nodes.iter().cloned());
    } else {
        lines.extend(site.nodes.iter().take(2).cloned());
        lines.push(format!("... {} nodes", site.nodes.len()));
    }
    lines.push(String::new());
    lines.push(crate::report::count(site.pods, "pod"));
    lines.extend(site.prefixes.iter().cloned());
    lines.push(format!("MTU {}", site.mtu));
    lines.push(if site.nat == "none" { "no NAT".to_owned() } else { format!("behind {} NAT", site.nat) });
    if let Some(inner) = count(picture, &site.name, &site.name) {
        lines.push(format!("tunnels {inner}"));
    }
    lines
}

fn count(picture: &Picture, a: &str, b: &str) -> Option<String> {
    picture
        .tunnels
        .iter()
        .find(|t| (t.a == a && t.b == b) || (t.a == b && t.b == a))
        .filter(|t| t.total > 0)
        .map(|t| format!("{}/{}", t.up, t.total))
}

/// `aws === azure  9/9`, one line per pair of sites; `=x=` where some are missing.
fn tunnels(text: &mut String, picture: &Picture) {
    let width = picture.sites.iter().map(|site| site.name.len()).max().unwrap_or(0);
    let mut lines = 0;
    for (index, a) in picture.sites.iter().enumerate() {
        for b in &picture.sites[index + 1..] {
            let between = picture
                .tunnels
                .iter()
                .find(|t| (t.a == a.name && t.b == b.name) || (t.a == b.name && t.b == a.name))
                .filter(|t| t.total > 0);
            if let Some(t) = between {
                let strand = if t.up == t.total {
                    "====="
                } else if t.up == 0 {
                    "  x  "
                } else {
                    "==x=="
                };
                let _ = writeln!(
                    text,
                    "  {:>width$} {strand} {:<width$}  {}/{} tunnels",
                    a.name, b.name, t.up, t.total
                );
                lines += 1;
            }
        }
    }
    if lines > 0 {
        text.push('\n');
    }
}
