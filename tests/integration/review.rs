//! Defects that a reading of the sources found: mistakes of one rank that left others waiting, or that the contract does not allow.

use crate::layers::{Batch, PATIENCE, comm, config, equal_alone, layer, one, ranks};
use crate::ranks::{Layout, on_threads};
use context_parallel::attention::{Attention, Comm, Config};
use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::capi::abi::*;
use context_parallel::capi::about::cp_last_error;
use context_parallel::capi::attention::*;
use context_parallel::capi::group::*;
use context_parallel::capi::partition::cp_partition_tokens;
use context_parallel::error::{Error, Result, Status};
use context_parallel::group::Group;
use context_parallel::holding::holding;
use context_parallel::partition::{Partition, Side, Stretch};
use context_parallel::plan::{Pass, Tensor};
use context_parallel::problem::{CommType, Sequence};
use context_parallel::score::{BiasShape, Score};
use context_parallel::transport::bootstrap::{Kind, init_from_allgather};
use context_parallel::transport::local::local_group;
use std::ffi::CStr;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Subsets agree about nothing beforehand. Whether forward leaves its head-split tensors decides what backward exchanges.
#[test]
fn save_is_agreed_on_subsets_too() {
    let (seqs, inputs) = one(33);
    let began = Instant::now();
    let errors = ranks(2, PATIENCE, |rank, group| {
        let mut layer = layer(Config { save: rank == 0, ..config() });
        layer.set_group(&group.subset(&[1, 0])?, Ok(comm(CommType::A2a)))?;
        let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        Ok(batch.forward(&mut layer).expect_err("one rank saves, the other does not"))
    });
    assert!(began.elapsed() < PATIENCE / 2, "hung");
    for e in errors {
        assert_eq!(e.status, Status::Mismatch, "{e}");
    }
}

/// A dense tensor is `[batch, seq, …]`: a rank whose list has a number of rows that the batch does not divide has no such tensor.
#[test]
fn rows_of_a_list_fill_the_batch() {
    let config = Config { heads: 1, kv_heads: 1, ..config() };
    let problem = |rows: [u32; 2]| {
        let stretch = |seq, start, len| Stretch { seq, start, step: 1, len };
        let [a, b] = rows;
        let first = vec![stretch(0, 0, a), stretch(1, 0, b)];
        let second = vec![stretch(0, a, 6 - a), stretch(1, b, 6 - b)];
        let lists = vec![first, second];
        let list = Partition::List { q: lists.clone(), k: lists };
        config.problem(comm(CommType::P2p), 2, vec![Sequence::square(6); 2], &list)
    };
    problem([2, 4]).unwrap();
    let error = problem([2, 3]).expect_err("five rows in a batch of two");
    assert_eq!(error.status, Status::InvalidArgument, "{error}");
    assert!(error.text.contains("rank 0") && error.text.contains('5'), "{error}");
}

/// Turning context parallelism off again and again costs nothing: it is the same group of one, with the plans it has.
#[test]
fn a_layer_has_one_group_of_one() {
    ranks(2, PATIENCE, |_, group| {
        let mut layer = layer(config());
        let alone = layer.group().parent_address();
        for _ in 0..3 {
            layer.set_group(&group, Ok(comm(CommType::P2p)))?;
            layer.clear_group();
            assert_eq!(layer.group().parent_address(), alone);
        }
        Ok(())
    });
}

/// A list of all ranks in order is still a subset, and attaching a subset is local.
#[test]
fn a_subset_of_all_ranks_is_attached_locally() {
    ranks(2, Duration::from_millis(500), |rank, group| {
        let subset = group.subset(&[0, 1])?;
        if rank == 0 {
            layer(config()).set_group(&subset, Ok(comm(CommType::P2p)))?;
        }
        // The parent itself is still agreed about.
        let mut layer = layer(config());
        layer.set_group(&subset, Ok(comm(CommType::P2p)))?;
        layer.set_group(&group, Ok(comm(CommType::P2p)))
    });
}

/// Ranks that call different sets of ranks are out of step for good, and later calls say so.
#[test]
fn different_sets_of_ranks_lose_the_group() {
    ranks(3, PATIENCE, |rank, group| {
        let list: &[u32] = if rank == 1 { &[0, 1] } else { &[0, 1, 2] };
        let error = group.subset(list)?.barrier().expect_err("other members");
        assert_eq!(error.status, Status::Mismatch, "{error}");
        let error = group.barrier().expect_err("the group is lost");
        assert!(error.status.loses_group(), "rank {rank}: {error}");
        assert!(error.text.contains("the group is lost since"), "{error}");
        Ok(())
    });
}

