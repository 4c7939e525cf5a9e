//! Calico's selector expressions, as [`LabelSelector`]s.
//!
//! ```text
//! or      := and ("||" and)*
//! and     := operand ("&&" operand)*
//! operand := "!"* ( label "==" string | label "!=" string | label ["not"] "in" "{" string, ... "}" | label "contains" string
//!                 | label "starts" "with" string | label "ends" "with" string | "has(" label ")" | "all()" | "global()" | "(" or ")" )
//! ```
//! Strings stand in either kind of quotes and have no escapes. An empty expression selects everything.

use std::collections::BTreeSet;

use crate::model::Labels;
use crate::object::NAMESPACE;
use crate::selector::{LabelSelector, Requirement};

/// Longer than any that people write.
const LENGTH_MOST: usize = 16 << 10;
/// The most parentheses and negations inside of each other.
const DEPTH_MOST: usize = 64;

/// Why an expression was refused, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("character {at}: {what}")]
pub struct SelectorError {
    /// The character, from 1.
    pub at: usize,
    /// What is wrong, and what would be right.
    pub what: String,
}

/// An expression that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression {
    /// What it selects by labels.
    pub selector: LabelSelector,
    /// It is `global()`: what has no namespace, where that is asked.
    pub global: bool,
    /// Asked of namespaces or accounts, what has none meets it as well: it has none of their labels, and `all()` means those that
    /// are there.
    pub bare: bool,
    /// The same selector, where `all()` means what is in a namespace.
    pub placed: LabelSelector,
}

/// Parses an expression.
///
/// # Errors
/// Where and why it is none.
pub fn parse(text: &str) -> Result<Expression, SelectorError> {
    if text.len() > LENGTH_MOST {
        return Err(SelectorError { at: LENGTH_MOST, what: format!("longer than {LENGTH_MOST} bytes") });
    }
    let (selector, global) = parse_with(text, None)?;
    let (placed, _) = parse_with(text, Some(NAMESPACE))?;
    let bare = global || !text.trim_matches([' ', '\t']).is_empty() && placed.matches(&Labels::new());
    Ok(Expression { selector, global, bare, placed })
}

