//! Connections: how many, how long they may stand still, and how they end.

use std::{io, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use super::shared::Shared;

/// Bytes that the system keeps for a reader that is slower than the model.
const SEND_BUFFER: usize = 128 << 10;
/// Bytes of a request's head, and of an answer that are written at once.
const HEAD: usize = 64 << 10;
/// How long connections have for their last bytes.
const FAREWELL: Duration = Duration::from_secs(2);
/// Before another try when the system has no connection to give.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes connections until `over` says so, and ends those that are open.
pub async fn accept(
    listener: TcpListener,
    router: Router,
    shared: Arc<Shared>,
    mut over: watch::Receiver<bool>,
) {
    let most = shared.options.connections;
    let room = Arc::new(Semaphore::new(most));
    loop {
        let (stream, permit) = tokio::select! {
            taken = next(&listener, &room) => taken,
            _ = over.wait_for(|&over| over) => break,
        };
        let (router, shared, over) = (router.clone(), Arc::clone(&shared), over.clone());
        tokio::spawn(async move {
            shared.metrics.connections.inc();
            if prepare(&stream, shared.options.stall_timeout).is_ok() {
                serve(stream, router, shared.options.stall_timeout, over).await;
            }
            shared.metrics.connections.dec();
            drop(permit);
        });
    }
    let _ = timeout(FAREWELL, room.acquire_many(most as u32)).await;
}

/// The next connection, as soon as there is room for it.
async fn next(listener: &TcpListener, room: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let permit = Arc::clone(room).acquire_owned().await;
    let permit = permit.expect("invariant: the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            // Descriptors come back as connections end.
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// A reader that takes nothing for so long is cut off by the system, whatever has been computed for it.
fn prepare(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(stall))?;
    socket.set_send_buffer_size(SEND_BUFFER)
}

async fn serve(
    stream: TcpStream,
    router: Router,
    stall: Duration,
    mut over: watch::Receiver<bool>,
) {
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        // Also between two requests.
        .header_read_timeout(stall)
        .max_buf_size(HEAD);
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    // How a connection ends is its client's affair.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = over.wait_for(|&over| over) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(FAREWELL, connection).await;
}
