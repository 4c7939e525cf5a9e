//! Where in a file something stands.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// The lines of a document: of each field and each entry the one that it begins in.
#[derive(Debug)]
pub struct Lines(Spanned<Tree>);

#[derive(Debug)]
enum Tree {
    Map(Vec<(Spanned<String>, Spanned<Tree>)>),
    List(Vec<Spanned<Tree>>),
    Leaf,
}

impl Lines {
    /// Of each document of a file; of one that cannot be parsed nothing.
    pub fn of(text: &str) -> Vec<Self> {
        let options = serde_saphyr::options! { with_snippet: false };
        let documents = serde_saphyr::from_multiple_with_options::<Spanned<Tree>>(text, options);
        documents.unwrap_or_default().into_iter().map(Self).collect()
    }

    /// Of the items of a list.
    pub fn into_items(self) -> Vec<Self> {
        let Tree::Map(fields) = self.0.value else { return Vec::new() };
        let items = fields.into_iter().find(|(key, _)| key.value == "items");
        match items.map(|(_, items)| items.value) {
            Some(Tree::List(items)) => items.into_iter().map(Self).collect(),
            _ => Vec::new(),
        }
    }

    /// The first.
    pub fn first(&self) -> u64 {
        self.0.referenced.line()
    }

    /// The line of a field such as `spec.ingress[0].from`; where it is not there, of as much of it as is.
    pub fn field(&self, path: &str) -> u64 {
        let (mut node, mut line, mut rest) = (&self.0, self.first(), path);
        while !rest.is_empty() {
            let found = match &node.value {
                // A key may hold dots, so that the longest that is there counts.
                Tree::Map(fields) => {
                    let begins = |key: &str| {
                        let after = rest.strip_prefix(key)?;
                        (after.is_empty() || after.starts_with(['.', '['])).then_some(after)
                    };
                    let fields = fields
                        .iter()
                        .filter_map(|(key, value)| Some((key.referenced.line(), value, begins(&key.value)?)));
                    fields.min_by_key(|(.., after)| after.len())
                }
                Tree::List(entries) => rest.strip_prefix('[').and_then(|rest| {
                    let (index, after) = rest.split_once(']')?;
                    let entry = entries.get(index.parse::<usize>().ok()?)?;
                    Some((entry.referenced.line(), entry, after))
                }),
                Tree::Leaf => None,
            };
            let Some((at, next, after)) = found else { break };
            (node, line, rest) = (next, at, after.strip_prefix('.').unwrap_or(after));
        }
        line
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

macro_rules! leaves {
    ($($visit:ident: $type:ty),*) => {
        $(fn $visit<E>(self, _: $type) -> Result<Tree, E> {
            Ok(Tree::Leaf)
        })*
    };
}

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    leaves!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_i128: i128, visit_u128: u128, visit_f64: f64, visit_str: &str);

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        Tree::deserialize(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Tree::Leaf)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
        let mut all = Vec::new();
        while let Some(entry) = entries.next_element()? {
            all.push(entry);
        }
        Ok(Tree::List(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Tree, A::Error> {
        let mut all = Vec::new();
        while let Some(field) = fields.next_entry()? {
            all.push(field);
        }
        Ok(Tree::Map(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a: 1\nspec:\n  list:\n  - {x: 1}\n  - y: 2\n    z: ~\n  dotted.key/x: true\n---\nitems:\n- b: 1\n-\n  c: [1, 2]\n";

    #[test]
    fn a_field_has_the_line_that_it_stands_in() {
        let [first, second] = <[Lines; 2]>::try_from(Lines::of(TEXT)).unwrap();
        let lines = ["a", "spec", "spec.list[0].x", "spec.list[1].z", "spec.dotted.key/x"];
        assert_eq!(lines.map(|path| first.field(path)), [1, 2, 4, 6, 7]);
        assert_eq!(first.field("spec.list[1].missing.field"), 5, "as much of it as is there");
        assert_eq!((first.field("spec.list[9]"), first.field("nothing")), (3, 1));
        let items = second.into_items();
        assert_eq!((items.len(), items[0].first(), items[1].field("c[1]")), (2, 10, 12));
    }

    #[test]
    fn json_has_lines_too_and_what_is_none_has_not() {
        let [json] = <[Lines; 1]>::try_from(Lines::of("{\n \"spec\": {\n  \"x\": 1}}\n")).unwrap();
        assert_eq!(json.field("spec.x"), 3);
        assert!(Lines::of("a: [").is_empty());
    }
}
