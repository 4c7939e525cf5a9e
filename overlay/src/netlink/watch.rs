//! A hint that links, addresses, routes, rules or the guard changed.

use std::io;

use futures_util::FutureExt as _;
use rtnetlink::MulticastGroup as Group;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};

use super::socket::errno;
use crate::backend::BackendError;
use crate::guard::TABLE;

const GROUPS: [Group; 7] = [
    Group::Link,
    Group::Ipv4Ifaddr,
    Group::Ipv6Ifaddr,
    Group::Ipv4Route,
    Group::Ipv6Route,
    Group::Ipv4Rule,
    Group::Ipv6Rule,
];

/// `NFNLGRP_NFTABLES` (include/uapi/linux/netfilter/nfnetlink.h): every change of the ruleset.
const NFTABLES: u32 = 7;
/// More than the kernel puts into one datagram of either kind.
const DATAGRAM: usize = 65_536;

/// Tells that something changed, never what: the state is read anew anyway, so an overrun loses nothing. Of
/// nftables it tells what touches the guard's table, also when this agent did it itself.
pub struct Watch {
    route: Source,
    nftables: Option<Source>,
}

/// One socket with its buffer.
struct Source {
    socket: TokioSocket,
    buffer: Vec<u8>,
}

impl Watch {
    /// Begins to watch the network namespace of this thread. Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says. One without nftables is none: the guard itself tells that.
    pub fn new() -> Result<Self, BackendError> {
        let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (*group as u32 - 1));
        let route = Source::new(NETLINK_ROUTE, groups).map_err(failed)?;
        let nftables = Source::new(NETLINK_NETFILTER, 1 << (NFTABLES - 1));
        if let Err(error) = &nftables {
            tracing::warn!(%error, "changes of the nftables ruleset are seen late: the kernel does not tell of them");
        }
        Ok(Self { route, nftables: nftables.ok() })
    }

    /// Waits until something changed; what had piled up counts as one event. It may be dropped at any time.
    ///
    /// # Errors
    /// When a socket broke.
    pub async fn changed(&mut self) -> Result<(), BackendError> {
        self.receive().await?;
        while let Some(more) = self.receive().now_or_never() {
            more?;
        }
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), BackendError> {
        let guard = async {
            match &mut self.nftables {
                Some(source) => source.receive_of_guard().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            received = self.route.receive() => received.map_err(failed),
            received = guard => received.map_err(failed),
        }
    }
}

impl Source {
    fn new(protocol: isize, groups: u32) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self { socket, buffer: Vec::with_capacity(DATAGRAM) })
    }

    async fn receive(&mut self) -> io::Result<()> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            // Overrun: events were lost, so there certainly was one.
            Err(error) if error.raw_os_error() == Some(errno::ENOBUFS) => {
                self.buffer.clear();
                Ok(())
            }
            result => result,
        }
    }

    /// Others write their rules all day: only a datagram with our table's name in it counts, or a lost one.
    async fn receive_of_guard(&mut self) -> io::Result<()> {
        loop {
            self.receive().await?;
            let name = [TABLE.as_bytes(), &[0]].concat();
            if self.buffer.is_empty() || self.buffer.windows(name.len()).any(|part| part == name) {
                return Ok(());
            }
        }
    }
}

fn failed(error: io::Error) -> BackendError {
    BackendError::failed("watching links, routes and nftables", error)
}
