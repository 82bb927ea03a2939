//! Host lists: `web-[01-03,07],db-1` names web-01, web-02, web-03, web-07 and
//! db-1. Leading zeros are kept; brackets multiply.

use muster_core::limits::NODES_MAX;

/// All names of a list, in its order, each once.
pub fn expand(text: &str) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for part in split_outside_brackets(text)? {
        if part.is_empty() {
            return Err(format!("the host list `{text}` has an empty part"));
        }
        for name in expand_one(part, text)? {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        if names.len() > NODES_MAX {
            return Err(too_many(text));
        }
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

fn expand_one(part: &str, whole: &str) -> Result<Vec<String>, String> {
    let Some(open) = part.find('[') else { return Ok(vec![part.to_owned()]) };
    let close = part.find(']').expect("brackets were checked to be in pairs");
    let (head, tail) = (&part[..open], &part[close + 1..]);
    let tails = expand_one(tail, whole)?;
    let mut names = Vec::new();
    for range in part[open + 1..close].split(',') {
        for number in numbers(range, whole)? {
            names.extend(tails.iter().map(|tail| format!("{head}{number}{tail}")));
            if names.len() > NODES_MAX {
                return Err(too_many(whole));
            }
        }
    }
    Ok(names)
}

fn numbers(range: &str, whole: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("in the host list `{whole}`, `{range}` is neither a number nor a range like 01-03");
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let width = first.len();
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
    }
}
