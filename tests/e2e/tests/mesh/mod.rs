//! A scenario, put together from its parts.

#![allow(dead_code, reason = "each suite uses some of it")]

use std::fmt::Write as _;

/// A scenario under construction.
pub(crate) struct Mesh {
    test: String,
    sites: String,
    config: String,
    steps: String,
}

/// Indents every line.
pub(crate) fn indent(by: usize, text: &str) -> String {
    text.lines().fold(String::new(), |mut all, line| {
        let _ = writeln!(all, "{:by$}{line}", "");
        all
    })
}

impl Mesh {
    pub(crate) fn new(test: &str) -> Self {
        Self { test: test.to_owned(), sites: String::new(), config: String::new(), steps: String::new() }
    }

    pub(crate) fn sites(&mut self, yaml: &str) -> &mut Self {
        self.sites = yaml.to_owned();
        self
    }

    pub(crate) fn config(&mut self, yaml: &str) -> &mut Self {
        self.config = yaml.to_owned();
        self
    }

    pub(crate) fn steps(&mut self, yaml: &str) -> &mut Self {
        self.steps.push_str(yaml);
        if !yaml.ends_with('\n') {
            self.steps.push('\n');
        }
        self
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!("name: {}\nsites:\n{}", self.test, indent(2, &self.sites));
        if !self.config.is_empty() {
            let _ = write!(text, "mesh:\n  config:\n{}", indent(4, &self.config));
        }
        text + "steps:\n" + &indent(2, &self.steps)
    }

    pub(crate) fn passes(&self) {
        e2e::passes(&self.test, &self.text());
    }
}
