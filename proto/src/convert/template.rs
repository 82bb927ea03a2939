//! What a job asks. A template is checked as a whole and filled with the
//! defaults, so that a host never sees a field that it must guess.

use std::collections::BTreeSet;

use muster_core::{
    fence::{self, covers},
    ids::Actor,
    limits,
    spec::{CHECKPOINT_SIGNALS, Delivery, JobSpec, OnDrain, Retries},
    time::Millis,
};
use prost::{Message as _, bytes::Bytes};

use super::{Checked, amounts, blob, labels, pool, reject, text};
use crate::v1;

/// Longest limit and grace: what a timer can hold without a second thought.
const SPAN_MAX: Millis = Millis::from_secs(10 * 365 * 86_400);
const RETRIES_MAX: u32 = 10_000;

/// A checked template.
#[derive(Clone, Debug)]
pub struct Template {
    /// What the rules need of it.
    pub spec: JobSpec,
    /// With all defaults filled in; to be stored.
    pub wire: v1::JobTemplate,
    /// What its digest is made over: equal requests give equal bytes.
    pub canonical: Vec<u8>,
}

/// Checks a template as a whole. `table` is its decoded and checked task table, if it names one.
///
/// # Errors
/// Names the first field that is wrong.
pub fn template(mut wire: v1::JobTemplate, owner: &Actor, table: Option<&v1::TaskTable>) -> Checked<Template> {
    let canonical = canonical_bytes(&wire, owner);
    let constraints = labels("constraints", &wire.constraints)?;
    let tasks = task_count(&wire, table)?;
    wire.tasks = tasks;
    let Some(body) = wire.body.as_mut() else { return reject("template.body", "is missing") };
    check_command(body)?;
    check_files(body)?;
    let (delivery, on_drain) = fill_choices(body)?;
    let request = fill_amounts(body)?;
    body.job = 0;
    body.tasks = tasks;
    body.owner = owner.0.clone();
    let fences = fences_of(body, delivery)?;
    if wire.priority.abs() > limits::PRIORITY_MAX {
        return reject("priority", format!("is from -{0} to {0}", limits::PRIORITY_MAX));
    }
    let retries = retries(wire.retries.as_ref())?;
    let spec = JobSpec {
        name: text("name", &wire.name, limits::NAME_LEN_MAX)?,
        owner: owner.clone(),
        pool: pool("pool", &wire.pool)?,
        priority: wire.priority,
        tasks,
        request,
        fences,
        constraints,
        delivery,
        on_drain,
        retries,
        time_limit: (body.time_limit_ms > 0).then_some(Millis(body.time_limit_ms)),
        grace: Millis(body.grace_ms),
    };
    Ok(Template { spec, wire, canonical })
}

