//! The cross-platform configuration protocol of WireGuard (<https://www.wireguard.com/xplatform/>).

mod client;
mod parse;
mod render;
mod server;

pub use client::ask_features;
pub use parse::{MAX_LINE, MAX_REQUEST, Operation, Reader, RequestError, ScopeOf, parse_set};
pub use render::{SocketSnapshot, render_errno, render_features, render_get};
pub use server::{Force, ListenError, Server, SocketControl, SocketFile};
