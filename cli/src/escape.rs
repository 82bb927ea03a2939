//! Makes bytes of others fit for a terminal: no control character, and so no
//! escape sequence, of a job, a file name or a reason reaches it.

use std::{os::unix::ffi::OsStrExt, path::Path};

/// One line of text: control characters, also a line's end, are shown as `\n`, `\x1b`.
pub fn text(text: &str) -> String {
    bytes(text.as_bytes())
}

/// A path in one line; what is not UTF-8 is shown as `\xff`.
pub fn path(path: &Path) -> String {
    bytes(path.as_os_str().as_bytes())
}

/// Bytes as one line of text.
pub fn bytes(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for letter in chunk.valid().chars() {
            push_escaped(&mut shown, letter);
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    shown
}

/// A job's output for a terminal: line ends and tabs stay, all other control characters are shown.
///
/// Works on pieces as they come; a character that is cut by a piece's end waits in `carry`.
pub fn output(carry: &mut Vec<u8>, piece: &[u8]) -> String {
    carry.extend_from_slice(piece);
    let mut shown = String::with_capacity(carry.len());
    let mut used = 0;
    for chunk in carry.utf8_chunks() {
        for letter in chunk.valid().chars() {
            match letter {
                '\n' | '\t' => shown.push(letter),
                _ => push_escaped(&mut shown, letter),
            }
        }
        used += chunk.valid().len();
        let at_end = used + chunk.invalid().len() == carry.len();
        if at_end && !chunk.invalid().is_empty() && is_cut_character(chunk.invalid()) {
            break;
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
        used += chunk.invalid().len();
    }
    carry.drain(..used);
    shown
}

/// The start of a character whose rest may still come.
fn is_cut_character(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

fn push_escaped(shown: &mut String, letter: char) {
    match letter {
        '\n' => shown.push_str("\\n"),
        '\t' => shown.push_str("\\t"),
        '\r' => shown.push_str("\\r"),
        // C1 controls and the bidirectional overrides move or hide text as well.
        letter if letter.is_control() || matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
            let number = letter as u32;
            if number < 0x100 {
                shown.push_str(&format!("\\x{number:02x}"));
            } else {
                shown.push_str(&format!("\\u{{{number:x}}}"));
            }
        }
        letter => shown.push(letter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_escape_sequence_reaches_a_terminal() {
        assert_eq!(text("a\x1b[2Jb\n\u{9b}"), "a\\x1b[2Jb\\n\\x9b");
        assert_eq!(bytes(b"ok\xff\x00"), "ok\\xff\\x00");
        assert_eq!(text("\u{202e}evil"), "\\u{202e}evil");
    }

    #[test]
    fn a_character_cut_in_two_pieces_stays_whole() {
        let mut carry = Vec::new();
        assert_eq!(output(&mut carry, &[b'a', 0xc3]), "a");
        assert_eq!(output(&mut carry, &[0xa4, b'\n']), "ä\n");
        assert_eq!(output(&mut carry, b"\x1b[0m\xff!"), "\\x1b[0m\\xff!");
        assert!(carry.is_empty());
    }
}
