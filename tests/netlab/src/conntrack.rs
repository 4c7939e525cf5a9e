use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::os::fd::AsRawFd;

/// Deletes all connection tracking entries of the calling thread's network namespace: one
/// `IPCTNL_MSG_CT_DELETE` without a tuple (linux/netfilter/nfnetlink_conntrack.h).
pub(crate) fn flush() -> nix::Result<()> {
    const DELETE: u16 = (1 << 8) | 2; // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
    const REQUEST_ACK: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = Vec::with_capacity(20);
    message.extend(20u32.to_ne_bytes());
    message.extend(DELETE.to_ne_bytes());
    message.extend(REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]); // sequence, port
    message.extend([0; 4]); // nfgenmsg: every family, version 0
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    sendto(fd.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0u8; 256];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    match answer.get(16..20).filter(|_| length >= 20) {
        Some(code) => match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
            0 => Ok(()),
            code => Err(Errno::from_raw(-code)),
        },
        None => Err(Errno::EBADMSG),
    }
}
