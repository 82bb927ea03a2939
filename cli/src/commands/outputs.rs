//! Writes files that a job returned beneath one folder. Their names come from
//! the job: no absolute path, no `..`, and no link on the way is followed, so
//! nothing lands outside; every byte is checked against the digest.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    process::ExitCode,
};

use muster_core::ids::JobId;
use muster_proto::v1::{ListTasksRequest, OutputFile, file_content};
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{Mode, mkdirat},
};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{Context, jobs, show};
use crate::{
    blobs,
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    inputs,
    output::List,
};

/// Tasks asked for at once: their small outputs come inside the answer.
const TASKS_PAGE: u32 = 100;

/// `muster job outputs`: one task's files go to the folder, an array's each to a folder of its index.
pub async fn fetch(
    context: &Context,
    client: &Client,
    text: &str,
    to: &Path,
    task: Option<u32>,
    overwrite: bool,
) -> Result<ExitCode> {
    let (job, in_name) = jobs::split_task(text)?;
    let job = jobs::resolve(client, job).await?;
    let only = task.or(in_name);
    std::fs::create_dir_all(to).map_err(|error| Failure::file("make the folder", to, error))?;
    let folder: OwnedFd = File::open(to).map_err(|error| Failure::file("open the folder", to, error))?.into();
    let mut list = List::new("OutputList", &["TASK", "PATH", "BYTES", "+SHA256"]);
    let mut skipped = Vec::new();
    let mut next = only.unwrap_or(0);
    loop {
        let limit = if only.is_some() { 1 } else { TASKS_PAGE };
        let request = ListTasksRequest { job, first: next, limit };
        let page = client.jobs().list_tasks(client.ask(request)).await?.into_inner();
        // More than one task was seen, or is about to be: each has a folder of its own.
        let many = only.is_none() && (page.more || page.tasks.len() > 1 || next > 0);
        for task in &page.tasks {
            next = task.index + 1;
            let Some(last) = task.attempts.last() else { continue };
            for refused in &last.skipped_outputs {
                skipped.push(format!(
                    "{}.{}: {}: {}",
                    JobId(job),
                    task.index,
                    escape::bytes(&refused.path),
                    refused.reason
                ));
            }
            let prefix = many.then(|| task.index.to_string());
            for output in &last.outputs {
                write_one(client, &folder, prefix.as_deref(), output, overwrite).await?;
                let value = json!({
                    "task": task.index, "path": escape::bytes(&output.path), "bytes": show::length(output),
                    "sha256": show::hex(&output.digest),
                });
                let row = vec![
                    format!("{}.{}", JobId(job), task.index).into(),
                    escape::bytes(&output.path).into(),
                    show::length(output).to_string().into(),
                    show::hex(&output.digest).into(),
                ];
                list.push(row, value);
            }
        }
        if only.is_some() || !page.more || page.tasks.is_empty() {
            break;
        }
    }
    for sentence in &skipped {
        context.output.say(&format!("not returned by the job: {sentence}"));
    }
    context.output.list(&list)?;
    Ok(if skipped.is_empty() { Exit::Ok } else { Exit::Partial }.into())
}

async fn write_one(
    client: &Client,
    folder: &OwnedFd,
    prefix: Option<&str>,
    output: &OutputFile,
    overwrite: bool,
) -> Result<()> {
    let shown = escape::bytes(&output.path);
    inputs::check_name(&output.path).map_err(|_| {
        Failure::new(Exit::Failed, format!("the job returned a file named {shown}, which leads out of the folder"))
    })?;
    let mut parts: Vec<&[u8]> = prefix.iter().map(|prefix| prefix.as_bytes()).collect();
    parts.extend(output.path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b"."));
    let refused = |errno: Errno| {
        let why = match errno {
            Errno::EEXIST => String::from("it exists; use --overwrite or another folder"),
            Errno::ELOOP | Errno::ENOTDIR => String::from("a link or file is in the way"),
            other => other.desc().to_lowercase(),
        };
        let exit = if errno == Errno::EEXIST { Exit::Conflict } else { Exit::Failed };
        Failure::new(exit, format!("cannot write {shown}: {why}"))
    };
    let mut file = create_beneath(folder, &parts, overwrite).map_err(refused)?;
    let mut hash = Sha256::new();
    let mut sink = |bytes: &[u8]| {
        hash.update(bytes);
        file.write_all(bytes)
    };
    match output.content.as_ref().and_then(|content| content.source.as_ref()) {
        Some(file_content::Source::Inline(bytes)) => sink(bytes)?,
        Some(file_content::Source::Blob(blob)) => blobs::fetch(client, blob, &mut sink).await?,
        None => {}
    }
    if hash.finalize()[..] != output.digest[..] {
        return Err(Failure::new(Exit::Failed, format!("{shown} did not come as it was stored: its digest differs")));
    }
    Ok(())
}

/// Makes the folders of `parts` and opens the last as a new file, following no link.
fn create_beneath(folder: &OwnedFd, parts: &[&[u8]], overwrite: bool) -> nix::Result<File> {
    let (name, folders) = parts.split_last().ok_or(Errno::EINVAL)?;
    let mut at: OwnedFd = folder.try_clone().map_err(|_| Errno::EMFILE)?;
    for part in folders {
        let part = OsStr::from_bytes(part);
        match mkdirat(at.as_fd(), part, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        at = openat(at.as_fd(), part, flags, Mode::empty())?;
    }
    let mut flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    flags |= if overwrite { OFlag::O_TRUNC } else { OFlag::O_EXCL };
    openat(at.as_fd(), OsStr::from_bytes(name), flags, Mode::from_bits_truncate(0o644)).map(File::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_returned_name_never_leads_outside() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let folder: OwnedFd = File::open(temp.path()).unwrap().into();
        symlink(outside.path(), temp.path().join("link")).unwrap();
        symlink(outside.path().join("f"), temp.path().join("file")).unwrap();
        assert!(create_beneath(&folder, &[b"link", b"x"], true).is_err());
        assert!(create_beneath(&folder, &[b"file"], true).is_err());
        create_beneath(&folder, &[b"a", b"b\xff", b"c"], false).unwrap();
        assert_eq!(create_beneath(&folder, &[b"a", b"b\xff", b"c"], false).unwrap_err(), Errno::EEXIST);
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