/// One rank gathers strided keys, the other sends dense ones as they lie: the same bytes.
#[test]
fn ranks_may_differ_in_layout() {
    let (seqs, inputs) = one(33);
    for kind in CommType::ALL {
        let done = ranks(4, PATIENCE, |rank, group| {
            let mut layer = layer(config());
            layer.set_group(&group, Ok(comm(kind)))?;
            let layout = Layout::ALL[rank as usize];
            let mut batch = Batch::new(&layer, &seqs, &inputs, layout);
            batch.both(&mut layer)?;
            Ok(batch)
        });
        equal_alone("layouts", done, &inputs, false);
    }
}

/// A tensor that one rank forgets is refused before anything moves.
#[test]
fn a_forgotten_tensor_is_refused() {
    let (seqs, inputs) = one(33);
    let began = Instant::now();
    ranks(2, PATIENCE, |rank, group| {
        let mut layer = layer(config());
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        let mut args = batch.args(Pass::Forward);
        if rank == 1 {
            args.views.retain(|(t, _)| *t != Tensor::V);
        }
        // SAFETY: the batch's memory.
        let error = unsafe { layer.forward(Ok(args)) }.expect_err("rank 1 has no v");
        let status = if rank == 1 { Status::InvalidArgument } else { Status::Mismatch };
        assert_eq!(error.status, status, "{error}");
        assert!(error.text.contains("v: "), "{error}");
        batch.both(&mut layer)
    });
    assert!(began.elapsed() < PATIENCE / 2, "hung");
}

/// A bug in planning (here: sizes beyond 64 bits, which debug builds notice) is told to the others like any refusal.
#[cfg(debug_assertions)]
#[test]
fn a_panic_before_the_start_reaches_everyone() {
    let (seqs, inputs) = one(33);
    let began = Instant::now();
    ranks(2, PATIENCE, |rank, group| {
        let subset = group.subset(&[1, 0])?;
        let mut good = layer(config());
        good.set_group(&subset, Ok(comm(CommType::P2p)))?;
        let mut batch = Batch::new(&good, &seqs, &inputs, Layout::Dense);
        let error = if rank == 0 {
            let (heads, rows) = (1 << 31, 1 << 28);
            let huge = Config { heads, kv_heads: heads, dim_qk: 256, dim_v: 256, ..config() };
            let mut layer = layer(huge);
            layer.set_group(&subset, Ok(comm(CommType::P2p)))?;
            let mut args = batch.args(Pass::Forward);
            args.seqs = vec![Sequence::square(2 * rows)];
            for (tensor, shape) in &mut args.shapes {
                let dim = if *tensor == Tensor::Lse { 1 } else { 256 };
                *shape = [1, i64::from(rows), i64::from(heads), dim];
            }
            // SAFETY: nothing is computed, as the ranks do not agree.
            unsafe { layer.forward(Ok(args)) }.expect_err("too large").status
        } else {
            batch.forward(&mut good).expect_err("rank 0 cannot plan").status
        };
        assert_eq!(error, [Status::Internal, Status::Mismatch][rank as usize]);
        batch.forward(&mut good)
    });
    assert!(began.elapsed() < PATIENCE / 2, "hung");
}

/// A rank that lost its context says so where the others wait: on the group of the last forward, not on the one attached since.
#[test]
fn a_lost_context_is_told_to_those_who_wait() {
    let (seqs, inputs) = one(33);
    let began = Instant::now();
    ranks(2, PATIENCE, |rank, group| {
        let mut layer = layer(config());
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        batch.forward(&mut layer)?;
        layer.clear_group();
        let (context, args) = (batch.context, batch.args(Pass::Backward));
        let context = if rank == 1 { Err(Error::argument("context: NULL")) } else { Ok(context) };
        // SAFETY: the batch's memory.
        let error = unsafe { layer.backward(context, Ok(args)) }.expect_err("no context");
        let status = if rank == 1 { Status::InvalidArgument } else { Status::Mismatch };
        assert_eq!(error.status, status, "{error}");
        batch.backward(&mut layer)
    });
    assert!(began.elapsed() < PATIENCE / 2, "hung");
}

