//! Each row of the embedded store carries a checksum of itself, which SQLite
//! computes by our function whenever it writes the row (a stored generated
//! column). SQLite's own checks see what is wrong with a page or an index, and
//! not a flipped bit within a value; this does.

use rusqlite::{
    Connection,
    functions::{Context, FunctionFlags},
    types::ValueRef,
};

/// An odd number without a pattern: 2^64 divided by the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Gives a connection the function `checksum(...)` of the schema.
///
/// # Errors
/// SQLite has no memory.
pub(super) fn register(connection: &Connection) -> rusqlite::Result<()> {
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC | FunctionFlags::SQLITE_INNOCUOUS;
    connection.create_scalar_function("checksum", -1, flags, |context| Ok(of_row(context)))
}

fn of_row(context: &Context<'_>) -> i64 {
    let sum = (0..context.len()).fold(Sum(FACTOR), |sum, index| match context.get_raw(index) {
        ValueRef::Null => sum.word(0),
        ValueRef::Integer(number) => sum.word(1).word(u64::from_ne_bytes(number.to_ne_bytes())),
        ValueRef::Real(number) => sum.word(2).word(number.to_bits()),
        ValueRef::Text(bytes) => sum.word(3).bytes(bytes),
        ValueRef::Blob(bytes) => sum.word(4).bytes(bytes),
    });
    i64::from_ne_bytes(sum.0.to_ne_bytes())
}

/// Every step is a bijection of what was before and of the word, so a change within one word always shows, and
/// any other change but once in 2^64.
#[derive(Clone, Copy)]
struct Sum(u64);

impl Sum {
    const fn word(self, word: u64) -> Self {
        let mixed = (self.0 ^ word).wrapping_mul(FACTOR);
        Self(mixed ^ (mixed >> 29))
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        let sum = words.iter().fold(self.word(bytes.len() as u64), |sum, word| sum.word(u64::from_le_bytes(*word)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        sum.word(u64::from_le_bytes(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_shift_between_columns_shows() {
        let connection = Connection::open_in_memory().unwrap();
        register(&connection).unwrap();
        let sum = |first: &[u8], second: &[u8]| -> i64 {
            connection.query_row("SELECT checksum(?1, ?2)", [first, second], |row| row.get(0)).unwrap()
        };
        let whole = *b"a record of some length";
        let known = sum(&whole, b"more");
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(sum(&flipped, b"more"), known, "bit {bit}");
        }
        assert_ne!(sum(b"a record of some lengt", b"hmore"), known);
        assert_ne!(sum(&whole, b"more\0"), known, "zeros at the end count");
        assert_eq!(sum(&whole, b"more"), known);
    }
}
