//! How one input becomes another: bits, bytes, integers, parts, words of the
//! target's language, parts of other inputs, and fields of messages.

use crate::{
    INPUT_BYTES_MAX,
    dice::Dice,
    protobuf::{self, Field, Value},
    target::{Shape, Target},
};

/// Numbers that limits, types and first ids make interesting.
const NUMBERS: [u64; 38] = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    10,
    16,
    63,
    64,
    100,
    127,
    128,
    255,
    256,
    999,
    1_000,
    1_001,
    1_023,
    1_024,
    1_025,
    1_026,
    4_096,
    10_000,
    65_535,
    65_536,
    1_000_000,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    1 << 60,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];
/// The longest part that is removed, repeated or taken from elsewhere.
const PART_BYTES_MAX: usize = 256;
/// Messages within messages that a change goes into.
const DEPTH_MAX: usize = 8;

/// A changed copy; `other` is a second input to take parts from.
pub fn mutate(target: &Target, input: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = input.to_vec();
    // Mostly one change, sometimes many: the first finds edges, the second leaves them behind.
    let mut changes = 1;
    while changes < 12 && dice.once_in(2) {
        changes += 1;
    }
    for _ in 0..changes {
        let by_field = target.shape == Shape::Protobuf && !dice.once_in(8);
        match by_field.then(|| change_message(target, &bytes, other, dice, 0)).flatten() {
            Some(changed) => bytes = changed,
            None if target.shape == Shape::Text && dice.once_in(2) => bytes = change_lines(target, &bytes, other, dice),
            None => change_bytes(target, &mut bytes, other, dice),
        }
    }
    bytes.truncate(INPUT_BYTES_MAX);
    bytes
}

fn change_bytes(target: &Target, bytes: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
    let at = dice.below(bytes.len() + 1);
    match dice.below(12) {
        0 if !bytes.is_empty() => {
            let at = dice.below(bytes.len());
            bytes[at] ^= 1 << dice.below(8);
        }
        1 if !bytes.is_empty() => {
            let at = dice.below(bytes.len());
            bytes[at] = dice.next() as u8;
        }
        2 => drop(bytes.drain(dice.part(bytes.len(), PART_BYTES_MAX))),
        3 => {
            let part = bytes[dice.part(bytes.len(), PART_BYTES_MAX)].to_vec();
            let most = if dice.once_in(16) { 64 } else { 3 };
            let times = 1 + dice.below(most);
            put(bytes, at, &part.repeat(times), false);
        }
        4 => {
            let part = dice.part(other.len(), PART_BYTES_MAX);
            let over = dice.once_in(2);
            put(bytes, at, &other[part], over);
        }
        5 => {
            // Of this its beginning, of the other its end.
            bytes.truncate(at);
            bytes.extend_from_slice(&other[dice.below(other.len() + 1)..]);
        }
        6 | 7 => {
            let number = number(dice);
            let (text, over) = (integer(target.shape, number, dice), dice.once_in(2));
            put(bytes, at, &text, over);
        }
        8 => change_decimal(bytes, dice),
        9 => bytes.truncate(at),
        _word if !target.words.is_empty() => {
            let (word, over) = (dice.of(target.words), dice.once_in(4));
            put(bytes, at, word.as_bytes(), over);
        }
        _one_more => bytes.insert(at, dice.next() as u8),
    }
}

/// Whole lines, and what stands behind a `=`: so most of a file still reads.
fn change_lines(target: &Target, bytes: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
    let split = |bytes: &[u8]| bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (mut lines, mut others) = (split(bytes), split(other));
    let (at, to) = (dice.below(lines.len()), dice.below(lines.len()));
    let taken = others.swap_remove(dice.below(others.len()));
    match dice.below(6) {
        0 => drop(lines.remove(at)),
        1 => lines.swap(at, to),
        2 => lines.insert(at, taken),
        3 => lines[at] = taken,
        4 => change_bytes(target, &mut lines[at], &taken, dice),
        _value => {
            let end = |line: &[u8]| line.iter().position(|byte| *byte == b'=').map(|at| at + 1);
            if let (Some(keep), Some(from)) = (end(&lines[at]), end(&taken)) {
                lines[at].truncate(keep);
                lines[at].extend_from_slice(&taken[from..]);
            } else {
                change_decimal(&mut lines[at], dice);
            }
        }
    }
    lines.join(&b'\n')
}

