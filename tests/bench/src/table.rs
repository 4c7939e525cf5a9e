//! Results as text.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use crate::bars::{outcomes, ratio};
use crate::metric::{METRICS, SUITES};
use crate::program::OURS;
use crate::results::{Results, Summary};

/// The whole report: machine, programs, a table for each suite, bars, failures.
pub(crate) fn render(results: &Results) -> String {
    let mut text = heading(results);
    for suite in SUITES {
        if results.suites().contains(suite.name) {
            let _ = write!(text, "\n{} ({})\n{}\n", suite.title, suite.name, table(results, suite.name));
        }
    }
    let outcomes = outcomes(results);
    if !outcomes.is_empty() {
        text += "\nBars\n";
    }
    for outcome in outcomes {
        text += &outcome.describe();
        text.push('\n');
    }
    let failures = results.failures();
    if !failures.is_empty() {
        text += "\nFailed runs\n";
    }
    for failure in failures {
        text += &failure;
        text.push('\n');
    }
    text
}

fn heading(results: &Results) -> String {
    let (machine, setup) = (&results.machine, &results.setup);
    let mut text = format!(
        "{}, {} cores of {}, Linux {}, TCP {}, {}\nMTU {}, {} rounds of {} s; medians, smallest and largest in parentheses\n",
        results.date,
        machine.cores,
        machine.cpu,
        machine.kernel,
        machine.congestion_control,
        machine.iperf3,
        setup.mtu,
        setup.rounds,
        setup.seconds
    );
    for program in &results.programs {
        let _ = writeln!(
            text,
            "{}: {}, sha256 {:.16}…{}",
            program.name,
            program.version,
            program.sha256,
            program.origin.as_ref().map_or(String::new(), |origin| format!(", {}", origin_name(origin)))
        );
    }
    if let Some(rate) = setup.udp_rate {
        let _ = writeln!(text, "fixed rate of 64 B packets: {rate} a second");
    }
    text
}

// The digests are in the file for whoever wants them.
fn origin_name(origin: &str) -> String {
    origin.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn table(results: &Results, suite: &str) -> Table {
    let names: Vec<&str> = results.programs.iter().map(|program| program.name.as_str()).collect();
    let others: Vec<&str> = names.iter().copied().filter(|name| *name != OURS).collect();
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let heads = ["", "unit"].into_iter().chain(names.iter().copied()).map(str::to_owned);
    table.set_header(heads.chain(others.iter().map(|other| format!("{OURS} : {other}"))));
    for metric in METRICS {
        let summary = |program: &str| results.summary(suite, metric.id, program);
        if names.iter().all(|name| summary(name) == Summary::default()) {
            continue;
        }
        let mut row = vec![metric.title.to_owned(), metric.unit.to_owned()];
        row.extend(names.iter().map(|name| cell(&summary(name))));
        let own = summary(OURS).median().filter(|_| metric.compared);
        row.extend(others.iter().map(|other| {
            ratio(own, summary(other).median()).map_or(String::new(), |ratio| format!("{ratio:.2}"))
        }));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn cell(summary: &Summary) -> String {
    let mut text = match (summary.median(), summary.range()) {
        (Some(median), Some((low, high))) if low < high => {
            format!("{} ({}–{})", number(median), number(low), number(high))
        }
        (Some(median), _) => number(median),
        _ => String::new(),
    };
    if summary.failures > 0 {
        let blank = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{blank}{} failed", summary.failures);
    }
    text
}

// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    #[test]
    fn failed_runs_show_as_failed_and_bars_as_they_came_out() {
        let text = render(&results(&[
            ("v4", "tcp1_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp1_gbps", "mesh-wg", Some(6.0)),
            ("v4", "tcp1_gbps", "wireguard-go", Some(2.5)),
            ("v4", "tcp4_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp4_gbps", "wireguard-go", None),
        ]));
        assert!(text.contains("5.50 (5.00–6.00)"), "{text}");
        assert!(text.contains("1 failed"), "{text}");
        assert!(text.contains("v4 wireguard-go round 1, tcp4_gbps: it broke"), "{text}");
        assert!(text.contains("met        2.20 ≥ 1.9  TCP, one stream, against wireguard-go"), "{text}");
        assert!(text.contains("unknown       - ≥ 1.9  TCP, four streams"), "{text}");
    }
}
