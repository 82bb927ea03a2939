//! Damage to the write-ahead log that SQLite takes for its end.
//!
//! SQLite reads the log up to the first frame that does not fit its checksums,
//! as what a crash left half-written. A flipped bit looks the same, and costs
//! all that was committed after it, without a word. The two are told apart by
//! what follows: each commit is on the disk before the next one is written, so
//! after a frame that does not fit there can be no whole frame of a later
//! commit, unless the one that does not fit was whole once.
//!
//! What this cannot see is damage to the last commit of all; hosts that were
//! told of it do (`muster_core::timeline`).
//!
//! The format: <https://www.sqlite.org/fileformat2.html#the_write_ahead_log>.

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;
/// The last bit says which byte order the checksums were computed in.
const MAGIC: u32 = 0x377f_0682;

/// Whether commits that were whole once follow after a place that does not fit.
pub(super) fn is_damaged(log: &[u8]) -> bool {
    let Some((header, frames)) = log.split_at_checked(HEADER_BYTES) else { return false };
    if header.iter().all(|byte| *byte == 0) {
        // The file was made and never synced: nothing in it was answered.
        return false;
    }
    let Some(format) = Format::read(header) else { return true };
    let mut sum = format.sum;
    let (mut is_broken, mut commits_after) = (false, 0);
    for frame in frames.chunks_exact(FRAME_HEADER_BYTES + format.page_bytes) {
        let stored = Checksum(word(frame, 16), word(frame, 20));
        let is_ours = [word(frame, 8), word(frame, 12)] == format.salts;
        let fits =
            is_ours && sum.over(&frame[..8], format.big).over(&frame[FRAME_HEADER_BYTES..], format.big) == stored;
        if is_broken && fits && commits_after > 0 {
            return true;
        }
        is_broken |= !fits;
        let is_commit = word(frame, 4) != 0;
        commits_after += u32::from(is_broken && is_commit);
        // After one that does not fit, the next is judged by what that one said.
        sum = stored;
    }
    false
}

struct Format {
    big: bool,
    page_bytes: usize,
    salts: [u32; 2],
    sum: Checksum,
}

impl Format {
    /// None: it does not fit its own checksum.
    fn read(header: &[u8]) -> Option<Self> {
        let magic = word(header, 0);
        let big = magic & 1 == 1;
        let sum = Checksum(0, 0).over(&header[..24], big);
        let is_whole = magic & !1 == MAGIC && sum == Checksum(word(header, 24), word(header, 28));
        // 1 stands for 65536, which does not fit two bytes in the data base's own header.
        let page_bytes = usize::try_from(word(header, 8)).ok().filter(|bytes| bytes.is_power_of_two())?;
        is_whole.then(|| Self { big, page_bytes, salts: [word(header, 16), word(header, 20)], sum })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Checksum(u32, u32);

impl Checksum {
    /// Goes on over bytes whose number is a multiple of 8.
    fn over(self, bytes: &[u8], big: bool) -> Self {
        let (pairs, _none) = bytes.as_chunks::<8>();
        pairs.iter().fold(self, |Self(first, second), pair| {
            let [a, b, c, d, e, f, g, h] = *pair;
            let read = if big { u32::from_be_bytes } else { u32::from_le_bytes };
            let first = first.wrapping_add(read([a, b, c, d])).wrapping_add(second);
            Self(first, second.wrapping_add(read([e, f, g, h])).wrapping_add(first))
        })
    }
}

/// Numbers of the format itself are big-endian. Zero beyond the end, which no caller asks for.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}
