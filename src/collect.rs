//! Rows of any bytes between ranks, outside attention: shifted along their sequences (labels), or whole sequences on every rank. Host memory.
//!
//! One grouped exchange straight between the callers' rows, nothing is packed. `rows` says which go where.

use crate::error::{Error, Result, Status};
use crate::exec::{Link, Stats};
use crate::group::{Call, Group, Header};
use crate::holding::tokens;
use crate::partition::Side;
use crate::problem::{Fnv, Problem};
use crate::rows::{Exchange, exchange};
use crate::transport::{Message, Piece};
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// What a caller gives to one call.
pub struct Args {
    /// Where the tokens are; `ranks` is the group's size.
    pub problem: Problem,
    /// On which side.
    pub side: Side,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// This rank's rows, one after another.
    pub local: Rows,
    /// Where the result goes.
    pub out: Rows,
}

/// Memory of a caller's.
#[derive(Clone, Copy)]
pub struct Rows {
    /// First byte; may be null where there are no rows.
    pub ptr: *mut u8,
    /// Number of rows.
    pub count: usize,
}

/// Every row of `out` gets the row `by` tokens after it in its sequence; rows without one are left as they are. Collective, blocking.
///
/// Arguments that could not even be read come as an error: it is posted to the other members, who would wait otherwise.
///
/// # Safety
/// The memory in the arguments is valid for its rows, and `out` overlaps nothing.
pub unsafe fn shift(group: &Group, by: i32, args: Result<Args>) -> Result<()> {
    let rank = group.rank();
    let moves = |a: &Args| {
        let held = tokens(&a.problem, rank, a.side).len();
        sized("local", a.local.count, held, group)?;
        sized("out", a.out.count, held, group)?;
        Ok(exchange(&a.problem, rank, a.side, by))
    };
    // SAFETY: the caller's promise; the lists name rows that were counted.
    unsafe { run(group, Call::Shift, by, args, moves) }
}

/// `out` gets the rows of all padded sequences, in their order. Collective, blocking. In all else as [`shift`].
///
/// # Safety
/// As [`shift`].
pub unsafe fn gather(group: &Group, args: Result<Args>) -> Result<()> {
    let moves = |a: &Args| {
        let held: Vec<Vec<u32>> =
            (0..group.size()).map(|r| tokens(&a.problem, r, a.side)).collect();
        let mine = held[group.rank() as usize].len();
        sized("local", a.local.count, mine, group)?;
        sized("out", a.out.count, held.iter().map(Vec::len).sum(), group)?;
        Ok(Exchange { sends: vec![(0..mine as u32).collect(); held.len()], recvs: held })
    };
    // SAFETY: the caller's promise; the lists name rows that were counted.
    unsafe { run(group, Call::Gather, 0, args, moves) }
}

fn sized(name: &str, got: usize, want: usize, group: &Group) -> Result<()> {
    match got == want {
        true => Ok(()),
        false => Err(Error::argument(format!(
            "{name}_rows: got {got}, must be {want} (rank {})",
            group.parent_rank()
        ))),
    }
}

/// # Safety
/// As [`shift`]; the lists that `moves` makes name rows of `local` and of `out`.
unsafe fn run(
    group: &Group,
    call: Call,
    by: i32,
    args: Result<Args>,
    moves: impl FnOnce(&Args) -> Result<Exchange>,
) -> Result<()> {
    let prepare = || {
        let args = args?;
        if group.device().is_some() {
            return Err(Error::unsupported(
                "group: rows are collected on the CPU; on CUDA, cp_partition_shift_exchange and cp_partition_order say what the framework's own collectives move",
            ));
        }
        let moves = moves(&args)?;
        let mut h = Fnv::default();
        (args.problem.fingerprint(), args.side, by, args.row_bytes).hash(&mut h);
        Ok((h.finish(), args, moves))
    };
    // A panic here is a bug, but the others must not wait for this rank because of it.
    let ready =
        catch_unwind(AssertUnwindSafe(prepare)).unwrap_or_else(|e| Err(Error::from_panic(e)));
    let header = Header { call, hash: ready.as_ref().map_or(0, |(hash, ..)| *hash) };
    let (_, args, moves) = group.agree(header, ready)?;
    let me = group.rank() as usize;
    for (from, to) in moves.sends[me].iter().zip(&moves.recvs[me]) {
        // SAFETY: rows of the caller's memory, which do not overlap.
        unsafe {
            let from = args.local.ptr.add(*from as usize * args.row_bytes);
            let to = args.out.ptr.add(*to as usize * args.row_bytes);
            std::ptr::copy_nonoverlapping(from, to, args.row_bytes);
        }
    }
    let messages = |lists: &[Vec<u32>], rows: Rows| -> Vec<Message> {
        let peers = (0..lists.len()).filter(|p| *p != me && !lists[*p].is_empty());
        let one = |p: usize| Message {
            peer: group.members()[p],
            pieces: pieces(&lists[p], rows, args.row_bytes),
        };
        peers.map(one).collect()
    };
    let (sends, recvs) = (messages(&moves.sends, args.local), messages(&moves.recvs, args.out));
    group.linked(|link| match link {
        // SAFETY: the pieces are rows of the caller's memory, which outlives this call; on errors `trade` gives up.
        Some(link) => unsafe { trade(link, &sends, &recvs) },
        None => Ok(Stats::default()),
    })
}

/// Rows as bytes, neighbours in one piece.
fn pieces(list: &[u32], rows: Rows, row_bytes: usize) -> Vec<Piece> {
    let run = |run: &[u32]| Piece {
        ptr: rows.ptr.wrapping_add(run[0] as usize * row_bytes),
        len: run.len() * row_bytes,
    };
    list.chunk_by(|a, b| a + 1 == *b).map(run).collect()
}

/// One exchange, to its end.
///
/// # Safety
/// The pieces point to memory that stays valid.
unsafe fn trade(link: Link, sends: &[Message], recvs: &[Message]) -> Result<Stats> {
    let bytes = |list: &[Message]| list.iter().map(|m| m.bytes() as u64).sum();
    let start = Instant::now();
    let mut exchange = || {
        // SAFETY: the caller's promise; below, every error gives the exchange up.
        unsafe { link.transport.start(sends, recvs)? };
        while !link.transport.wait()? {
            if start.elapsed() > link.timeout {
                let peer = link.transport.waiting_for().map_or("?".into(), |p| p.to_string());
                return Err(Error::new(
                    Status::Timeout,
                    format!(
                        "rank {}: rank {peer} did not end its part of an exchange of rows within {} ms",
                        link.transport.rank(),
                        link.timeout.as_millis()
                    ),
                ));
            }
        }
        Ok(())
    };
    match exchange() {
        Ok(()) => Ok(Stats {
            sent: bytes(sends),
            received: bytes(recvs),
            exposed_ns: start.elapsed().as_nanos() as u64,
        }),
        Err(e) => {
            link.transport.give_up(e.clone());
            Err(e)
        }
    }
}
