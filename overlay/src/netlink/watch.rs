//! A hint that links, addresses, routes or rules changed.

use futures_util::FutureExt as _;
use rtnetlink::MulticastGroup as Group;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};

use super::socket::errno;
use crate::backend::BackendError;

const GROUPS: [Group; 7] = [
    Group::Link,
    Group::Ipv4Ifaddr,
    Group::Ipv6Ifaddr,
    Group::Ipv4Route,
    Group::Ipv6Route,
    Group::Ipv4Rule,
    Group::Ipv6Rule,
];

/// Tells that something changed, never what: the state is read anew anyway, so an overrun loses nothing.
pub struct Watch {
    socket: TokioSocket,
    buffer: Vec<u8>,
}

impl Watch {
    /// Begins to watch the network namespace of this thread. Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> Result<Self, BackendError> {
        let failed = |error: std::io::Error| BackendError::failed("watching links and routes", error);
        let mut socket = TokioSocket::new(NETLINK_ROUTE).map_err(failed)?;
        let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (*group as u32 - 1));
        socket.socket_mut().bind(&SocketAddr::new(0, groups)).map_err(failed)?;
        Ok(Self { socket, buffer: Vec::with_capacity(65_536) })
    }

    /// Waits until something changed; what had piled up counts as one event. It may be dropped at any time.
    ///
    /// # Errors
    /// When the socket broke.
    pub async fn changed(&mut self) -> Result<(), BackendError> {
        self.receive().await?;
        while let Some(more) = self.receive().now_or_never() {
            more?;
        }
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), BackendError> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            Ok(()) => Ok(()),
            // Overrun: events were lost, so there certainly was one.
            Err(error) if error.raw_os_error() == Some(errno::ENOBUFS) => Ok(()),
            Err(error) => Err(BackendError::failed("watching links and routes", error)),
        }
    }
}
