//! A job's output: to stdout what it wrote there, to stderr likewise. On a
//! terminal its control characters are shown, never sent, unless `--raw`.

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use muster_core::ids::JobId;
use muster_proto::v1::{InspectJobRequest, LogsRequest, LogsResponse, Stream};

use super::{Context, jobs, watch::Breaks};
use crate::{
    client::Client,
    escape,
    exit::{Exit, Result},
};

/// Options of `muster job logs`.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Until the job has ended.
    pub follow: bool,
    /// None: all.
    pub task: Option<u32>,
    /// 0: the last.
    pub attempt: u32,
    /// As it was written.
    pub raw: bool,
}

/// `muster job logs`.
pub async fn run(context: &Context, client: &Client, text: &str, options: Options) -> Result<ExitCode> {
    let (job, task) = jobs::split_task(text)?;
    let job = jobs::resolve(client, job).await?;
    let id = JobId(job);
    let tasks = match options.task.or(task) {
        Some(task) => task..=task,
        None => {
            let detail = client.jobs().inspect(client.ask(InspectJobRequest { job })).await?.into_inner();
            let total = detail.summary.and_then(|summary| summary.counts).map_or(1, |counts| counts.total);
            0..=total.saturating_sub(1)
        }
    };
    let all = async {
        for task in tasks {
            if options.follow {
                follow(context, client, job, task, options.attempt, options.raw).await?;
            } else {
                let request = LogsRequest { job, task, attempt: options.attempt, follow: false };
                let mut pieces = client.jobs().logs(request).await?.into_inner();
                let mut sink = Sink::new(options.raw);
                while let Some(piece) = pieces.message().await? {
                    sink.show(&piece)?;
                }
            }
        }
        Ok(())
    };
    context.wait(&format!("job {id}"), &format!("`muster job logs -f {id}` comes back to it."), all).await?;
    Ok(Exit::Ok.into())
}

/// Shows a task's output as it comes, over restarts of the coordinator.
pub async fn follow(context: &Context, client: &Client, job: u64, task: u32, attempt: u32, raw: bool) -> Result<()> {
    let mut sink = Sink::new(raw);
    let mut breaks = Breaks::default();
    loop {
        let request = LogsRequest { job, task, attempt, follow: true };
        let error = match client.jobs().logs(request).await {
            Err(status) => status,
            Ok(pieces) => match drain(pieces.into_inner(), &mut sink).await? {
                None => return Ok(()),
                Some(status) => status,
            },
        };
        let worked = sink.progressed();
        if worked {
            breaks.works();
        }
        breaks.wait(client, error).await?;
        if worked {
            context.output.say("muster: the connection broke; trying again");
        }
    }
}

/// Until the stream's end (none), or its break.
async fn drain(mut pieces: tonic::Streaming<LogsResponse>, sink: &mut Sink) -> Result<Option<tonic::Status>> {
    sink.begin_again();
    loop {
        match pieces.message().await {
            Ok(Some(piece)) => sink.show(&piece)?,
            Ok(None) => return Ok(None),
            Err(status) => return Ok(Some(status)),
        }
    }
}

/// Where pieces go. Bytes that were shown before a break are left out after it.
#[derive(Debug)]
struct Sink {
    out: Side,
    err: Side,
    attempt: u32,
    moved: bool,
}

#[derive(Debug)]
struct Side {
    escaped: bool,
    carry: Vec<u8>,
    shown: u64,
    received: u64,
}

impl Sink {
    fn new(raw: bool) -> Self {
        let side = |terminal: bool| Side { escaped: terminal && !raw, carry: Vec::new(), shown: 0, received: 0 };
        Self { out: side(io::stdout().is_terminal()), err: side(io::stderr().is_terminal()), attempt: 0, moved: false }
    }

    fn progressed(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    const fn begin_again(&mut self) {
        self.out.received = 0;
        self.err.received = 0;
    }

    fn show(&mut self, piece: &LogsResponse) -> Result<()> {
        self.moved = true;
        let attempt = piece.attempt.map_or(0, |attempt| attempt.number);
        if attempt != self.attempt {
            // Another attempt's output begins at its own start.
            self.attempt = attempt;
            for side in [&mut self.out, &mut self.err] {
                (side.shown, side.received) = (0, 0);
            }
        }
        let shown = if piece.stream() == Stream::Stderr {
            self.err.write(&mut io::stderr(), &piece.data)
        } else {
            self.out.write(&mut io::stdout(), &piece.data)
        };
        match shown {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                Err(crate::exit::Failure::new(Exit::Ok, "the reader of the output is gone"))
            }
            other => Ok(other?),
        }
    }
}

impl Side {
    fn write(&mut self, to: &mut impl Write, data: &[u8]) -> io::Result<()> {
        let known = self.shown.saturating_sub(self.received).min(data.len() as u64);
        self.received += data.len() as u64;
        let new = &data[usize::try_from(known).unwrap_or(data.len())..];
        self.shown = self.shown.max(self.received);
        if self.escaped {
            to.write_all(escape::output(&mut self.carry, new).as_bytes())?;
        } else {
            to.write_all(new)?;
        }
        to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_shown_before_a_break_are_not_shown_again() {
        let mut side = Side { escaped: false, carry: Vec::new(), shown: 0, received: 0 };
        let mut shown = Vec::new();
        side.write(&mut shown, b"abc").unwrap();
        side.received = 0;
        side.write(&mut shown, b"ab").unwrap();
        side.write(&mut shown, b"cde").unwrap();
        assert_eq!(shown, b"abcde");
    }
}
