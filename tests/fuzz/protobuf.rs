//! Protobuf without a schema, so that a field can be changed and every length
//! round it stays true. See <https://protobuf.dev/programming-guides/encoding/>.

/// One field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub number: u64,
    pub value: Value,
}

/// Its value, by its wire type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(Vec<u8>),
    Fixed32([u8; 4]),
}

/// All fields; none if the bytes are no message.
pub fn read(bytes: &[u8]) -> Option<Vec<Field>> {
    let mut rest = bytes;
    let mut fields = Vec::new();
    while !rest.is_empty() {
        fields.push(take_field(&mut rest)?);
    }
    Some(fields)
}

/// The fields up to the first that does not read.
pub fn read_prefix(mut rest: &[u8]) -> impl Iterator<Item = Field> + '_ {
    std::iter::from_fn(move || take_field(&mut rest))
}

fn take_field(rest: &mut &[u8]) -> Option<Field> {
    let key = take_varint(rest)?;
    let value = match key & 7 {
        0 => Value::Varint(take_varint(rest)?),
        1 => Value::Fixed64(take(rest, 8)?.try_into().ok()?),
        2 => {
            let length = usize::try_from(take_varint(rest)?).ok()?;
            Value::Bytes(take(rest, length)?.to_vec())
        }
        5 => Value::Fixed32(take(rest, 4)?.try_into().ok()?),
        _group_or_unknown => return None,
    };
    (key >> 3 > 0).then_some(Field { number: key >> 3, value })
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// The message again.
pub fn write(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Field { number, value } in fields {
        match value {
            Value::Varint(varint) => {
                put_varint(&mut bytes, number << 3);
                put_varint(&mut bytes, *varint);
            }
            Value::Fixed64(fixed) => {
                put_varint(&mut bytes, number << 3 | 1);
                bytes.extend_from_slice(fixed);
            }
            Value::Bytes(content) => {
                put_varint(&mut bytes, number << 3 | 2);
                put_varint(&mut bytes, content.len() as u64);
                bytes.extend_from_slice(content);
            }
            Value::Fixed32(fixed) => {
                put_varint(&mut bytes, number << 3 | 5);
                bytes.extend_from_slice(fixed);
            }
        }
    }
    bytes
}

/// As protobuf and postcard write a whole number.
pub fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_went() {
        let inner = write(&[Field { number: 2, value: Value::Varint(u64::MAX) }]);
        let fields = [
            Field { number: 1, value: Value::Bytes(inner) },
            Field { number: 16, value: Value::Fixed32([1, 2, 3, 4]) },
            Field { number: 1 << 20, value: Value::Fixed64([9; 8]) },
        ];
        let bytes = write(&fields);
        assert_eq!(read(&bytes).as_deref(), Some(&fields[..]));
        assert_eq!(read(&bytes[..bytes.len() - 1]), None);
        assert_eq!(read_prefix(&bytes[..bytes.len() - 1]).count(), 2);
    }
}
