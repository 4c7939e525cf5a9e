//! JUnit XML, as continuous-integration servers read it.

use std::fmt::Write;

use crate::report::{Outcome, Report};

/// One `testsuite` with a `testcase` per step.
pub fn render(report: &Report) -> String {
    let count = |outcome| report.steps.iter().filter(|step| step.outcome == outcome).count();
    let failed = count(Outcome::Failed) + count(Outcome::Interrupted);
    let (name, total, skipped) = (escape(&report.scenario), report.steps.len(), count(Outcome::Skipped));
    let time = report.duration.as_secs_f64();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let counts = format!(
        "tests=\"{total}\" failures=\"{failed}\" errors=\"0\" skipped=\"{skipped}\" time=\"{time:.3}\""
    );
    // Writing to a String cannot fail.
    let _ = writeln!(xml, "<testsuites name=\"meshlab\" {counts}>\n  <testsuite name=\"{name}\" {counts}>");
    for step in &report.steps {
        let _ = write!(
            xml,
            "    <testcase classname=\"{name}.{}\" name=\"{}\" time=\"{:.3}\"",
            escape(&step.action),
            escape(&step.name),
            step.duration.as_secs_f64()
        );
        let body = match step.outcome {
            Outcome::Passed if step.detail.is_empty() => String::new(),
            Outcome::Passed => format!("      <system-out>{}</system-out>\n", escape(&step.detail)),
            Outcome::Skipped => "      <skipped message=\"an earlier step failed\"/>\n".to_owned(),
            Outcome::Failed | Outcome::Interrupted => {
                let message = step.failures.first().unwrap_or(&step.detail);
                format!(
                    "      <failure message=\"{}\" type=\"{}\">{}</failure>\n",
                    escape(message),
                    escape(&step.action),
                    escape(&step.failures.join("\n"))
                )
            }
        };
        if body.is_empty() {
            xml.push_str("/>\n");
        } else {
            let _ = write!(xml, ">\n{body}    </testcase>\n");
        }
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

/// Escapes text for elements and attributes; characters that XML 1.0 cannot hold at all become U+FFFD.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push_str("&#9;"),
            '\r' => out.push_str("&#13;"),
            c if (c as u32) < 0x20 || matches!(c, '\u{FFFE}' | '\u{FFFF}') => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::report::StepReport;

    fn step(name: &str, outcome: Outcome, failures: &[&str]) -> StepReport {
        StepReport {
            name: name.into(),
            action: "expect".into(),
            outcome,
            duration: Duration::from_millis(1500),
            detail: "24 of 24 probes".into(),
            failures: failures.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    #[test]
    fn hostile_names_and_output_stay_text() {
        let report = Report {
            scenario: "demo".into(),
            description: None,
            verdict: Outcome::Failed,
            duration: Duration::from_secs(3),
            steps: vec![
                step("a < b & \"c\"", Outcome::Passed, &[]),
                step("broken", Outcome::Failed, &["]]></failure><x y='1'>\u{1b}[31m\u{0}", "second"]),
                step("never", Outcome::Skipped, &[]),
            ],
            dump: None,
            picture: Default::default(),
        };
        let xml = render(&report);
        assert!(xml.contains("name=\"a &lt; b &amp; &quot;c&quot;\" time=\"1.500\""), "{xml}");
        assert!(xml.contains("tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\""), "{xml}");
        assert!(!xml.contains("<x") && !xml.contains('\u{1b}') && !xml.contains('\u{0}'), "{xml}");
        assert_eq!(xml.matches("<testcase").count(), 3);
        assert_eq!(xml.matches("<testcase").count(), xml.matches("</testcase>").count());
    }
}
