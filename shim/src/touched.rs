//! What a machine has touched of the memory of a saved one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use mayu_vmm_api::Pages;
use rustix::fs::fstatfs;

use crate::Result;
use crate::error::file;
use crate::saved::PAGE;

/// A file system that is the page cache itself (include/uapi/linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Whether a file is in the page cache as a whole. What is there is mapped together with what is touched, and cannot be told from it. What is
/// written can.
///
/// # Errors
/// The kernel does not tell.
pub(crate) fn is_page_cache(memory: &File) -> io::Result<bool> {
    Ok(fstatfs(memory)?.f_type == TMPFS_MAGIC)
}

/// The pages of a saved machine's memory that a machine has touched, by number, and whether it has written to them. What a process has
/// mapped of a file is in its `maps`, and page by page in its `pagemap` (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) fn touched(pid: i32, inode: u64) -> Result<BTreeMap<u32, bool>> {
    const PRESENT: u64 = 1 << 63 | 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let of = |name| Path::new("/proc").join(pid.to_string()).join(name);
    let maps = fs::read_to_string(of("maps")).map_err(file("read", of("maps")))?;
    let pagemap = File::open(of("pagemap")).map_err(file("open", of("pagemap")))?;
    let mut touched = BTreeMap::new();
    for mapping in maps.lines().filter_map(|line| Mapping::parse(line, inode)) {
        let mut entries = vec![0; mapping.pages * size_of::<u64>()];
        let place = mapping.start / PAGE as u64 * size_of::<u64>() as u64;
        pagemap.read_exact_at(&mut entries, place).map_err(file("read", of("pagemap")))?;
        let (entries, _) = entries.as_chunks();
        for (number, entry) in (mapping.first..).zip(entries) {
            let entry = u64::from_ne_bytes(*entry);
            if entry & PRESENT != 0 {
                touched.insert(number, entry & OF_A_FILE == 0);
            }
        }
    }
    Ok(touched)
}

/// Where a file is mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    /// The address.
    start: u64,
    /// How many pages.
    pages: usize,
    /// The number of the first one in the file.
    first: u32,
}

impl Mapping {
    /// Reads a line of `maps` (proc_pid_maps(5)), if it is one of this file.
    fn parse(line: &str, inode: u64) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (_permissions, offset, _device) = (words.next()?, words.next()?, words.next()?);
        if words.next()?.parse() != Ok(inode) {
            return None;
        }
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (number(start)?, number(end)?, number(offset)?);
        let pages = |bytes: u64| bytes / PAGE as u64;
        Some(Self {
            start,
            pages: pages(end.checked_sub(start)?) as usize,
            first: u32::try_from(pages(offset)).ok()?,
        })
    }
}

/// Pages that follow each other are one entry.
pub(crate) fn join(pages: &BTreeMap<u32, bool>) -> Vec<Pages> {
    let mut joined: Vec<Pages> = Vec::new();
    for (&number, &written) in pages {
        match joined.last_mut() {
            Some(last) if last.first + last.count == number && last.written == written => last.count += 1,
            _ => joined.push(Pages { first: number, count: 1, written }),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_known_by_its_files_number() {
        let line = "7f0000000000-7f0000003000 rw-p 00002000 fe:00 4711    /var/lib/mayu/templates/1/memory";
        let mapping = Mapping { start: 0x7f00_0000_0000, pages: 3, first: 2 };
        assert_eq!(Mapping::parse(line, 4711), Some(mapping));
        assert_eq!(Mapping::parse(line, 4712), None);
        assert_eq!(Mapping::parse("7ffc0000-7ffd0000 rw-p 00000000 00:00 0 [stack]", 4711), None);
    }
}
