//! A line between two processes that can be disturbed while they talk: a TCP proxy.
//!
//! It needs no privileges. Each connection to it is one to the target; what the line does is switched at any moment and
//! holds for the connections that are open as well as for new ones.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{self, AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

use crate::failure::{Failure, Result};

/// Most bytes that are forwarded at once.
const CHUNK: usize = 16 << 10;

/// What the line does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forwards.
    Pass,
    /// Forwards each chunk so much later, one after the other.
    Delay(Duration),
    /// Forwards nothing, not even that one end has closed; connections stay open, and new ones wait. What was sent
    /// meanwhile arrives when the line passes again, as it does after a cable was pulled out.
    Silent,
    /// Swallows what goes to the target, while what comes from there passes. A connection that lost something so is reset
    /// when the line does anything else, as by a router that has forgotten it: nobody reads a stream with a hole.
    HalfOpen,
    /// Closes the connections that are open in order, in the middle of whatever they carry, and new ones at once.
    Cut,
    /// Resets the connections that are open, and new ones at once.
    Reset,
}

/// A proxy in a thread of its own. Dropping it closes its connections.
pub struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
}

impl Proxy {
    /// Listens on a free port of the loopback and forwards to `target`, which need not be there yet.
    pub fn start(target: SocketAddr) -> Result<Self> {
        Self::start_on(Ipv4Addr::LOCALHOST.into(), target)
    }

    /// The same on another address of this machine.
    pub fn start_on(here: IpAddr, target: SocketAddr) -> Result<Self> {
        let (mode, line) = watch::channel(Mode::Pass);
        let (ready, listens) = oneshot::channel();
        std::thread::Builder::new()
            .name("proxy".to_owned())
            .spawn(move || {
                // Whoever started us hears of a failure by the end of `ready`.
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build();
                if let Ok(runtime) = runtime {
                    let _ = runtime.block_on(serve(here, target, line, ready));
                }
            })?;
        let address = listens
            .blocking_recv()
            .map_err(|_| Failure::new(format!("the proxy cannot listen on {here}")))?;
        Ok(Self { address, mode })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the line does from now on.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

/// Accepts connections until the proxy is dropped.
async fn serve(
    here: IpAddr,
    target: SocketAddr,
    line: watch::Receiver<Mode>,
    ready: oneshot::Sender<SocketAddr>,
) -> io::Result<()> {
    let listener = TcpListener::bind((here, 0)).await?;
    let _ = ready.send(listener.local_addr()?);
    let mut gone = line.clone();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (near, _) = accepted?;
                tokio::spawn(relay(near, target, line.clone()));
            }
            // The sender is dropped.
            Err(_) = gone.wait_for(|_| false) => return Ok(()),
        }
    }
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By FIN.
    Closed,
    /// By RST.
    Reset,
}

/// One connection, until both ends have closed it, one has reset it, or the line is cut or reset.
async fn relay(mut near: TcpStream, target: SocketAddr, mut line: watch::Receiver<Mode>) {
    let mut far = match audible(&mut line).await {
        Mode::Cut | Mode::Reset => None,
        _ => TcpStream::connect(target).await.ok(),
    };
    let end = match &mut far {
        Some(far) => {
            let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
            tokio::select! {
                both = async { tokio::try_join!(
                    forward(near_in, far_out, line.clone(), Way::There),
                    forward(far_in, near_out, line.clone(), Way::Back),
                ) } => both.map_or(End::Reset, |_| End::Closed),
                end = severed(line.clone()) => end,
            }
        }
        None if *line.borrow() == Mode::Cut => End::Closed,
        None => End::Reset,
    };
    if end == End::Reset {
        // Closing it resets it then.
        for stream in [Some(&near), far.as_ref()].into_iter().flatten() {
            let _ = stream.set_zero_linger();
        }
    }
}

/// The mode of the line, once it is not silent.
async fn audible(line: &mut watch::Receiver<Mode>) -> Mode {
    match line.wait_for(|mode| *mode != Mode::Silent).await {
        Ok(mode) => *mode,
        // The proxy is being dropped.
        Err(_) => Mode::Reset,
    }
}

/// Waits until the line ends its connections.
async fn severed(mut line: watch::Receiver<Mode>) -> End {
    let severing = |mode: &Mode| matches!(mode, Mode::Cut | Mode::Reset);
    match line.wait_for(severing).await.as_deref() {
        Ok(Mode::Cut) => End::Closed,
        _ => End::Reset,
    }
}

/// The direction of a stream of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    There,
    Back,
}

