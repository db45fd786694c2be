//! The user table, with another transport behind C functions.

use super::{Ranks, all_pairs, on_all, random_groups, soon, status, swap};
use crate::error::{Result, Status};
use crate::transport::local::local_group;
use crate::transport::user::{CpMessage, CpPiece, CpTransportOps, from_ops};
use crate::transport::{Message, Piece, Transport};
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

static DESTROYED: AtomicUsize = AtomicUsize::new(0);

struct Behind {
    inner: Box<dyn Transport>,
    waited: Option<u32>,
}

/// # Safety
/// `ctx` is a `Behind`.
unsafe fn behind<'a>(ctx: *mut c_void) -> &'a mut Behind {
    // SAFETY: the functions below are called with the context of `table` only.
    unsafe { &mut *ctx.cast() }
}

fn number<T>(r: &Result<T>) -> i32 {
    status(r) as i32
}

/// # Safety
/// As `cp_transport_ops` says.
unsafe fn messages(m: *const CpMessage, n: usize) -> Vec<Message> {
    // SAFETY: an array of that length.
    let all: &[CpMessage] = unsafe { std::slice::from_raw_parts(m, n) };
    for (i, m) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|o| o.peer != m.peer), "two messages for one peer");
    }
    let pieces = |m: &CpMessage| -> Vec<Piece> {
        // SAFETY: an array of that length.
        let all: &[CpPiece] = unsafe { std::slice::from_raw_parts(m.pieces, m.n_pieces as usize) };
        all.iter()
            .map(|p| {
                assert!(p.bytes > 0 && !p.ptr.is_null());
                Piece { ptr: p.ptr.cast(), len: p.bytes }
            })
            .collect()
    };
    all.iter().map(|m| Message { peer: m.peer, pieces: pieces(m) }).collect()
}

unsafe extern "C" fn start(
    ctx: *mut c_void,
    s: *const CpMessage,
    n_s: usize,
    r: *const CpMessage,
    n_r: usize,
) -> i32 {
    // SAFETY: as the table's contract says.
    unsafe { number(&behind(ctx).inner.start(&messages(s, n_s), &messages(r, n_r))) }
}

unsafe extern "C" fn test(ctx: *mut c_void, done: *mut i32) -> i32 {
    // SAFETY: as the table's contract says.
    let b = unsafe { behind(ctx) };
    b.waited = b.inner.waiting_for();
    let r = b.inner.wait();
    // SAFETY: a live integer.
    unsafe { *done = i32::from(r == Ok(true)) };
    number(&r)
}

unsafe extern "C" fn cancel(ctx: *mut c_void) {
    // SAFETY: as the table's contract says.
    unsafe { behind(ctx) }.inner.cancel();
}

unsafe extern "C" fn allgather(
    ctx: *mut c_void,
    members: *const u32,
    n: usize,
    mine: *const c_void,
    all: *mut c_void,
    bytes: usize,
    ms: u64,
) -> i32 {
    // SAFETY: as the table's contract says.
    let (b, members, mine) = unsafe {
        (
            behind(ctx),
            std::slice::from_raw_parts(members, n),
            std::slice::from_raw_parts(mine.cast::<u8>(), bytes),
        )
    };
    let r = b.inner.allgather(members, mine, Instant::now() + Duration::from_millis(ms));
    match &r {
        // SAFETY: `all` has room for n times `bytes`.
        Ok(got) => unsafe { std::ptr::copy_nonoverlapping(got.as_ptr(), all.cast(), got.len()) },
        Err(_) => b.waited = members.iter().copied().find(|&m| m != b.inner.rank()),
    }
    number(&r)
}

unsafe extern "C" fn destroy(ctx: *mut c_void) {
    DESTROYED.fetch_add(1, Ordering::SeqCst);
    // SAFETY: made by `table` with Box.
    drop(unsafe { Box::from_raw(ctx.cast::<Behind>()) });
}

unsafe extern "C" fn waiting_for(ctx: *mut c_void, peer: *mut u32) -> i32 {
    // SAFETY: as the table's contract says.
    let waited = unsafe { behind(ctx) }.waited;
    if let Some(p) = waited {
        // SAFETY: a live integer.
        unsafe { *peer = p };
    }
    i32::from(waited.is_none())
}

fn table(inner: Box<dyn Transport>) -> CpTransportOps {
    CpTransportOps {
        struct_size: size_of::<CpTransportOps>() as u32,
        flags: 0,
        ctx: Box::into_raw(Box::new(Behind { inner, waited: None })).cast(),
        start: Some(start),
        test: Some(test),
        cancel: Some(cancel),
        allgather: Some(allgather),
        destroy: Some(destroy),
        waiting_for: Some(waiting_for),
    }
}