#[test]
fn the_inner_size_of_many_ranks() {
    let inner = |ranks| CommType::A2aP2p.inner(ranks, 0).unwrap();
    assert_eq!([inner(1), inner(6), inner(65_536), inner(65_537)], [1, 2, 256, 1]);
    let began = Instant::now();
    assert_eq!(inner(u32::MAX), 65_535);
    assert!(began.elapsed() < Duration::from_secs(1));
    let p = Comm::of(CommType::A2aP2p);
    config().supports(p, 65_536).unwrap();
}

/// Rank 0's callback fails after the others had the id: nobody must wait at a socket that rank 0 does not serve.
#[test]
fn a_failed_bootstrap_closes_its_door() {
    let patience = Duration::from_secs(5);
    let began = Instant::now();
    let id = std::sync::Mutex::new(Vec::new());
    let turn = Barrier::new(2);
    let errors: Vec<Result<()>> = std::thread::scope(|scope| {
        let rank = |rank: u32| {
            let (id, turn) = (&id, &turn);
            let mut gather = move |mine: &[u8]| {
                if rank == 0 {
                    id.lock().unwrap().extend_from_slice(mine);
                    turn.wait();
                    return Err(Error::new(Status::Transport, "allgather: the cable was pulled"));
                }
                turn.wait();
                // Rank 0 has given up by the time that the others connect.
                std::thread::sleep(Duration::from_millis(200));
                let mut all = id.lock().unwrap().clone();
                all.extend_from_slice(mine);
                Ok(all)
            };
            init_from_allgather(rank, 2, Kind::Auto, patience, &mut gather).map(|_| ())
        };
        let threads: Vec<_> = (0..2).map(|r| scope.spawn(move || rank(r))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(began.elapsed() < patience / 2, "rank 1 waited for its deadline: {errors:?}");
    assert_eq!(errors[0].as_ref().unwrap_err().status, Status::Transport);
    assert_eq!(errors[1].as_ref().unwrap_err().status, Status::PeerLost);
}

/// The longest deadline that C can name is a deadline like any other.
#[test]
fn the_longest_deadline() {
    let forever = Duration::from_millis(u64::MAX);
    let (seqs, inputs) = one(33);
    on_threads(local_group(2), |_, t| {
        let body = || {
            let group = Group::new(t, forever);
            let mut layer = layer(config());
            layer.set_group(&group, Ok(comm(CommType::P2p)))?;
            Batch::new(&layer, &seqs, &inputs, Layout::Dense).both(&mut layer)
        };
        body().map_err(|e| e.to_string())
    })
    .unwrap();
}

fn last_error() -> String {
    // SAFETY: the thread's own text.
    unsafe { CStr::from_ptr(cp_last_error()) }.to_string_lossy().into_owned()
}

fn sequences() -> cp_sequences {
    // SAFETY: all zeros is a valid struct.
    let mut s: cp_sequences = unsafe { std::mem::zeroed() };
    s.struct_size = size_of::<cp_sequences>() as u32;
    s
}

#[test]
fn cumulative_lengths_that_fall_far() {
    let cu = [0, i32::MAX, i32::MIN];
    let s = cp_sequences { count: 2, cu_seqlens_q: cu.as_ptr(), ..sequences() };
    let mut count = 0;
    // SAFETY: live arguments.
    let status = unsafe {
        let none = std::ptr::null_mut();
        cp_partition_tokens(CP_PARTITION_ZIGZAG, CP_FORMAT_PACKED, &s, 1, 0, 0, none, 0, &mut count)
    };
    assert_eq!(status, CP_ERR_INVALID_ARGUMENT, "{}", last_error());
    assert!(last_error().contains("cu_seqlens_q[2]"), "{}", last_error());
}

/// A count that nobody wrote must not take all memory.
#[test]
fn a_wild_count_is_refused() {
    let s = cp_sequences { count: u32::MAX, seq_q: 4096, ..sequences() };
    let mut count = 0;
    // SAFETY: live arguments.
    let status = unsafe {
        let none = std::ptr::null_mut();
        cp_partition_tokens(CP_PARTITION_ZIGZAG, CP_FORMAT_DENSE, &s, 1, 0, 0, none, 0, &mut count)
    };
    assert_eq!(status, CP_ERR_UNSUPPORTED, "{}", last_error());
    assert!(last_error().contains("sequences.count"), "{}", last_error());
}

/// "A k field that is zero or NULL means as q": also when the padded length of keys is said, and is that of queries.
#[test]
fn key_lengths_default_to_query_lengths() {
    // SAFETY: all zeros is a valid struct.
    let mut config: cp_attention_config = unsafe { std::mem::zeroed() };
    config.struct_size = size_of::<cp_attention_config>() as u32;
    (config.heads, config.head_dim_qk, config.dtype) = (1, 8, CP_DTYPE_F32);
    let mut layer = std::ptr::null_mut();
    // SAFETY: live arguments.
    assert_eq!(unsafe { cp_attention_create(&config, &mut layer) }, CP_OK);
    let flops = |s: cp_sequences| {
        let struct_size = size_of::<cp_report>() as u32;
        let mut report = cp_report { struct_size, ..cp_report::default() };
        // SAFETY: live arguments.
        assert_eq!(unsafe { cp_attention_report(layer, &s, &mut report) }, CP_OK);
        report.forward_flops / (2 * (8 + 8))
    };
    let (five, two) = ([5i32], [2i32]);
    let base = cp_sequences { count: 1, seq_q: 8, lens_q: five.as_ptr(), ..sequences() };
    assert_eq!(flops(base), 25);
    assert_eq!(flops(cp_sequences { seq_k: 8, ..base }), 25);
    assert_eq!(flops(cp_sequences { before_k: two.as_ptr(), ..base }), 25);
    // Other keys: all of them are true unless their lengths are given.
    assert_eq!(flops(cp_sequences { seq_k: 16, ..base }), 80);
    assert_eq!(flops(cp_sequences { seq_k: 16, lens_k: two.as_ptr(), ..base }), 10);
    // SAFETY: made above.
    assert_eq!(unsafe { cp_attention_destroy(layer) }, CP_OK);
}

/// A thread's last cleanup may come after the thread's last error text is gone.
#[test]
fn errors_while_a_thread_ends() {
    struct Cleanup;
    impl Drop for Cleanup {
        fn drop(&mut self) {
            // SAFETY: NULL is refused.
            let status = unsafe { cp_group_barrier(std::ptr::null_mut()) };
            assert_eq!(status, CP_ERR_INVALID_HANDLE);
            assert!(!cp_last_error().is_null());
        }
    }
    thread_local! {
        static CLEANUP: Cleanup = const { Cleanup };
    }
    let thread = std::thread::spawn(|| {
        CLEANUP.with(|_| ());
        // The error text comes to be after the cleanup, so it goes before it.
        // SAFETY: NULL is refused.
        unsafe { cp_group_barrier(std::ptr::null_mut()) };
    });
    thread.join().unwrap();
}

/// The bound is of one sequence; batch entries that share a bias have sums which that has not.
#[test]
fn the_bound_holds_for_a_shared_bias() {
    for (ranks, heads, shared_by_heads) in
        [(4, 2, false), (4, 1, true), (8, 3, false), (3, 2, false)]
    {
        let bias =
            BiasShape { batch: false, heads: !shared_by_heads, queries: true, gradient: true };
        let score = Score { bias: Some(bias), ..Score::default() };
        let config = Config { heads, kv_heads: heads, score, packed: false, ..config() };
        for rank in 0..ranks {
            let transport = local_group(ranks).swap_remove(rank as usize);
            let all: Vec<u32> = (0..ranks).collect();
            let group = Group::new(transport, Duration::from_secs(1)).subset(&all).unwrap();
            let mut layer =
                Attention::new(config.clone(), Cpu::new(1, Simd::Scalar).unwrap()).unwrap();
            layer.set_group(&group, Ok(Comm::of(CommType::A2a))).unwrap();
            for (entries, len) in [(1, 8), (2, 4), (4, 4), (3, 24)] {
                let problem = layer.problem(vec![Sequence::square(len); entries], None).unwrap();
                let rows = holding(&problem, rank, Side::Query).rows;
                let most =
                    (0..ranks).map(|r| holding(&problem, r, Side::Query).rows).max().unwrap();
                let need = layer.account(&problem, Pass::Backward).workspace as usize;
                let bound = layer.workspace_bound(most).unwrap();
                assert!(
                    need <= bound,
                    "P {ranks} rank {rank} ({rows} rows), {heads} heads, {entries} × {len}: {need} bytes, the bound says {bound}"
                );
            }
        }
    }
}