/// A map has no order on the wire: it is encoded sorted, apart from the rest.
fn canonical_bytes(wire: &v1::JobTemplate, owner: &Actor) -> Vec<u8> {
    let mut constraints: Vec<(&String, &String)> = wire.constraints.iter().collect();
    constraints.sort();
    let mut bytes = Vec::new();
    for text in constraints.iter().flat_map(|(key, value)| [key.as_str(), value.as_str()]).chain([owner.0.as_str()]) {
        bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    let rest = v1::JobTemplate { constraints: Default::default(), ..wire.clone() };
    bytes.extend_from_slice(&rest.encode_to_vec());
    bytes
}

fn task_count(wire: &v1::JobTemplate, table: Option<&v1::TaskTable>) -> Checked<u32> {
    let tasks = match table {
        None => wire.tasks.max(1),
        Some(table) => {
            let rows = u32::try_from(table.tasks.len()).unwrap_or(u32::MAX);
            if rows == 0 || (wire.tasks != 0 && wire.tasks != rows) {
                return reject("tasks", format!("is {}, and the task table has {rows} rows", wire.tasks));
            }
            rows
        }
    };
    if tasks > limits::TASKS_MAX {
        return reject("tasks", format!("is at most {}", limits::TASKS_MAX));
    }
    if wire.first_index.checked_add(tasks).is_none() {
        return reject("first_index", "with the number of tasks is past 4294967295");
    }
    Ok(tasks)
}

fn check_command(body: &v1::JobBody) -> Checked<()> {
    if body.arguments.first().is_none_or(|program| program.is_empty()) {
        return reject("body.arguments", "name a program");
    }
    let mut total = 0usize;
    for (index, argument) in body.arguments.iter().enumerate() {
        check_string(&format!("body.arguments[{index}]"), argument)?;
        total += argument.len() + 1;
    }
    for (index, variable) in body.environment.iter().enumerate() {
        let field = format!("body.environment[{index}]");
        if variable.name.is_empty() || variable.name.contains(&b'=') {
            return reject(field, "has a name without `=`");
        }
        check_string(&field, &variable.name)?;
        check_string(&field, &variable.value)?;
        total += variable.name.len() + variable.value.len() + 2;
    }
    if total > limits::COMMAND_BYTES_MAX {
        return reject(
            "body.arguments",
            format!("and environment have at most {} bytes together", limits::COMMAND_BYTES_MAX),
        );
    }
    check_path("body.working_folder", &body.working_folder, true)
}

fn check_string(field: &str, bytes: &[u8]) -> Checked<()> {
    if bytes.contains(&0) {
        return reject(field, "contains a NUL byte");
    }
    if bytes.len() > limits::ARGUMENT_BYTES_MAX {
        return reject(field, format!("has at most {} bytes", limits::ARGUMENT_BYTES_MAX));
    }
    Ok(())
}

/// Relative, and never above the working folder.
fn check_path(field: &str, path: &[u8], may_be_empty: bool) -> Checked<()> {
    if path.is_empty() && !may_be_empty {
        return reject(field, "is empty");
    }
    if path.contains(&0) || path.len() > limits::PATH_BYTES_MAX {
        return reject(field, format!("has at most {} bytes and no NUL", limits::PATH_BYTES_MAX));
    }
    if path.first() == Some(&b'/') {
        return reject(field, "is relative to the working folder");
    }
    if path.split(|byte| *byte == b'/').any(|part| part == b"..") {
        return reject(field, "has no `..`");
    }
    if path.split(|byte| *byte == b'/').any(|part| part.len() > 255) {
        return reject(field, "has a component of more than 255 bytes");
    }
    Ok(())
}

fn check_files(body: &v1::JobBody) -> Checked<()> {
    if let Some(stdin) = &body.stdin {
        check_content("body.stdin", Some(stdin))?;
    }
    check_inputs("body.inputs", &body.inputs)?;
    if body.outputs.len() > limits::OUTPUT_FILES_MAX {
        return reject("body.outputs", format!("has at most {} entries", limits::OUTPUT_FILES_MAX));
    }
    for (index, path) in body.outputs.iter().enumerate() {
        check_path(&format!("body.outputs[{index}]"), path, false)?;
    }
    if body.outputs.iter().map(|path| path.len()).sum::<usize>() > limits::OUTPUT_PATHS_BYTES_MAX {
        return reject(
            "body.outputs",
            format!("have at most {} bytes together; pack them into one file", limits::OUTPUT_PATHS_BYTES_MAX),
        );
    }
    Ok(())
}

fn check_inputs(field: &str, inputs: &[v1::InputFile]) -> Checked<()> {
    if inputs.len() > limits::INPUT_FILES_MAX {
        return reject(field, format!("has at most {} files", limits::INPUT_FILES_MAX));
    }
    for (index, input) in inputs.iter().enumerate() {
        check_path(&format!("{field}[{index}].path"), &input.path, false)?;
        check_content(&format!("{field}[{index}].content"), input.content.as_ref())?;
    }
    check_places(field, inputs)
}

/// Each file has a place of its own: two at one path, or one below another, would fail on every host.
fn check_places(field: &str, inputs: &[v1::InputFile]) -> Checked<()> {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> {
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        parts.map(<[u8]>::to_vec).collect()
    };
    let mut places: Vec<_> = inputs.iter().map(|input| parts(&input.path)).zip(0..).collect();
    // A path comes right before those that begin with it.
    places.sort();
    for pair in places.windows(2) {
        let [(above, first), (below, second)] = pair else { continue };
        if below.starts_with(above) {
            let (first, second) = (first.min(second), first.max(second));
            return reject(format!("{field}[{second}].path"), format!("is the place of {field}[{first}], or below it"));
        }
    }
    if places.first().is_some_and(|(place, _)| place.is_empty()) {
        return reject(format!("{field}[{}].path", places[0].1), "names no file");
    }
    Ok(())
}

fn check_content(field: &str, content: Option<&v1::FileContent>) -> Checked<()> {
    use v1::file_content::Source;
    match content.and_then(|content| content.source.as_ref()) {
        None => reject(field, "is missing"),
        Some(Source::Inline(data)) if data.len() > limits::INLINE_FILE_BYTES_MAX => {
            reject(field, format!("has at most {} bytes inline; store it as a blob", limits::INLINE_FILE_BYTES_MAX))
        }
        Some(Source::Inline(_)) => Ok(()),
        Some(Source::Blob(reference)) => blob(field, reference).map(|_| ()),
    }
}

fn fill_choices(body: &mut v1::JobBody) -> Checked<(Delivery, OnDrain)> {
    use v1::{Delivery as D, Network as N, OnDrain as O, Profile as P};
    let unknown = |field: &str| reject(field, "is none that this version knows");
    body.network = match N::try_from(body.network) {
        Ok(N::Unspecified | N::None) => N::None.into(),
        Ok(N::Host) => N::Host.into(),
        Err(_) => return unknown("body.network"),
    };
    body.profile = match P::try_from(body.profile) {
        Ok(P::Unspecified | P::Strict) => P::Strict.into(),
        Ok(P::Shared) => P::Shared.into(),
        Ok(P::None) => P::None.into(),
        Err(_) => return unknown("body.profile"),
    };
    let (wire_delivery, delivery) = match D::try_from(body.delivery) {
        Ok(D::Unspecified | D::AtLeastOnce) => (D::AtLeastOnce, Delivery::AtLeastOnce),
        Ok(D::AtMostOnce) => (D::AtMostOnce, Delivery::AtMostOnce),
        Ok(D::Exclusive) => (D::Exclusive, Delivery::Exclusive),
        Err(_) => return unknown("body.delivery"),
    };
    let (wire_on_drain, on_drain) = match O::try_from(body.on_drain) {
        Ok(O::Unspecified | O::Finish) => (O::Finish, OnDrain::Finish),
        Ok(O::Requeue) => (O::Requeue, OnDrain::Requeue),
        Ok(O::Checkpoint) => (O::Checkpoint, OnDrain::Checkpoint { signal: checkpoint_signal(body)? }),
        Err(_) => return unknown("body.on_drain"),
    };
    body.delivery = wire_delivery.into();
    body.on_drain = wire_on_drain.into();
    Ok((delivery, on_drain))
}

/// One of those that a job may be asked by.
fn checkpoint_signal(body: &mut v1::JobBody) -> Checked<u8> {
    let [(_, usual), ..] = CHECKPOINT_SIGNALS;
    if body.checkpoint_signal == 0 {
        body.checkpoint_signal = usual.into();
    }
    let known = CHECKPOINT_SIGNALS.iter().find(|(_, number)| u32::from(*number) == body.checkpoint_signal);
    known.map_or_else(
        || reject("body.checkpoint_signal", "is none that a job may be asked by"),
        |(_, number)| Ok(*number),
    )
}

fn fill_amounts(body: &mut v1::JobBody) -> Checked<muster_core::resources::Resources> {
    let asked = body.request.unwrap_or_default();
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    let filled = v1::Resources {
        cpu_milli: or(asked.cpu_milli, limits::CPU_REQUEST_MILLI),
        memory_bytes: or(asked.memory_bytes, limits::MEMORY_REQUEST_BYTES),
        disk_bytes: or(asked.disk_bytes, limits::DISK_REQUEST_BYTES),
    };
    let request = amounts("body.request", &filled)?;
    body.request = Some(filled);
    body.grace_ms = or(body.grace_ms, limits::GRACE.0);
    body.output_limit_bytes = or(body.output_limit_bytes, limits::OUTPUT_LIMIT);
    if body.pids_limit == 0 {
        body.pids_limit = limits::PIDS_LIMIT;
    }
    if body.grace_ms > SPAN_MAX.0 || body.time_limit_ms > SPAN_MAX.0 {
        return reject("body.time_limit_ms", format!("and grace are at most {SPAN_MAX}"));
    }
    Ok(request)
}

/// Fences that a profile requires, before what the job can do without.
#[must_use]
pub fn profile_fences(profile: v1::Profile, network: v1::Network) -> BTreeSet<&'static str> {
    let all: &[&str] = match profile {
        v1::Profile::Strict | v1::Profile::Unspecified => &fence::STRICT,
        v1::Profile::Shared => &fence::SHARED,
        v1::Profile::None => &[],
    };
    all.iter().copied().filter(|fence| *fence != fence::NETWORK || network != v1::Network::Host).collect()
}

