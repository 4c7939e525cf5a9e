//! One rtnetlink socket: a change with its acknowledgement, and dumps that are complete or an error.

use std::io;
use std::time::Duration;

use futures_util::StreamExt as _;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{AsyncSocket as _, Socket, SocketAddr};
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

/// How long the kernel may take for one request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a dump is tried that changed under our hands.
const DUMP_TRIES: usize = 5;
/// `ENODEV`, `ENOENT`, `EEXIST`, ... as the kernel numbers them on all of Linux' architectures.
pub(crate) mod errno {
    pub(crate) const ENOENT: i32 = 2;
    pub(crate) const ESRCH: i32 = 3;
    pub(crate) const EEXIST: i32 = 17;
    pub(crate) const ENODEV: i32 = 19;
    pub(crate) const EADDRINUSE: i32 = 98;
    pub(crate) const EADDRNOTAVAIL: i32 = 99;
    pub(crate) const ENOBUFS: i32 = 105;
}

/// A socket in the network namespace of the thread that opened it. Requests go one after the other: the kernel
/// serves one dump at a time on a socket.
pub(crate) struct RouteSocket {
    open: Option<(rtnetlink::Handle, JoinHandle<()>)>,
    /// How much of an answer is kept, and whether one was longer.
    most: usize,
    cut: bool,
}

impl Drop for RouteSocket {
    fn drop(&mut self) {
        if let Some((_, task)) = &self.open {
            task.abort();
        }
    }
}

impl RouteSocket {
    pub(crate) fn new() -> io::Result<Self> {
        let mut socket = Self { open: None, most: usize::MAX, cut: false };
        socket.handle()?;
        Ok(socket)
    }

    /// The live handle. A connection that died of an undecodable message is opened anew.
    fn handle(&mut self) -> io::Result<&mut rtnetlink::Handle> {
        if self.open.as_ref().is_none_or(|(_, task)| task.is_finished()) {
            let (mut connection, handle, _) = rtnetlink::new_connection()?;
            // Success has to be seen: a stream that merely ends may be a connection that died.
            connection.set_forward_ack(true);
            connection.set_forward_done(true);
            let socket = connection.socket_mut().socket_mut();
            // Before 4.20 there is no filtering in the kernel; then it is done here alone.
            let _ = socket.set_netlink_get_strict_chk(true);
            let _ = socket.set_rx_buf_sz(1_048_576_u32);
            self.open = Some((handle, tokio::spawn(connection)));
        }
        let (handle, _) = self.open.as_mut().ok_or_else(died)?;
        Ok(handle)
    }

    async fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle()?.request(request).map_err(|_| died())?;
        let mut items = Vec::new();
        let mut interrupted = false;
        let patience = tokio::time::sleep(PATIENCE);
        tokio::pin!(patience);
        loop {
            let answer = tokio::select! {
                answer = answers.next() => answer.ok_or_else(died)?,
                () = &mut patience => {
                    self.open = None;
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer within 10 s"));
                }
            };
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(item) => {
                    if items.len() >= self.most {
                        self.cut = true;
                        continue;
                    }
                    items.push(item);
                    if flags == 0 {
                        return Ok((items, false));
                    }
                }
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Done(_) => return Ok((items, interrupted)),
                NetlinkPayload::Error(error) => {
                    return match error.code {
                        None => Ok((items, interrupted)),
                        Some(code) => Err(io::Error::from_raw_os_error(code.get().abs())),
                    };
                }
                // Lost messages: what was read is not the whole.
                NetlinkPayload::Overrun(_) => return Ok((items, true)),
                _ => {}
            }
        }
    }

    /// Everything that the kernel has of a kind, as one consistent reading.
    pub(crate) async fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut last = Vec::new();
        for _ in 0..DUMP_TRIES {
            match self.exchange(message.clone(), NLM_F_DUMP).await {
                Ok((items, false)) => return Ok(items),
                Ok((items, true)) => last = items,
                Err(error) if error.raw_os_error() == Some(errno::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        // A host whose tables never stand still is read as well as it can be; the next pass reads it again.
        if last.is_empty() { Err(io::Error::from_raw_os_error(errno::ENOBUFS)) } else { Ok(last) }
    }

    /// As much of a kind as there is room for, and whether that was all. It is read once, even if it changes meanwhile.
    pub(crate) async fn sample(
        &mut self,
        message: RouteNetlinkMessage,
        most: usize,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        self.most = most;
        let read = self.exchange(message, NLM_F_DUMP).await;
        self.most = usize::MAX;
        let cut = std::mem::take(&mut self.cut);
        read.map(|(items, _)| (items, !cut))
    }

    /// A single object by its name; `None` when there is none.
    pub(crate) async fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        match self.exchange(message, 0).await {
            Ok((items, _)) => Ok(items.into_iter().next()),
            Err(error) if error.raw_os_error() == Some(errno::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One change, acknowledged.
    pub(crate) async fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK | flags).await.map(|_| ())
    }
}

/// One acknowledged request on a socket of its own; the kernel answers within the call. No runtime is needed.
pub(crate) fn exchange_now<I>(protocol: isize, message: I) -> io::Result<Vec<I>>
where
    I: NetlinkSerializable + NetlinkDeserializable,
    NetlinkPayload<I>: From<I>,
{
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    request.finalize();
    // It may hold the private key.
    let mut bytes = Zeroizing::new(vec![0; request.buffer_len()]);
    request.serialize(&mut bytes);
    let socket = Socket::new(protocol)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let answer = NetlinkMessage::<I>::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            let length = (answer.header.length as usize).next_multiple_of(4);
            rest = rest.get(length.max(4)..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::Error(error) => {
                    return match error.code {
                        None => Ok(answers),
                        Some(code) => Err(io::Error::from_raw_os_error(code.get().abs())),
                    };
                }
                NetlinkPayload::Done(_) => return Ok(answers),
                NetlinkPayload::InnerMessage(item) => answers.push(item),
                _ => {}
            }
        }
    }
}

fn died() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the netlink connection broke; the next pass opens another")
}