/// The selector, and whether it is `global()`. `all` is the label that `all()` asks for.
fn parse_with(text: &str, all: Option<&'static str>) -> Result<(LabelSelector, bool), SelectorError> {
    let mut parser = Parser { text, at: 0, depth: 0, globals: 0, others: 0, all };
    parser.space();
    if parser.rest().is_empty() {
        return Ok((LabelSelector::default(), false));
    }
    let selector = parser.or()?;
    if !parser.rest().is_empty() {
        return Err(parser.error("expected && or || or the end"));
    }
    if parser.globals > 0 && parser.others > 0 {
        let what = "global() stands alone: it is about namespaces, not about labels".to_owned();
        return Err(SelectorError { at: 1, what });
    }
    Ok((selector, parser.globals > 0))
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    globals: usize,
    others: usize,
    all: Option<&'static str>,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn error(&self, what: impl Into<String>) -> SelectorError {
        let near: String = self.rest().chars().take(16).collect();
        let what = match near.is_empty() {
            true => format!("{}, not the end", what.into()),
            false => format!("{}, not {near:?}", what.into()),
        };
        SelectorError { at: self.text[..self.at].chars().count() + 1, what }
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start_matches([' ', '\t']).len();
    }

    /// Takes a sign, and the space behind it.
    fn takes(&mut self, sign: &str) -> bool {
        let found = self.rest().starts_with(sign);
        if found {
            self.at += sign.len();
            self.space();
        }
        found
    }

    /// Takes a word that no letter follows.
    fn takes_word(&mut self, word: &str) -> bool {
        let ends = self.rest().strip_prefix(word).is_some_and(|rest| !rest.starts_with(is_label));
        ends && self.takes(word)
    }

    fn needs(&mut self, sign: &str) -> Result<(), SelectorError> {
        if self.takes(sign) { Ok(()) } else { Err(self.error(format!("expected {sign}"))) }
    }

    fn or(&mut self) -> Result<LabelSelector, SelectorError> {
        let mut all = vec![self.and()?];
        while self.takes("||") {
            all.push(self.and()?);
        }
        Ok(match <[LabelSelector; 1]>::try_from(all) {
            Ok([only]) => only,
            Err(several) => LabelSelector::of([Requirement::AnyOf(several.into_iter().collect())]),
        })
    }

    fn and(&mut self) -> Result<LabelSelector, SelectorError> {
        let mut requirements = BTreeSet::new();
        loop {
            requirements.extend(self.operand()?);
            if !self.takes("&&") {
                return Ok(LabelSelector::of(requirements));
            }
        }
    }

    fn operand(&mut self) -> Result<Vec<Requirement>, SelectorError> {
        self.depth += 1;
        if self.depth > DEPTH_MOST {
            return Err(self.error(format!("more than {DEPTH_MOST} things inside of each other")));
        }
        let operand = self.inner()?;
        self.depth -= 1;
        Ok(operand)
    }

    fn inner(&mut self) -> Result<Vec<Requirement>, SelectorError> {
        if self.rest().starts_with("!") && !self.rest().starts_with("!=") && self.takes("!") {
            let before = self.globals;
            let inner = LabelSelector::of(self.operand()?);
            if self.globals > before {
                return Err(self.error("global() stands alone, without ! before it"));
            }
            return Ok(vec![Requirement::Not(Box::new(inner))]);
        }
        if self.takes("(") {
            let inner = self.or()?;
            self.needs(")")?;
            return Ok(inner.into_requirements().collect());
        }
        for (name, global) in [("all", false), ("global", true)] {
            if self.takes(&format!("{name}(")) {
                self.needs(")")?;
                *(if global { &mut self.globals } else { &mut self.others }) += 1;
                let placed = self.all.filter(|_| !global).map(|label| Requirement::Exists(label.to_owned()));
                return Ok(placed.into_iter().collect());
            }
        }
        self.others += 1;
        if self.takes("has(") {
            let label = self.label()?;
            self.needs(")")?;
            return Ok(vec![Requirement::Exists(label)]);
        }
        let label = self.label()?;
        Ok(vec![self.comparison(label)?])
    }

    fn comparison(&mut self, label: String) -> Result<Requirement, SelectorError> {
        if self.takes("==") {
            return Ok(Requirement::In(label, [self.string()?].into()));
        }
        if self.takes("!=") {
            return Ok(Requirement::NotIn(label, [self.string()?].into()));
        }
        if self.takes_word("contains") {
            return Ok(Requirement::Contains(label, self.string()?));
        }
        for (word, made) in [
            ("starts", Requirement::StartsWith as fn(String, String) -> Requirement),
            ("ends", Requirement::EndsWith),
        ] {
            if self.takes_word(&format!("{word}with")) {
                return Ok(made(label, self.string()?));
            }
            if self.takes_word(word) {
                self.needs("with")?;
                return Ok(made(label, self.string()?));
            }
        }
        if self.takes_word("in") {
            return Ok(Requirement::In(label, self.strings()?));
        }
        if self.takes_word("notin") || self.takes_word("not") && self.takes_word("in") {
            return Ok(Requirement::NotIn(label, self.strings()?));
        }
        Err(self.error("expected ==, !=, in, not in, contains, starts with or ends with"))
    }

    fn strings(&mut self) -> Result<BTreeSet<String>, SelectorError> {
        self.needs("{")?;
        let mut strings = BTreeSet::new();
        if self.takes("}") {
            return Ok(strings);
        }
        loop {
            strings.insert(self.string()?);
            if self.takes("}") {
                return Ok(strings);
            }
            self.needs(",")?;
            // As Calico has it.
            if self.takes("}") {
                return Ok(strings);
            }
        }
    }

    fn label(&mut self) -> Result<String, SelectorError> {
        let rest = self.rest();
        let label = &rest[..rest.find(|c| !is_label(c)).unwrap_or(rest.len())];
        if label.is_empty() {
            return Err(self.error("expected a label, has(...), all() or ("));
        }
        self.at += label.len();
        self.space();
        Ok(label.to_owned())
    }

    fn string(&mut self) -> Result<String, SelectorError> {
        let rest = self.rest();
        let quote = rest.chars().next().filter(|quote| ['"', '\''].contains(quote));
        let Some(quote) = quote else { return Err(self.error("expected a string in quotes")) };
        let inner = &rest[1..];
        let Some(end) = inner.find(quote) else {
            return Err(self.error("a string that does not end"));
        };
        self.at += end + 2;
        self.space();
        Ok(inner[..end].to_owned())
    }
}

fn is_label(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_./-".contains(c)
}

#[cfg(test)]
#[path = "selector/tests.rs"]
mod tests;
