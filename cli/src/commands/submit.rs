//! From a draft to an accepted job: files are sent first, then the template.
//! The idempotency key makes it safe to ask again.

use std::{io::Read, path::Path, time::Duration};

use muster_core::limits::INLINE_FILE_BYTES_MAX;
use muster_proto::v1::{
    FileContent, JobTemplate, ListNodesRequest, SubmitRequest, SubmitResponse, TaskParameters, TaskTable,
};
use prost::Message;
use tonic::Code;

use super::Context;
use crate::{
    blobs,
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    fences, inputs,
    template::{self, Draft},
};

/// A submit that got no answer is asked again this often, with the same key.
const TRIES: u32 = 3;
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// Sends a draft's files and submits it.
pub async fn submit(context: &Context, client: &Client, mut draft: Draft) -> Result<SubmitResponse> {
    if draft.options.best_effort {
        do_without_what_lacks(context, client, &mut draft).await?;
    }
    let mut template = draft.template()?;
    attach_files(context, client, &draft, &mut template).await?;
    if let Some(path) = &draft.each_line {
        attach_lines(client, path, &mut template).await?;
    }
    let key = draft.options.key.clone().unwrap_or_else(new_key);
    ask(client, SubmitRequest { idempotency_key: key, template: Some(template) }).await
}

/// Submits until there is an answer: the key makes one job of it.
pub async fn ask(client: &Client, request: SubmitRequest) -> Result<SubmitResponse> {
    let mut tries = 1;
    loop {
        match client.jobs().submit(client.ask(request.clone())).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if tries < TRIES && matches!(status.code(), Code::Unavailable | Code::Unknown) => {
                tries += 1;
                tokio::time::sleep(TRY_AGAIN).await;
                client.find_again().await;
            }
            Err(status) => return Err(status.into()),
        }
    }
}

/// A key that nobody else has.
pub fn new_key() -> String {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).expect("the kernel has random bytes");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn do_without_what_lacks(context: &Context, client: &Client, draft: &mut Draft) -> Result<()> {
    let nodes = client.nodes().list(client.ask(ListNodesRequest::default())).await?.into_inner().nodes;
    let live: Vec<_> = nodes.iter().filter(|node| node.liveness == "live").collect();
    if live.is_empty() {
        return Err(Failure::new(
            Exit::Conflict,
            "--best-effort asks the live nodes what they lack, and there is none; name the fences with --without",
        ));
    }
    let lacking = fences::lacking(draft.profile(), live.into_iter());
    if !lacking.is_empty() {
        context
            .output
            .say(&format!("The live nodes lack these fences, and the job does without: {}", lacking.join(", ")));
    }
    for fence in lacking {
        if !draft.options.without.contains(&fence) {
            draft.options.without.push(fence);
        }
    }
    Ok(())
}

async fn attach_files(context: &Context, client: &Client, draft: &Draft, template: &mut JobTemplate) -> Result<()> {
    let (mut found, mut skipped) = (Vec::new(), Vec::new());
    for (path, name) in &draft.inputs {
        inputs::collect(path, name.clone(), &mut found, &mut skipped)?;
    }
    for skipped in &skipped {
        context.output.say(&format!("not sent: {} ({})", escape::path(&skipped.path), skipped.reason));
    }
    let mut names: Vec<&[u8]> = found.iter().map(|input| &input.name[..]).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Failure::usage(format!("two inputs have the name {}", escape::bytes(twice[0]))));
    }
    let body = template.body.as_mut().expect("a template has a body");
    body.inputs = blobs::send_inputs(client, found).await?;
    if let Some(path) = &draft.options.stdin {
        body.stdin = Some(stdin_content(client, path).await?);
    }
    Ok(())
}

async fn stdin_content(client: &Client, path: &Path) -> Result<FileContent> {
    let bytes = read_or_stdin(path).await?;
    if bytes.len() <= INLINE_FILE_BYTES_MAX {
        return Ok(blobs::inline(bytes));
    }
    Ok(blobs::from_blob(blobs::store_bytes(client, bytes.into()).await?))
}

/// A file's bytes; `-` is stdin.
async fn read_or_stdin(path: &Path) -> Result<Vec<u8>> {
    let owned = path.to_path_buf();
    let reading = tokio::task::spawn_blocking(move || {
        if owned == Path::new("-") {
            let mut bytes = Vec::new();
            std::io::stdin().lock().read_to_end(&mut bytes)?;
            Ok(bytes)
        } else {
            std::fs::read(owned)
        }
    });
    reading.await.expect("reading does not panic").map_err(|error| Failure::file("read", path, error))
}

async fn attach_lines(client: &Client, path: &Path, template: &mut JobTemplate) -> Result<()> {
    let text = read_or_stdin(path).await?;
    let lines = template::lines(&text);
    if lines.is_empty() {
        return Err(Failure::usage(format!("{} has no lines, so there is no task", escape::path(path))));
    }
    let tasks = lines.iter().map(|line| TaskParameters { item: Some(line.to_vec().into()), inputs: Vec::new() });
    let table = TaskTable { tasks: tasks.collect() };
    attach_table(client, table, template).await
}

/// Stores what differs between the tasks, and names it in the template.
pub async fn attach_table(client: &Client, table: TaskTable, template: &mut JobTemplate) -> Result<()> {
    let tasks = u32::try_from(table.tasks.len()).map_err(|_| Failure::usage("there are too many tasks"))?;
    template.tasks = tasks;
    template.body.as_mut().expect("a template has a body").tasks = tasks;
    template.task_table = Some(blobs::store_bytes(client, table.encode_to_vec().into()).await?);
    Ok(())
}