/// Forwards one direction to its end.
async fn forward(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut line: watch::Receiver<Mode>,
    way: Way,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut swallowed = false;
    loop {
        let read = tokio::select! {
            read = from.read(&mut chunk) => read,
            _ = line.wait_for(|mode| *mode != Mode::HalfOpen), if swallowed => {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        };
        match audible(&mut line).await {
            Mode::HalfOpen if way == Way::There => {
                swallowed = true;
                if matches!(read, Ok(0) | Err(_)) {
                    // Its end is swallowed, too: there is nothing left to read.
                    let _ = line.wait_for(|mode| *mode != Mode::HalfOpen).await;
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                continue;
            }
            Mode::Delay(pause) => tokio::time::sleep(pause).await,
            _ => {}
        }
        match read? {
            0 => return to.shutdown().await,
            length => to.write_all(&chunk[..length]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(10);

    /// A proxy before a server that sends back what it gets.
    fn echo() -> Proxy {
        let server = TcpListener::bind("127.0.0.1:0").expect("a port");
        let target = server.local_addr().expect("an address");
        std::thread::spawn(move || {
            for stream in server.incoming().flatten() {
                std::thread::spawn(move || {
                    std::io::copy(&mut &stream, &mut &stream).ok();
                });
            }
        });
        Proxy::start(target).expect("a proxy")
    }

    fn connect(proxy: &Proxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.address()).expect("the proxy listens");
        stream.set_read_timeout(Some(LONG)).expect("a limit");
        stream
    }

    /// Sends a byte and reads it back.
    fn ping(mut stream: &TcpStream) -> std::io::Result<()> {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    }

    #[test]
    fn a_passing_line_forwards_bytes_and_the_end_of_a_stream() {
        let proxy = echo();
        let mut stream = connect(&proxy);
        ping(&stream).expect("an echo");
        stream
            .shutdown(std::net::Shutdown::Write)
            .expect("our half");
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
    }

    /// The error of a connection on which nothing goes on.
    fn broken(stream: &TcpStream) -> ErrorKind {
        ping(stream).expect_err("it is severed").kind()
    }

    #[test]
    fn a_reset_line_resets_what_is_open_and_what_is_new_until_it_passes_again() {
        let proxy = echo();
        let open = connect(&proxy);
        ping(&open).expect("an echo");
        proxy.set(Mode::Reset);
        for stream in [open, connect(&proxy)] {
            let kind = broken(&stream);
            assert!(
                matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
                "{kind}"
            );
        }
        proxy.set(Mode::Pass);
        ping(&connect(&proxy)).expect("an echo");
    }

    #[test]
    fn a_cut_line_ends_what_is_open_and_what_is_new_in_order() {
        let proxy = echo();
        let open = connect(&proxy);
        ping(&open).expect("an echo");
        proxy.set(Mode::Cut);
        for mut stream in [open, connect(&proxy)] {
            assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
        }
        proxy.set(Mode::Pass);
        ping(&connect(&proxy)).expect("an echo");
    }

    #[test]
    fn a_silent_line_keeps_everything_back_and_loses_nothing() {
        let proxy = echo();
        let open = connect(&proxy);
        ping(&open).expect("an echo");
        proxy.set(Mode::Silent);
        let new = connect(&proxy);
        for mut stream in [&open, &new] {
            stream.write_all(b"x").expect("it is open");
            nothing_comes(stream);
        }
        proxy.set(Mode::Pass);
        for mut stream in [&open, &new] {
            stream.read_exact(&mut [0]).expect("the echo of before");
        }
    }

    fn nothing_comes(mut stream: &TcpStream) {
        stream.set_read_timeout(Some(MOMENT)).expect("a limit");
        let kind = stream.read(&mut [0]).expect_err("nothing comes").kind();
        assert_eq!(kind, ErrorKind::WouldBlock);
        stream.set_read_timeout(Some(LONG)).expect("a limit");
    }

    #[test]
    fn a_half_open_line_swallows_one_direction_and_resets_what_has_a_hole() {
        let server = TcpListener::bind("127.0.0.1:0").expect("a port");
        let proxy = Proxy::start(server.local_addr().expect("an address")).expect("a proxy");
        let (holed, whole) = (connect(&proxy), connect(&proxy));
        let [mut far_holed, mut far_whole] = [(); 2].map(|()| server.accept().expect("one").0);
        proxy.set(Mode::HalfOpen);
        (&holed).write_all(b"x").expect("it is open");
        nothing_comes(&far_holed);
        for (near, far) in [(&holed, &mut far_holed), (&whole, &mut far_whole)] {
            far.write_all(b"y").expect("it is open");
            let mut byte = [0];
            { near }.read_exact(&mut byte).expect("the way back");
        }
        proxy.set(Mode::Pass);
        for mut end in [&holed, &far_holed] {
            let kind = end.read(&mut [0]).expect_err("a hole").kind();
            assert_eq!(kind, ErrorKind::ConnectionReset);
        }
        (&whole).write_all(b"x").expect("it is open");
        far_whole.read_exact(&mut [0]).expect("nothing was lost");
    }

    #[test]
    fn a_slow_line_delays_both_ways() {
        let proxy = echo();
        let stream = connect(&proxy);
        ping(&stream).expect("an echo");
        proxy.set(Mode::Delay(MOMENT));
        let clock = Instant::now();
        ping(&stream).expect("an echo");
        assert!(clock.elapsed() >= 2 * MOMENT);
    }

    #[test]
    fn a_dropped_proxy_closes_its_connections() {
        let proxy = echo();
        let stream = connect(&proxy);
        ping(&stream).expect("an echo");
        drop(proxy);
        ping(&stream).expect_err("it is closed");
    }
}