fn fences_of(body: &v1::JobBody, delivery: Delivery) -> Checked<BTreeSet<String>> {
    for without in &body.without {
        if !fence::ALL.iter().any(|fence| covers(without, fence)) {
            return reject("body.without", format!("there is no fence `{}`", without.escape_default()));
        }
    }
    let mut fences = profile_fences(body.profile(), body.network());
    if delivery == Delivery::Exclusive {
        if body.without.iter().any(|without| covers(without, fence::LEASE_TIMER)) {
            return reject("body.without", "lease.timer is what keeps an exclusive task from running twice");
        }
        fences.insert(fence::LEASE_TIMER);
    }
    fences.retain(|fence| !body.without.iter().any(|without| covers(without, fence)));
    Ok(fences.into_iter().map(str::to_owned).collect())
}

fn retries(wire: Option<&v1::RetryPolicy>) -> Checked<Retries> {
    let (default, wire) = (Retries::default(), wire.copied().unwrap_or_default());
    let retries = Retries {
        failed: wire.failed.unwrap_or(default.failed),
        lost: wire.lost.unwrap_or(default.lost),
        drained: wire.drained.unwrap_or(default.drained),
    };
    if [retries.failed, retries.lost, retries.drained].iter().any(|budget| *budget > RETRIES_MAX) {
        return reject("retries", format!("are at most {RETRIES_MAX} each"));
    }
    Ok(retries)
}

