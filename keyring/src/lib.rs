//! Who a node is and the life of its keys.
//!
//! Owns node and site names, Curve25519 keys and the key file of a node. It never talks to a network, never
//! logs, and never prints a secret: [`PrivateKey`] and [`PresharedKey`] have no `Debug` and wipe their memory.
//!
//! ```text
//! KeyStore (0600 file) -> PrivateKey -> PublicKey -> what the node publishes
//! ```

mod key;
mod node;
mod store;

pub use key::{KeyError, PresharedKey, PrivateKey, PublicKey};
pub use node::{ClusterName, MeshName, NameError, NodeName, SiteName};
pub use store::{KeyFile, KeyStore, StoreError, StoredKey};