fn put(bytes: &mut Vec<u8>, at: usize, part: &[u8], over: bool) {
    let end = if over { (at + part.len()).min(bytes.len()) } else { at };
    bytes.splice(at..end, part.iter().copied());
    bytes.truncate(INPUT_BYTES_MAX);
}

fn number(dice: &mut Dice) -> u64 {
    match dice.below(4) {
        0 => dice.next() >> dice.below(64),
        1 => dice.below(8) as u64,
        _edge => dice.of(&NUMBERS),
    }
}

fn integer(shape: Shape, number: u64, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (shape, dice.below(4)) {
        (Shape::Text, _) => return number.to_string().into_bytes(),
        (Shape::Binary | Shape::Protobuf, 0) => bytes.extend_from_slice(&number.to_le_bytes()),
        (Shape::Binary | Shape::Protobuf, 1) => bytes.extend_from_slice(&(number as u32).to_le_bytes()),
        (Shape::Binary | Shape::Protobuf, _) => protobuf::put_varint(&mut bytes, number),
    }
    bytes
}

/// Another number where digits are.
fn change_decimal(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let from = dice.below(bytes.len());
    let Some(start) = bytes.iter().skip(from).position(u8::is_ascii_digit).map(|more| from + more) else { return };
    let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    bytes.splice(start..start + length, number(dice).to_string().into_bytes());
}

/// None: the bytes are no message with fields.
fn change_message(target: &Target, bytes: &[u8], other: &[u8], dice: &mut Dice, depth: usize) -> Option<Vec<u8>> {
    let mut fields = protobuf::read(bytes).filter(|fields| !fields.is_empty())?;
    let at = dice.below(fields.len());
    match dice.below(16) {
        0 => drop(fields.remove(at)),
        1 => {
            let copy = fields[at].clone();
            fields.insert(dice.below(fields.len() + 1), copy);
        }
        2 => {
            let with = dice.below(fields.len());
            fields.swap(at, with);
        }
        3 => fields[at].number = 1 + dice.below(20) as u64,
        4 | 5 => {
            let more = protobuf::read(other).filter(|more| !more.is_empty());
            if let Some(mut more) = more {
                let taken = more.swap_remove(dice.below(more.len()));
                fields.insert(dice.below(fields.len() + 1), taken);
            }
        }
        6 => {
            let value = if dice.once_in(2) { Value::Varint(number(dice)) } else { Value::Bytes(Vec::new()) };
            fields.insert(at, Field { number: 1 + dice.below(20) as u64, value });
        }
        _within => change_value(target, &mut fields[at].value, other, dice, depth),
    }
    Some(protobuf::write(&fields))
}

fn change_value(target: &Target, value: &mut Value, other: &[u8], dice: &mut Dice, depth: usize) {
    match value {
        Value::Varint(varint) => {
            *varint = if dice.once_in(3) { varint.wrapping_add(dice.of(&[1, u64::MAX])) } else { number(dice) };
        }
        Value::Fixed64(fixed) => *fixed = number(dice).to_le_bytes(),
        Value::Fixed32(fixed) => *fixed = (number(dice) as u32).to_le_bytes(),
        Value::Bytes(content) => {
            // A text may read as a message by accident: then it is changed as text often enough.
            let deeper = depth < DEPTH_MAX && !dice.once_in(8);
            match deeper.then(|| change_message(target, content, other, dice, depth + 1)).flatten() {
                Some(changed) => *content = changed,
                None => change_bytes(target, content, other, dice),
            }
        }
    }
}
