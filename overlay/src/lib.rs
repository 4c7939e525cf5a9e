//! What the overlay has to be, and the only code that touches links, routes and WireGuard.
//!
//! Everything up to [`MeshPlan`] is pure: claims and grants go in, a plan comes out, the same for any order of
//! the input. The backends below it observe the host and apply single changes; they never flush a live device.
//!
//! ```text
//! NodeRecord --Advertisement::parse--> claim --admit(grants, memory)--> Peer --MeshPlan::compute--> MeshPlan
//! MeshPlan -> DeviceConfig | RouteTable | Guard --diff(observed)--> changes --> WireguardBackend | NetBackend
//! ```
//!
//! It never reads a registry, never sees a policy, and takes no AllowedIPs from a node's own word.

pub mod address;
pub mod admission;
pub mod advertisement;
pub mod backend;
pub mod device;
pub mod dial;
pub mod endpoint;
pub mod exemption;
pub mod fake;
pub mod guard;
pub mod handshake;
pub mod link;
pub mod local;
pub mod netlink;
pub mod nft;
pub mod path;
pub mod peer;
pub mod plan;
pub mod prefix;
pub mod ratchet;
pub mod route;
pub mod surroundings;
pub mod vxlan;
pub mod wireguard;

pub use admission::{Admission, Memory, NodeRecord, Refusal, admit};
pub use advertisement::{Advertisement, AdvertisementError};
pub use device::{DeviceChange, DeviceConfig, DevicePeer, ObservedDevice, ObservedPeer};
pub use endpoint::Endpoint;
pub use exemption::Exemption;
pub use guard::Guard;
pub use local::{Grants, LocalNode};
pub use peer::Peer;
pub use plan::MeshPlan;
pub use ratchet::{Kept, Ratchet};
pub use route::{Route, RouteChange, RouteKind, RouteTable};
