//! Relays between an agent and its API: a proxy, or a delayed link.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use netlab::Host;

/// A proxy that knows CONNECT. Dropped, it goes on until its host is gone.
pub struct Proxy {
    /// The address it listens on.
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Proxy {
    /// Starts one in this host.
    ///
    /// # Errors
    /// Fails if the address cannot be bound.
    pub fn start(host: &Host, address: SocketAddr) -> anyhow::Result<Self> {
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        serve(host, address, move |client| {
            let mut lines = BufReader::new(client.try_clone()?);
            let mut first = String::new();
            lines.read_line(&mut first)?;
            let mut line = first.clone();
            while !line.trim().is_empty() {
                line.clear();
                lines.read_line(&mut line)?;
            }
            let to = first.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next());
            let server = TcpStream::connect(to.ok_or(io::ErrorKind::InvalidData)?)?;
            count.fetch_add(1, Ordering::SeqCst);
            (&client).write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            both(client, server, Duration::ZERO)
        })?;
        Ok(Self { address, connections })
    }

    /// Returns the number of connections that it has made.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Listens in this host, and hands everything on to `to` this much later, in each direction.
///
/// # Errors
/// Fails if the address cannot be bound.
pub fn delay(host: &Host, address: SocketAddr, to: SocketAddr, later: Duration) -> anyhow::Result<()> {
    serve(host, address, move |client| both(client, TcpStream::connect(to)?, later))
}

fn serve(
    host: &Host,
    address: SocketAddr,
    answer: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let namespace = host.namespace().clone();
    let listener = namespace.run(move || TcpListener::bind(address))??;
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        // Connections that are made belong into the namespace too.
        let _ = namespace.run(move || {
            for client in listener.incoming().flatten() {
                let answer = Arc::clone(&answer);
                std::thread::spawn(move || answer(client));
            }
        });
    });
    Ok(())
}

fn both(client: TcpStream, server: TcpStream, later: Duration) -> io::Result<()> {
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || pass(from, to, later));
    pass(server, client, later);
    Ok(())
}

fn pass(mut from: TcpStream, mut to: TcpStream, later: Duration) {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    std::thread::spawn(move || {
        for (due, part) in receiver {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&part).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut part = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut part) {
        if sender.send((Instant::now() + later, part[..count].to_vec())).is_err() {
            return;
        }
    }
}