/// Decodes and checks a task table.
///
/// # Errors
/// The bytes are no table, or a row of it is wrong.
pub fn task_table(bytes: Bytes) -> Checked<v1::TaskTable> {
    let table = match v1::TaskTable::decode(bytes) {
        Ok(table) => table,
        Err(error) => return reject("task_table", format!("is no TaskTable: {error}")),
    };
    if table.tasks.len() > limits::TASKS_MAX as usize {
        return reject("task_table", format!("has at most {} rows", limits::TASKS_MAX));
    }
    for (index, task) in table.tasks.iter().enumerate() {
        if let Some(item) = &task.item {
            check_string(&format!("task_table[{index}].item"), item)?;
        }
        check_inputs(&format!("task_table[{index}].inputs"), &task.inputs)?;
    }
    Ok(table)
}

/// Every blob that a job's start needs: of its body, and of its tasks.
pub fn blobs_in<'a>(body: &'a v1::JobBody, table: Option<&'a v1::TaskTable>) -> impl Iterator<Item = &'a v1::BlobRef> {
    let of_tasks = table.into_iter().flat_map(|table| table.tasks.iter()).flat_map(|task| task.inputs.iter());
    let contents = body.inputs.iter().chain(of_tasks).filter_map(|input| input.content.as_ref());
    contents.chain(body.stdin.as_ref()).filter_map(|content| match &content.source {
        Some(v1::file_content::Source::Blob(reference)) => Some(reference),
        Some(v1::file_content::Source::Inline(_)) | None => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner() -> Actor {
        Actor("ana".into())
    }

    fn plain() -> v1::JobTemplate {
        let body = v1::JobBody { arguments: vec!["/bin/true".into()], ..Default::default() };
        v1::JobTemplate { body: Some(body), ..Default::default() }
    }

    fn with(change: impl FnOnce(&mut v1::JobTemplate, &mut v1::JobBody)) -> Checked<Template> {
        let mut wire = plain();
        let mut body = wire.body.take().unwrap();
        change(&mut wire, &mut body);
        wire.body = Some(body);
        template(wire, &owner(), None)
    }

    #[test]
    fn defaults_are_filled_in() {
        let checked = template(plain(), &owner(), None).unwrap();
        assert_eq!(checked.spec.tasks, 1);
        assert_eq!(checked.spec.request.cpu_milli, limits::CPU_REQUEST_MILLI);
        assert_eq!(checked.spec.fences.len(), fence::STRICT.len());
        assert_eq!(checked.wire.body.unwrap().pids_limit, limits::PIDS_LIMIT);
    }

    #[test]
    fn what_makes_no_sense_is_rejected_by_name() {
        let field = |result: Checked<Template>| result.unwrap_err().field;
        assert_eq!(field(template(v1::JobTemplate::default(), &owner(), None)), "template.body");
        assert_eq!(field(with(|_, body| body.arguments.clear())), "body.arguments");
        assert_eq!(field(with(|_, body| body.arguments.push("a\0b".into()))), "body.arguments[1]");
        assert_eq!(field(with(|_, body| body.arguments.push(vec![b'x'; 200_000].into()))), "body.arguments[1]");
        assert_eq!(field(with(|_, body| body.working_folder = "/etc".into())), "body.working_folder");
        assert_eq!(field(with(|_, body| body.outputs.push("a/../../b".into()))), "body.outputs[0]");
        assert_eq!(field(with(|_, body| body.network = 99)), "body.network");
        assert_eq!(field(with(|_, body| body.without.push("moat".into()))), "body.without");
        assert_eq!(field(with(|wire, _| wire.tasks = limits::TASKS_MAX + 1)), "tasks");
        assert_eq!(field(with(|wire, _| wire.first_index = u32::MAX)), "first_index");
        assert_eq!(field(with(|wire, _| wire.priority = 1_001)), "priority");
        assert_eq!(field(with(|wire, _| wire.pool = "a b".into())), "pool");
        assert_eq!(
            field(with(|_, body| body.request = Some(v1::Resources { cpu_milli: u64::MAX, ..Default::default() }))),
            "body.request"
        );
        let no_content = v1::InputFile { path: "a".into(), content: None, executable: false };
        assert_eq!(field(with(|_, body| body.inputs.push(no_content))), "body.inputs[0].content");
        let inputs = |paths: &[&'static str]| {
            let content = Some(v1::FileContent { source: Some(v1::file_content::Source::Inline("x".into())) });
            let file = |path: &&'static str| v1::InputFile {
                path: (*path).into(),
                content: content.clone(),
                executable: false,
            };
            with(|_, body| body.inputs = paths.iter().map(file).collect())
        };
        assert!(inputs(&["a/b", "ab", "a/c", "a/b2", "b"]).is_ok());
        assert_eq!(field(inputs(&["a", "b", "./a"])), "body.inputs[2].path");
        assert_eq!(field(inputs(&["a/b/c", "x", "a"])), "body.inputs[2].path");
        assert_eq!(field(inputs(&["x", "./."])), "body.inputs[1].path");
        let many = |body: &mut v1::JobBody| {
            body.outputs = (0..10).map(|n| format!("{n}{}", "x/".repeat(999)).into()).collect()
        };
        assert_eq!(field(with(|_, body| many(body))), "body.outputs");
    }

    #[test]
    fn without_limits_means_all_of_them() {
        let checked = with(|_, body| body.without = vec!["limits".into(), "uid.own".into()]).unwrap();
        assert!(!checked.spec.fences.iter().any(|fence| fence.starts_with("limits") || fence == "uid.own"));
        assert!(checked.spec.fences.contains("ns.pid"));
    }

    #[test]
    fn an_exclusive_job_keeps_its_lease_timer() {
        let exclusive = |body: &mut v1::JobBody| body.delivery = v1::Delivery::Exclusive.into();
        assert!(with(|_, body| exclusive(body)).unwrap().spec.fences.contains("lease.timer"));
        let refused = with(|_, body| {
            exclusive(body);
            body.without.push("lease".into());
        });
        assert!(refused.is_err());
    }

    #[test]
    fn equal_requests_have_equal_canonical_bytes() {
        let labelled = || {
            with(|wire, _| {
                wire.constraints = (0..20).map(|n| (format!("key{n}"), format!("value{n}"))).collect();
            })
            .unwrap()
        };
        assert_eq!(labelled().canonical, labelled().canonical);
        assert_ne!(labelled().canonical, template(plain(), &owner(), None).unwrap().canonical);
        assert_ne!(
            template(plain(), &owner(), None).unwrap().canonical,
            template(plain(), &Actor("bo".into()), None).unwrap().canonical
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(wire) = v1::JobTemplate::decode(bytes.as_slice()) {
                let _ = template(wire, &owner(), None);
            }
            let _ = task_table(bytes.clone().into());
            if let Ok(hello) = v1::Hello::decode(bytes.as_slice()) {
                let _ = super::super::hello(&hello);
            }
            if let Ok(report) = v1::AttemptEnded::decode(bytes.as_slice()) {
                let _ = super::super::end(report.end.as_ref());
                let _ = super::super::detail(&report);
            }
            if let Ok(beat) = v1::Heartbeat::decode(bytes.as_slice()) {
                let _ = super::super::held(&beat.held);
            }
        }

        #[test]
        fn no_accepted_path_leaves_the_folder(path in "[a./\\x00-\\x02]{0,12}") {
            if check_path("path", path.as_bytes(), true).is_ok() {
                prop_assert!(!path.starts_with('/'));
                prop_assert!(path.split('/').all(|part| part != ".."));
            }
        }
    }
}
