use super::*;
use mesh_keyring::PrivateKey;
use proptest::prelude::*;

fn good() -> Advertisement {
    Advertisement {
        public_key: PrivateKey::from_bytes(&[7; 32]).unwrap().public(),
        epoch: 1_700_000_000,
        site: "aws".parse().unwrap(),
        endpoints: vec!["192.0.2.1:51820".parse().unwrap(), "gw.example:51820".parse().unwrap()],
        internal_endpoints: vec!["[2001:db8::1]:51820".parse().unwrap()],
        mtu: Some(1500),
        reflexive_endpoints: vec!["198.51.100.7:40001".parse().unwrap()],
        paths: Rung::ALL.into(),
        encrypts: true,
    }
}

fn with(key: &str, value: &str) -> Result<Option<Advertisement>, AdvertisementError> {
    let mut annotations = good().to_annotations();
    annotations.insert(key.to_owned(), value.to_owned());
    Advertisement::parse(&annotations)
}

#[test]
fn a_claim_survives_its_annotations() {
    assert_eq!(Advertisement::parse(&good().to_annotations()), Ok(Some(good())));
}

#[test]
fn a_node_without_our_annotations_claims_nothing() {
    let foreign = BTreeMap::from([("example.org/x".to_owned(), "y".to_owned())]);
    assert_eq!(Advertisement::parse(&foreign), Ok(None));
}

#[test]
fn each_malformed_value_is_refused_by_the_name_of_its_annotation() {
    let nine = ["192.0.2.1:1"; 9].join(",");
    let big = "9".repeat(VALUE_MOST + 1);
    for (key, value) in [
        (PUBLIC_KEY, "short"),
        (PUBLIC_KEY, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
        (EPOCH, "-1"),
        (EPOCH, "+1"),
        (EPOCH, "18446744073709551616"),
        (EPOCH, ""),
        (SITE, "../../etc"),
        (SITE, ""),
        (ENDPOINTS, "127.0.0.1:51820"),
        (ENDPOINTS, "192.0.2.1"),
        (ENDPOINTS, &nine),
        (INTERNAL_ENDPOINTS, "[fe80::1]:5"),
        (REFLEXIVE_ENDPOINTS, "10.0.0.1"),
        (PATH, &big),
        (MTU, "0"),
        (MTU, "1359"),
        (MTU, "70000"),
        (ENDPOINTS, &big),
        (PUBLIC_KEY, &big),
    ] {
        let error = with(key, value).unwrap_err().to_string();
        assert!(error.contains(key), "{key}={value:.50}: {error}");
        assert!(error.len() < 400, "an error must not repeat an oversized value");
    }
}

#[test]
fn a_partial_claim_is_refused() {
    for key in [PUBLIC_KEY, EPOCH, SITE] {
        let mut annotations = good().to_annotations();
        annotations.remove(key);
        assert_eq!(Advertisement::parse(&annotations), Err(AdvertisementError::Missing(key)));
    }
}

#[test]
fn annotations_of_a_newer_agent_are_passed_over() {
    assert_eq!(with("sennit.dev/colour", &"x".repeat(10_000)), Ok(Some(good())));
}

proptest! {
    #[test]
    fn any_annotations_are_parsed_or_refused(
        values in prop::collection::btree_map(prop::sample::select(KNOWN.to_vec()), "\\PC{0,80}", 0..6),
    ) {
        let annotations = values.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        if let Ok(Some(claim)) = Advertisement::parse(&annotations) {
            prop_assert_eq!(Advertisement::parse(&claim.to_annotations()), Ok(Some(claim)));
        }
    }
}

#[test]
fn the_documents_name_each_annotation_and_no_other() {
    let text = include_str!("../../../docs/annotations.md");
    let rows =
        text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(first, _)| first));
    let documented: Vec<&str> = rows.filter(|first| first.starts_with(DOMAIN)).collect();
    assert_eq!(documented, KNOWN);
    let limits = [VALUE_MOST, ENDPOINTS_MOST, usize::from(MTU_LEAST)];
    for number in limits.map(|n| if n < 1000 { format!("at most {n}") } else { n.to_string() }) {
        assert!(text.replace(',', "").contains(&number), "{number}");
    }
}