fn user_group(size: u32) -> Ranks {
    let wrap = |inner: Box<dyn Transport>| {
        let rank = inner.rank();
        // SAFETY: `table` keeps the contract.
        unsafe { from_ops(&table(inner), rank, size) }.unwrap()
    };
    local_group(size).into_iter().map(wrap).collect()
}

#[test]
fn groups_through_the_table() {
    for size in 1..=5 {
        on_all(user_group(size), |mut t| {
            assert_eq!(t.name(), "user");
            random_groups(&mut *t, 300 + u64::from(size), 8, 3000);
            all_pairs(&mut *t, 100, 3);
        });
    }
}

#[test]
fn table_errors() {
    let errors = on_all(user_group(2), |mut t| {
        if t.rank() == 0 { swap(&mut *t, 1, 4, 4) } else { swap(&mut *t, 0, 5, 4) }
    });
    for (rank, e) in errors.iter().enumerate() {
        assert_eq!(status(e), Status::Mismatch);
        let words = format!(
            "rank {rank}: test of the user transport returned 8, waiting for rank {}",
            1 - rank
        );
        assert!(e.as_ref().unwrap_err().text.contains(&words), "{e:?}");
    }
    let mut ranks = user_group(2);
    let began = Instant::now();
    let late = ranks[0].allgather(&[0, 1], &[1], Instant::now() + Duration::from_millis(50));
    assert_eq!(status(&late), Status::Timeout);
    assert!(
        late.as_ref().unwrap_err().text.contains("rank 1 did not come to the allgather"),
        "{late:?}"
    );
    assert_eq!(late, ranks[0].allgather(&[0, 1], &[1], soon(9)));
    assert!(began.elapsed() < Duration::from_secs(5));
    ranks[1].aborter()();
    assert_eq!(status(&ranks[1].allgather(&[0, 1], &[1], soon(9))), Status::Aborted);
}

#[test]
fn bad_tables() {
    let refuse = |change: &dyn Fn(&mut CpTransportOps), wanted: Status, words: &str| {
        let mut ops = table(local_group(1).remove(0));
        change(&mut ops);
        // SAFETY: what is wrong with the table is found before it is used.
        let r = unsafe { from_ops(&ops, 0, 1) };
        assert_eq!(status(&r), wanted, "{words}");
        let text = r.err().unwrap().text;
        assert!(text.contains(words), "{text}");
        // SAFETY: still ours.
        unsafe { destroy(ops.ctx) };
    };
    refuse(&|o| o.struct_size = 8, Status::InvalidArgument, "ops.struct_size is 8");
    refuse(&|o| o.flags = 2, Status::InvalidArgument, "ops.flags is 0x2");
    refuse(&|o| o.start = None, Status::InvalidArgument, "ops.start is NULL");
    refuse(&|o| o.test = None, Status::InvalidArgument, "ops.test is NULL");
    refuse(&|o| o.cancel = None, Status::InvalidArgument, "ops.cancel is NULL");
    refuse(&|o| o.allgather = None, Status::InvalidArgument, "ops.allgather is NULL");
    // SAFETY: NULL is allowed, and refused.
    let null = unsafe { from_ops(std::ptr::null(), 0, 1) };
    assert!(null.err().unwrap().text.contains("ops is NULL"));

    #[repr(C)]
    struct Longer(CpTransportOps, u64);
    let grown = |tail| {
        let mut longer = Longer(table(local_group(1).remove(0)), tail);
        longer.0.struct_size = size_of::<Longer>() as u32;
        // SAFETY: as many bytes as the size says.
        let r = unsafe { from_ops((&raw const longer).cast(), 0, 1) };
        if r.is_err() {
            // SAFETY: still ours.
            unsafe { destroy(longer.0.ctx) };
        }
        status(&r)
    };
    assert_eq!((grown(0), grown(1)), (Status::Ok, Status::Version));

    let before = DESTROYED.load(Ordering::SeqCst);
    // A table from before `destroy` and `waiting_for` existed.
    let mut ops = table(local_group(1).remove(0));
    ops.struct_size = std::mem::offset_of!(CpTransportOps, destroy) as u32;
    // SAFETY: `table` keeps the contract.
    drop(unsafe { from_ops(&ops, 0, 1) }.unwrap());
    // SAFETY: still ours, as nothing knew `destroy`.
    unsafe { destroy(ops.ctx) };
    assert!(DESTROYED.load(Ordering::SeqCst) > before);
}
