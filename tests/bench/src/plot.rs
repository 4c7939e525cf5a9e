//! A picture of the main suite: each number beside wireguard-go's, as SVG.

use std::fmt::Write as _;

use crate::bars::ratio;
use crate::metric::METRICS;
use crate::results::Results;

const BASE: &str = "wireguard-go";
const SUITE: &str = "v4";
const SHOWN: &[&str] = &[
    "tcp1_gbps",
    "tcp4_gbps",
    "reverse_gbps",
    "bidir_gbps",
    "udp64_kpps",
    "udp1200_kpps",
    "tcp1_cpu_s_per_gb",
    "udp64_cpu_us",
    "ping_avg_ms",
    "ping_loaded_avg_ms",
    "rss_loaded_mib",
];
// Distinguishable with any colour vision (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#999999", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"];

const LEFT: f64 = 300.0;
const WIDTH: f64 = 520.0;
const BAR: f64 = 13.0;
const GAP: f64 = 14.0;
const TOP: f64 = 70.0;

/// Draws grouped bars, wireguard-go being 1. What was not measured is left out and named.
pub(crate) fn render(results: &Results) -> String {
    let names: Vec<&str> = results.programs.iter().map(|program| program.name.as_str()).collect();
    let groups: Vec<(String, Vec<Option<f64>>)> = SHOWN
        .iter()
        .filter_map(|id| METRICS.iter().find(|metric| metric.id == *id))
        .map(|metric| {
            let of = |program: &str| results.summary(SUITE, metric.id, program).median();
            let direction = if metric.higher_is_better { "more is better" } else { "less is better" };
            let ratios = names.iter().map(|name| ratio(of(name), of(BASE))).collect();
            (format!("{} ({direction})", metric.title), ratios)
        })
        .collect();
    let largest =
        groups.iter().flat_map(|(_, ratios)| ratios.iter().flatten()).fold(1.0f64, |a, b| a.max(*b));
    let scale = WIDTH / (largest * 1.08);
    let group_height = names.len().max(1) as f64 * BAR + GAP;
    let height = TOP + groups.len() as f64 * group_height + 30.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{height}\" viewBox=\"0 0 {0} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">Medians beside {BASE} = 1</text>\n\
         <text x=\"10\" y=\"40\" fill=\"#555\">{1}</text>\n",
        LEFT + WIDTH + 50.0,
        escape(&format!(
            "{}, {} cores of {}, Linux {}",
            results.date, results.machine.cores, results.machine.cpu, results.machine.kernel
        ))
    );
    for (at, name) in names.iter().enumerate() {
        let x = LEFT + 130.0 * at as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"48\" width=\"10\" height=\"10\" fill=\"{}\"/><text x=\"{}\" y=\"57\">{}</text>",
            COLOURS[at % COLOURS.len()],
            x + 14.0,
            escape(name)
        );
    }
    for (at, (title, ratios)) in groups.iter().enumerate() {
        let y = TOP + at as f64 * group_height;
        let middle = y + (group_height - GAP) / 2.0 + 4.0;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            escape(title)
        );
        for (nth, ratio) in ratios.iter().enumerate() {
            let y = y + nth as f64 * BAR;
            let label = ratio.map_or("not measured".into(), |ratio| format!("{ratio:.2}"));
            let length = ratio.unwrap_or(0.0) * scale;
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" font-size=\"9\">{label}</text>",
                BAR - 2.0,
                COLOURS[nth % COLOURS.len()],
                LEFT + length + 4.0,
                y + 9.0
            );
        }
    }
    let one = LEFT + scale;
    let _ = writeln!(
        svg,
        "<line x1=\"{one:.1}\" y1=\"{TOP}\" x2=\"{one:.1}\" y2=\"{}\" stroke=\"#333\" stroke-dasharray=\"3 3\"/>\n</svg>",
        height - 25.0
    );
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    #[test]
    fn missing_data_is_drawn_as_missing() {
        assert!(render(&results(&[])).ends_with("</svg>\n"));
        let svg = render(&results(&[
            ("v4", "tcp1_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp1_gbps", "wireguard-go", Some(2.5)),
            ("v4", "tcp4_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp4_gbps", "wireguard-go", None),
            ("v4", "udp64_kpps", "a<b", Some(f64::NAN)),
        ]));
        assert!(svg.contains(">2.00</text>") && svg.contains(">not measured</text>"));
        assert!(svg.contains("a&lt;b") && !svg.contains("NaN") && !svg.contains("inf"));
    }
}
