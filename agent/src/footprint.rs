//! How much of this process is resident. Most of it is not memory that we use but
//! pages of the executable that only its start needed: they came in sixteen at a
//! time, and stay for as long as a process lives that maps them.

use std::{fs, ptr::NonNull};

use nix::sys::mman::{MmapAdvise, madvise};

/// A mapping as /proc/self/smaps tells of it (`proc_pid_smaps`(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    /// Of a file, not writable, and without a page that is only ours: the kernel can read all of it again.
    clean: bool,
}

/// Gives back the pages of the executable and its libraries that the start has brought in. What is still used comes back
/// from the page cache at its next use; nothing is read from the disk for it unless the host is short of memory.
pub fn give_back_what_the_start_needed() {
    // Without /proc all stays as it is.
    let text = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for mapping in mappings(&text).into_iter().filter(|mapping| mapping.clean) {
        let Some(start) = NonNull::new(mapping.start as *mut _) else { continue };
        // SAFETY: the kernel has just named the range as a mapping of a file without any page of our own, which
        // relocated or written data would be: what is dropped is read again as it was (madvise(2), MADV_DONTNEED).
        let _kept_as_it_was = unsafe { madvise(start, mapping.end - mapping.start, MmapAdvise::MADV_DONTNEED) };
    }
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(mapping) = head(line) {
            mappings.push(mapping);
        } else if let (Some(size), Some(mapping)) = (line.strip_prefix("Anonymous:"), mappings.last_mut()) {
            mapping.clean &= size.trim() == "0 kB";
        }
    }
    mappings
}

/// `START-END PERMISSIONS OFFSET DEVICE INODE PATH`
fn head(line: &str) -> Option<Mapping> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let permissions = fields.next()?;
    let path = fields.nth(3).unwrap_or_default();
    let private = !permissions.contains('w') && permissions.ends_with('p');
    Some(Mapping { start, end, clean: private && path.starts_with('/') })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clean_pages_of_files_are_given_back() {
        let smaps = "1000-2000 r-xp 00000000 fe:00 7   /usr/bin/muster\nRss: 4 kB\nAnonymous:             0 kB\n\
                     2000-3000 r--p 00001000 fe:00 7   /usr/bin/muster\nAnonymous:             4 kB\n\
                     3000-4000 rw-p 00002000 fe:00 7   /usr/bin/muster\nAnonymous:             0 kB\n\
                     4000-5000 r--s 00000000 00:01 9   /memfd:lease\nAnonymous:             0 kB\n\
                     5000-6000 r-xp 00000000 00:00 0   [vdso]\nAnonymous:             0 kB\n";
        let clean: Vec<usize> = mappings(smaps).iter().filter(|one| one.clean).map(|one| one.start).collect();
        assert_eq!((mappings(smaps).len(), clean), (5, vec![0x1000]));
    }

    #[test]
    fn a_process_goes_on_as_before() {
        let own = mappings(&fs::read_to_string("/proc/self/smaps").unwrap());
        assert!(own.iter().any(|mapping| mapping.clean), "our own code is a file");
        give_back_what_the_start_needed();
        assert_eq!("still here".to_uppercase(), "STILL HERE");
    }
}
