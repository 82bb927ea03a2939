//! Health and metrics over plain HTTP: two fixed pages, nothing else.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::{
    driver::Handle,
    rpc::door::Door,
    telemetry::{Gauges, Metrics},
};

const HEAD_MAX: usize = 8 << 10;
const CONNECTIONS_MAX: usize = 32;
const PATIENCE: Duration = Duration::from_secs(5);

/// What the pages are read from.
#[derive(Clone, Debug)]
pub struct Pages {
    /// Says whether this coordinator leads.
    pub door: Door,
    /// The driver, once it does.
    pub handle: Arc<OnceLock<Handle>>,
    /// Counted.
    pub metrics: Arc<Metrics>,
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let pages = pages.clone();
        tokio::spawn(async move {
            // A caller that went away or dawdles is no trouble of ours.
            let _ = tokio::time::timeout(PATIENCE, answer(stream, &pages)).await;
            drop(place);
        });
    }
}

async fn answer(mut stream: TcpStream, pages: &Pages) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > HEAD_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let line = String::from_utf8_lossy(head.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
    let mut words = line.split(' ');
    let (status, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/healthz")) => health(pages).await,
        (Some("GET"), Some("/metrics")) => figures(pages).await,
        _other => ("404 Not Found", "there are /healthz and /metrics\n".to_owned()),
    };
    let response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}

type Page = (&'static str, String);

/// A standby is healthy: it is what it is to be.
async fn health(pages: &Pages) -> Page {
    let Some(handle) = pages.handle.get() else {
        return ("200 OK", format!("standby: {}\n", pages.door.standing_by().unwrap_or_default()));
    };
    match handle.query(|_, _| ()).await {
        Ok(()) => ("200 OK", "ok\n".to_owned()),
        Err(stopped) => ("503 Service Unavailable", format!("{stopped}\n")),
    }
}

async fn figures(pages: &Pages) -> Page {
    let leads = |leads: u8| format!("# TYPE muster_leads gauge\nmuster_leads {leads}\n");
    let Some(handle) = pages.handle.get() else { return ("200 OK", leads(0)) };
    match handle.query(|fleet, _| Gauges::read(fleet)).await {
        Ok(gauges) => ("200 OK", leads(1) + &pages.metrics.text(&gauges)),
        Err(stopped) => ("503 Service Unavailable", format!("{stopped}\n")),
    }
}
