//! Host lists: `web-[01-03,07],db-1` names web-01, web-02, web-03, web-07 and
//! db-1. Leading zeros are kept; brackets multiply.

use std::collections::HashSet;

use muster_core::limits::{NAME_LEN_MAX, NODES_MAX};

/// All names of a list, in its order, each once.
///
/// # Errors
/// What is wrong with it, as a sentence; also that it names more hosts than a fleet has, or longer ones.
pub fn expand(text: &str) -> Result<Vec<String>, String> {
    let mut known = HashSet::new();
    let mut names = Vec::new();
    let mut named = 0;
    for part in split_outside_brackets(text)? {
        if part.is_empty() {
            return Err(format!("the host list `{text}` has an empty part"));
        }
        let of_part = expand_one(part, text)?;
        // Repeated ones count: they cost as much to write out.
        named += of_part.len();
        if named > NODES_MAX {
            return Err(too_many(text));
        }
        names.extend(of_part.into_iter().filter(|name| known.insert(name.clone())));
    }
    Ok(names)
}

fn too_many(text: &str) -> String {
    format!("the host list `{text}` names more than {NODES_MAX} hosts")
}

fn split_outside_brackets(text: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let (mut start, mut inside) = (0, false);
    for (at, letter) in text.char_indices() {
        match letter {
            '[' if inside => return Err(format!("the host list `{text}` has a bracket inside a bracket")),
            '[' => inside = true,
            ']' if !inside => return Err(format!("the host list `{text}` closes a bracket that is not open")),
            ']' => inside = false,
            ',' if !inside => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err(format!("the host list `{text}` leaves a bracket open"));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// From left to right: the names so far, each with all that can follow.
fn expand_one(part: &str, whole: &str) -> Result<Vec<String>, String> {
    let mut names = vec![String::new()];
    let mut rest = part;
    while let Some((head, more)) = rest.split_once('[') {
        let (ranges, tail) = more.split_once(']').expect("brackets were checked to be in pairs");
        let mut follow = Vec::new();
        for range in ranges.split(',') {
            follow.extend(numbers(range, whole)?);
            if follow.len() * names.len() > NODES_MAX {
                return Err(too_many(whole));
            }
        }
        names =
            names.iter().flat_map(|name| follow.iter().map(move |number| format!("{name}{head}{number}"))).collect();
        check_lengths(&names)?;
        rest = tail;
    }
    names.iter_mut().for_each(|name| name.push_str(rest));
    check_lengths(&names)?;
    Ok(names)
}

fn check_lengths(names: &[String]) -> Result<(), String> {
    match names.iter().find(|name| name.len() > NAME_LEN_MAX) {
        Some(name) => {
            let begin: String = name.chars().take(16).collect();
            Err(format!(
                "a host's name has at most {NAME_LEN_MAX} bytes, and the one that begins with `{begin}` has more"
            ))
        }
        None => Ok(()),
    }
}

fn numbers(range: &str, whole: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("in the host list `{whole}`, `{range}` is neither a number nor a range like 01-03");
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let width = first.len();
    if width > NAME_LEN_MAX {
        return Err(wrong());
    }
    let (low, high): (u64, u64) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if high < low {
        return Err(wrong());
    }
    if high - low >= NODES_MAX as u64 {
        return Err(too_many(whole));
    }
    Ok((low..=high).map(|number| format!("{number:0width$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_keep_their_zeros_and_multiply() {
        assert_eq!(expand("web-[01-03,07]").unwrap(), ["web-01", "web-02", "web-03", "web-07"]);
        assert_eq!(expand("a,b[1-2]x,a").unwrap(), ["a", "b1x", "b2x"]);
        assert_eq!(expand("r[1-2]n[8-9]").unwrap(), ["r1n8", "r1n9", "r2n8", "r2n9"]);
        assert_eq!(expand("x[9-11]").unwrap(), ["x9", "x10", "x11"]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["", "a,", "a[", "a]", "a[[1]]", "a[3-1]", "a[x]", "a[0-99999999]", "a[1-9999][1-9999]"] {
            assert!(expand(text).is_err(), "{text}");
        }
        let long = ["x".repeat(NAME_LEN_MAX + 1), format!("[{}1]", "0".repeat(70_000)), "[1]".repeat(100_000)];
        for text in long.iter().chain([&"[1-9999],".repeat(1_000)]) {
            assert!(expand(text).is_err());
        }
    }
}
