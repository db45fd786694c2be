//! What every transport does first: check a group, and join the messages of each peer into one stream.

use super::{Message, Piece};
use crate::error::{Error, Result, Status};

/// Largest contribution to an allgather, in bytes.
pub(super) const MAX_BLOB: usize = 4096;

/// The bytes to, or from, one peer in one group.
#[derive(Default)]
pub(super) struct Stream {
    pub peer: u32,
    pub pieces: Vec<Piece>,
    /// Total length.
    pub bytes: usize,
    /// Nothing is left to do.
    pub done: bool,
    /// Bytes moved so far, for a transport that moves a stream bit by bit.
    pub moved: usize,
    /// Where the header of the stream ends, once it was written or read.
    pub begun: Option<u64>,
    /// The piece that the next byte belongs to, and the byte within it.
    at: (usize, usize),
}

impl Stream {
    /// The next bytes to move, at most `limit`; null once nothing is left. They count as moved.
    pub fn next(&mut self, limit: usize) -> Piece {
        let Some(p) = self.pieces.get(self.at.0) else {
            return Piece { ptr: std::ptr::null_mut(), len: 0 };
        };
        let len = (p.len - self.at.1).min(limit);
        let next = Piece { ptr: p.ptr.wrapping_add(self.at.1), len };
        self.moved += len;
        self.at.1 += len;
        if self.at.1 == p.len {
            self.at = (self.at.0 + 1, 0);
        }
        next
    }
}

/// The streams of one direction of a group. Its vectors are used again from group to group.
#[derive(Default)]
pub(super) struct Streams {
    all: Vec<Stream>,
    used: usize,
}

impl Streams {
    /// Joins `messages` by peer, in the order given.
    pub fn fill(&mut self, messages: &[Message]) {
        self.used = 0;
        for m in messages {
            let at = match self.all[..self.used].iter().position(|s| s.peer == m.peer) {
                Some(at) => at,
                None => {
                    if self.used == self.all.len() {
                        self.all.push(Stream::default());
                    }
                    let s = &mut self.all[self.used];
                    let mut pieces = std::mem::take(&mut s.pieces);
                    pieces.clear();
                    *s = Stream { peer: m.peer, pieces, ..Stream::default() };
                    self.used += 1;
                    self.used - 1
                }
            };
            let s = &mut self.all[at];
            s.pieces.extend(m.pieces.iter().filter(|p| p.len > 0));
            s.bytes += m.bytes();
        }
    }

    pub fn clear(&mut self) {
        self.used = 0;
    }

    pub fn iter(&self) -> impl Iterator<Item = &Stream> {
        self.all[..self.used].iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Stream> {
        self.all[..self.used].iter_mut()
    }

    pub fn all_done(&self) -> bool {
        self.iter().all(|s| s.done)
    }

    /// Bytes of memory of the vectors themselves.
    pub fn memory_bytes(&self) -> usize {
        self.all
            .iter()
            .map(|s| size_of::<Stream>() + s.pieces.capacity() * size_of::<Piece>())
            .sum()
    }
}

/// Every peer is another rank of the group.
pub(super) fn check_peers(
    rank: u32,
    size: u32,
    sends: &[Message],
    recvs: &[Message],
) -> Result<()> {
    for (what, messages) in [("send", sends), ("receive", recvs)] {
        for m in messages {
            if m.peer >= size || m.peer == rank {
                return Err(Error::argument(format!(
                    "rank {rank}: a {what} names peer {}; allowed are the other ranks of 0..{size}",
                    m.peer
                )));
            }
        }
    }
    Ok(())
}

/// `members` ascend, are ranks of the group, and include this one; the contribution is small.
pub(super) fn check_members(rank: u32, size: u32, members: &[u32], mine: &[u8]) -> Result<()> {
    let ascending = members.windows(2).all(|w| w[0] < w[1]);
    if !ascending || members.last().is_none_or(|&last| last >= size) || !members.contains(&rank) {
        return Err(Error::argument(format!(
            "rank {rank}: members of an allgather are {members:?}; they must ascend, be below {size} and include this rank"
        )));
    }
    if mine.len() > MAX_BLOB {
        return Err(Error::argument(format!(
            "rank {rank}: allgather of {} bytes; allowed are at most {MAX_BLOB}",
            mine.len()
        )));
    }
    Ok(())
}

/// A fingerprint of a list of members (FNV-1a), so that ranks that mean different subsets find out.
pub(super) fn members_hash(members: &[u32]) -> u64 {
    members
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, &m| (h ^ u64::from(m)).wrapping_mul(0x0100_0000_01b3))
}

pub(super) fn lengths_differ(sender: u32, sent: usize, receiver: u32, wanted: usize) -> Error {
    Error::new(
        Status::Mismatch,
        format!(
            "rank {sender} sends {sent} bytes to rank {receiver}, which expects {wanted} bytes from it"
        ),
    )
}

pub(super) fn members_differ(rank: u32, peer: u32, members: &[u32]) -> Error {
    Error::new(
        Status::Mismatch,
        format!(
            "rank {rank} gathers among ranks {members:?}, but rank {peer} called with other members or in another order"
        ),
    )
}

pub(super) fn blobs_differ(rank: u32, mine: usize, peer: u32, theirs: usize) -> Error {
    Error::new(
        Status::Mismatch,
        format!("rank {rank} gives {mine} bytes to an allgather, rank {peer} gives {theirs} bytes"),
    )
}

pub(super) fn not_come(rank: u32, peer: u32, what: &str) -> Error {
    Error::new(
        Status::Timeout,
        format!("rank {rank}: rank {peer} did not come to {what} before the deadline"),
    )
}

pub(super) fn aborted_by(who: u32) -> Error {
    Error::new(Status::Aborted, format!("rank {who} aborted the group"))
}

pub(super) fn in_flight(rank: u32, call: &str) -> Error {
    Error::new(
        Status::InvalidUsage,
        format!("rank {rank}: {call} while a group is in flight; wait for it or cancel it first"),
    )
}

pub(super) fn cancelled(status: Status, rank: u32) -> Error {
    Error::new(status, format!("rank {rank} cancelled its exchange"))
}
