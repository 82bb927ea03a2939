//! Host list expressions of the command line.

use std::collections::BTreeSet;

use muster::hostlist;
use muster_core::limits::NODES_MAX;

use crate::target::{Shape, Signs, Target};

pub(super) const TARGET: Target = Target {
    name: "host_list",
    shape: Shape::Text,
    words: &["web-", "[01-03]", "[", "]", ",", "-", "[1-9999]", "[0-9][0-9]", "01", "é"],
    inputs_in_ci: 2_000,
    take,
    seeds,
};

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(input) else { return Ok(()) };
    let names = hostlist::expand(text);
    signs.result("list", &names);
    let Ok(names) = names else { return Ok(()) };
    signs.count("names", names.len());
    if names.is_empty() || names.len() > NODES_MAX || names.iter().any(String::is_empty) {
        return Err(format!("{} names, or an empty one", names.len()));
    }
    if names.iter().collect::<BTreeSet<_>>().len() != names.len() {
        return Err("a name is there twice".into());
    }
    Ok(())
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let lists =
        [("list", "web-[01-03,07],db-1"), ("one", "db-1"), ("product", "r[1-2]n[8-9]x"), ("wide", "x[0009-0110]")];
    lists.into_iter().map(|(name, list)| (name, list.as_bytes().to_vec())).collect()
}
