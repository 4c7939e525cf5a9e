//! Objects as an API sends them, cut to what the mesh reads while they are read.
//!
//! A server or a node may write anything into an object, at any length. Lists, texts and maps are cut
//! here, so that an object costs no more memory than one that is as large as the mesh allows.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use kube::api::ObjectMeta;
use kube::core::{ApiResource, ClusterResourceScope, Resource};
use mesh_overlay::advertisement::{KNOWN, SITE, SITE_LABEL};
use mesh_policy::model::Labels;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize as Derive, Serialize};

use super::LINK;

/// The most entries of a list that are read: more than any limit that is named to people.
const ENTRIES_MOST: usize = 64;
/// The most bytes of a text: more than the longest annotation that counts.
const TEXT_MOST: usize = 4096;
/// The most bytes of all labels of an object. With more, none counts but the mesh's own.
pub(super) const LABELS_MOST: usize = 32 << 10;
/// What a label costs beside its text.
const LABEL_COST: usize = 64;

/// A text that is cut where it is longer than any that counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub(super) struct Text(String);

impl From<Text> for String {
    fn from(text: Text) -> Self {
        text.0
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Cut;
        impl Visitor<'_> for Cut {
            type Value = Text;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text[..text.floor_char_boundary(TEXT_MOST)].to_owned()))
            }
        }
        from.deserialize_str(Cut)
    }
}

/// Reads the first entries of a list. `null` is none.
///
/// # Errors
/// As the entries' own.
pub(super) fn few<'de, D: Deserializer<'de>, T: Deserialize<'de>, U: From<T>>(
    from: D,
) -> Result<Vec<U>, D::Error> {
    struct First<T, U>(PhantomData<(T, U)>);
    impl<'de, T: Deserialize<'de>, U: From<T>> Visitor<'de> for First<T, U> {
        type Value = Vec<U>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }
        fn visit_unit<E>(self) -> Result<Vec<U>, E> {
            Ok(Vec::new())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<U>, A::Error> {
            let mut first = Vec::new();
            while first.len() < ENTRIES_MOST {
                match entries.next_element::<T>()? {
                    Some(entry) => first.push(entry.into()),
                    None => return Ok(first),
                }
            }
            while entries.next_element::<IgnoredAny>()?.is_some() {}
            Ok(first)
        }
    }
    from.deserialize_any(First(PhantomData))
}

/// Labels within [`LABELS_MOST`].
#[derive(Debug, Clone, Default)]
struct Few {
    labels: Labels,
    over: bool,
}

impl<'de> Deserialize<'de> for Few {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Few;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("labels")
            }
            fn visit_unit<E>(self) -> Result<Few, E> {
                Ok(Few::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Few, A::Error> {
                let (mut all, mut size) = (Few::default(), 0);
                while let Some(Text(key)) = map.next_key()? {
                    let own = [SITE, SITE_LABEL, LINK].contains(&key.as_str());
                    if all.over && !own {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let Text(value) = map.next_value()?;
                    size += key.len() + value.len() + LABEL_COST;
                    all.labels.insert(key, value);
                    if size > LABELS_MOST && !all.over {
                        all.over = true;
                        all.labels.retain(|key, _| [SITE, SITE_LABEL, LINK].contains(&key.as_str()));
                    }
                }
                Ok(all)
            }
        }
        from.deserialize_any(All)
    }
}

