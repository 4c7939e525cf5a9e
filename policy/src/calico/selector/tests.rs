use super::*;
use crate::model::Labels;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn matches(text: &str, pairs: &[(&str, &str)]) -> bool {
    parse(text).unwrap_or_else(|e| panic!("{text}: {e}")).selector.matches(&labels(pairs))
}

#[test]
fn operators_mean_what_calico_means() {
    let web = [("app", "web-1"), ("tier", "front")];
    for (text, meant) in [
        ("", true),
        ("all()", true),
        ("app == 'web-1'", true),
        ("app == \"web\"", false),
        ("app != 'web'", true),
        ("missing != 'x'", true),
        ("missing == ''", false),
        ("app in {'a', 'web-1'}", true),
        ("app in {'web-1',}", true),
        ("app in {}", false),
        ("app not in {}", true),
        ("missing not in {'a'}", true),
        ("app notin {'web-1'}", false),
        ("app contains 'eb'", true),
        ("missing contains ''", false),
        ("app starts with 'web'", true),
        ("app startswith 'eb'", false),
        ("app ends with '-1'", true),
        ("has(app) && !has(missing)", true),
        ("has(missing) || tier == 'front'", true),
        ("!(app == 'web-1' && tier == 'front')", false),
        ("!app == 'x' && tier == 'front'", true),
        ("!!has(app)", true),
        ("app == 'x' || app == 'web-1' && tier == 'back'", false),
        ("(app == 'x' || app == 'web-1') && tier == 'front'", true),
        ("\tapp=='web-1'&&tier=='front' ", true),
    ] {
        assert_eq!(matches(text, &web), meant, "{text}");
    }
}

#[test]
fn words_may_be_labels() {
    for label in ["in", "not", "has", "all", "contains", "projectcalico.org/name", "a.b_c-d/e"] {
        assert!(matches(&format!("{label} == 'x'"), &[(label, "x")]), "{label}");
    }
}

#[test]
fn errors_say_where() {
    for (text, at, told) in [
        ("a = 'b'", 3, "expected ==, !=, in"),
        ("a == b", 6, "expected a string in quotes, not \"b\""),
        ("a == 'b", 6, "does not end"),
        ("a == 'b' & c == 'd'", 10, "expected && or ||"),
        ("a in {'b' 'c'}", 11, "expected ,"),
        ("(a == 'b'", 10, "expected ), not the end"),
        ("has(a) &&", 10, "expected a label"),
        ("\u{e4} == 'b'", 1, "expected a label"),
        ("a == '\u{e4}' %", 10, "expected && or ||"),
        ("global() && has(a)", 1, "global() stands alone"),
        ("a\n== 'b'", 2, "expected =="),
        ("has (a)", 5, "expected =="),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.at == at && error.what.contains(told), "{text}: {error}");
    }
    assert!(parse(&"!".repeat(100_000)).unwrap_err().what.contains("longer"));
    assert!(parse(&format!("{}has(a)", "!(".repeat(60))).unwrap_err().what.contains("inside of each other"));
}

#[test]
fn global_is_told_apart() {
    assert!(parse(" global()").unwrap().global && !parse("all()").unwrap().global);
    assert!(parse("!global()").unwrap_err().what.contains("without ! before it"));
}