/// Annotations that agents read.
#[derive(Debug, Clone, Default)]
struct Known(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Known {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Ours;
        impl<'de> Visitor<'de> for Ours {
            type Value = Known;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }
            fn visit_unit<E>(self) -> Result<Known, E> {
                Ok(Known::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Known, A::Error> {
                let mut known = Known::default();
                while let Some(Text(key)) = map.next_key()? {
                    if KNOWN.contains(&key.as_str()) {
                        known.0.insert(key, map.next_value::<Text>()?.into());
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(known)
            }
        }
        from.deserialize_any(Ours)
    }
}

#[derive(Debug, Default, Derive)]
#[serde(default, rename_all = "camelCase")]
struct Read {
    name: Text,
    resource_version: Text,
    labels: Few,
    annotations: Known,
}

/// The metadata of an object: name, version, labels and the annotations that agents read.
#[derive(Debug, Clone, Default)]
struct Metadata {
    meta: ObjectMeta,
    labels_over: bool,
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let read = Read::deserialize(from)?;
        let meta = ObjectMeta {
            name: Some(read.name.0).filter(|name| !name.is_empty()),
            resource_version: Some(read.resource_version.0).filter(|version| !version.is_empty()),
            labels: Some(read.labels.labels),
            annotations: Some(read.annotations.0),
            ..ObjectMeta::default()
        };
        Ok(Self { meta, labels_over: read.labels.over })
    }
}

/// An object of a kind that has no namespaces.
#[derive(Debug, Clone, Derive)]
#[serde(bound = "Spec: Derive<'de> + Default, Status: Derive<'de> + Default")]
pub struct Sent<Spec, Status> {
    #[serde(default)]
    metadata: Metadata,
    /// Its `spec`.
    #[serde(default)]
    pub spec: Spec,
    /// Its `status`.
    #[serde(default)]
    pub status: Option<Status>,
}

/// The status of an object of which none is read.
#[derive(Debug, Clone, Default, Derive)]
pub struct Unread {}

impl<Spec, Status> Sent<Spec, Status> {
    /// Returns the name.
    pub fn name(&self) -> String {
        self.metadata.meta.name.clone().unwrap_or_default()
    }

    /// Returns the labels.
    pub fn labels(&self) -> Labels {
        self.metadata.meta.labels.clone().unwrap_or_default()
    }

    /// Returns whether it has more labels than are read.
    pub fn has_too_many_labels(&self) -> bool {
        self.metadata.labels_over
    }

    /// Returns the annotations that agents read.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        self.metadata.meta.annotations.clone().unwrap_or_default()
    }
}

impl<Spec, Status> Resource for Sent<Spec, Status> {
    type DynamicType = ApiResource;
    type Scope = ClusterResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata.meta
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Clone, Default, Derive)]
    #[serde(default)]
    struct Spec {
        #[serde(deserialize_with = "few::<_, Text, String>")]
        list: Vec<String>,
    }

    fn read(object: &Value) -> Sent<Spec, Unread> {
        serde_json::from_str(&object.to_string()).unwrap()
    }

    #[test]
    fn endless_lists_and_texts_are_cut() {
        let object = read(&json!({
            "metadata": {"name": "n", "annotations": {"sennit.dev/site": "x".repeat(1 << 20), "other": "x"}},
            "spec": {"list": vec!["y".repeat(1 << 16); 100]}, "status": {"much": []},
        }));
        assert_eq!(object.spec.list.len(), ENTRIES_MOST);
        assert_eq!(object.spec.list[0].len(), TEXT_MOST);
        assert_eq!(object.annotations().keys().collect::<Vec<_>>(), ["sennit.dev/site"]);
        assert_eq!(object.annotations()["sennit.dev/site"].len(), TEXT_MOST);
    }

    #[test]
    fn too_many_labels_count_for_nothing() {
        let mut labels: BTreeMap<String, String> =
            (0..1000).map(|n| (format!("label-{n}"), "value".to_owned())).collect();
        labels.insert(SITE_LABEL.to_owned(), "aws".to_owned());
        let object = read(&json!({"metadata": {"labels": labels}}));
        assert!(object.has_too_many_labels());
        assert_eq!(object.labels(), Labels::from([(SITE_LABEL.to_owned(), "aws".to_owned())]));
        let few = read(&json!({"metadata": {"labels": {"a": "b"}}}));
        assert!(!few.has_too_many_labels() && few.labels()["a"] == "b");
    }

    #[test]
    fn absent_parts_are_empty() {
        for object in [json!({}), json!({"metadata": {"labels": null, "annotations": null}, "status": null})]
        {
            let object = read(&object);
            assert!(
                object.labels().is_empty() && object.spec.list.is_empty() && object.meta().name.is_none()
            );
        }
    }
}
