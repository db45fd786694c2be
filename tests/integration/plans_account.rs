//! What plans cost, against formulas.

use crate::plans::problem;
use context_parallel::mask::Mask;
use context_parallel::partition::Partition;
use context_parallel::plan::account::{Account, summary};
use context_parallel::plan::{Options, Pass, Plan};
use context_parallel::problem::{CommType, Problem};
use std::sync::Arc;

fn costs(p: &Problem, pass: Pass, saved: bool) -> (Account, Account) {
    p.validate().unwrap();
    let plans = Plan::all(&Arc::new(p.clone()), pass, Options { saved, ..Options::default() });
    let s = summary(&plans);
    (s.total, s.worst)
}

/// Rows received over all ranks as a share of a neighbour ring's, which moves every key to P−1 ranks.
fn share_of_ring(p: &Problem) -> f64 {
    let ring = u64::from(p.ranks - 1) * u64::from(p.seqs[0].k.len);
    let relay = Problem { relay: true, ..p.clone() };
    assert_eq!(costs(&relay, Pass::Forward, false).0.received_key_rows, ring);
    costs(p, Pass::Forward, false).0.received_key_rows as f64 / ring as f64
}

/// With c = S/2P rows a chunk, rank r holds chunks r and 2P−1−r.
///
/// Causal zigzag: of a rank o > r, r's late queries see both chunks, of a rank o < r only the early one: 2c or c, 3c for the two
/// directions of a pair, where a ring moves 4c. So it is ¾ for every P.
///
/// With a window of w < c keys, each of the 2P−1 borders between chunks but the middle one, whose chunks lie on one rank, moves
/// w rows: 2(P−1)·w of (P−1)·S is 2w/S. Contiguous slices have P−1 borders: w/S = 0.03125, which four digits show as 0.0312.
#[test]
fn causal_zigzag_moves_three_quarters_of_a_ring() {
    let causal = problem(8, CommType::P2p, 0, 131072, 32, 8);
    let window = Problem { mask: Mask { left: Some(4096), ..Mask::CAUSAL }, ..causal.clone() };
    let slices = Problem { partition: Partition::Contiguous, ..window.clone() };
    assert_eq!(share_of_ring(&causal), 0.75);
    assert_eq!(share_of_ring(&window), 0.0625);
    assert_eq!(share_of_ring(&slices), 0.03125);
    assert_eq!(format!("{:.4}", share_of_ring(&slices)), "0.0312");
    for ranks in [2, 3, 5, 16, 64] {
        let p = problem(ranks, CommType::P2p, 0, 2 * ranks * 100, 4, 2);
        assert_eq!(share_of_ring(&p), 0.75);
    }
    // The busiest rank, the first, still receives what it would in a ring.
    let (_, worst) = costs(&causal, Pass::Forward, false);
    assert_eq!(worst.received_key_rows, 7 * 131072 / 8);
    // And what it computes is an eighth of the triangle: zigzag is even, to the pair.
    let (total, worst) = costs(&causal, Pass::Forward, false);
    assert_eq!(total.pairs, 32 * (131072 * 131073 / 2));
    assert_eq!(worst.pairs, total.pairs / 8);
}

/// Every stage count, and all four names, move the same rows: stages only decide when.
#[test]
fn stages_move_the_same_bytes() {
    let p = problem(8, CommType::P2p, 0, 4096, 8, 2);
    for pass in [Pass::Forward, Pass::Backward] {
        let want = costs(&p, pass, false).0.received;
        for stages in 1..7 {
            assert_eq!(costs(&Problem { stages, ..p.clone() }, pass, false).0.received, want);
        }
    }
}

/// Beyond its own tensors, a rank of a ring needs memory for two stages and its fp32 state, all of S/P rows.
#[test]
fn ring_memory_is_proportional_to_the_local_rows() {
    let length = 65536u64;
    let (heads, kv_heads, dims) = (8, 2, 16); // dqk + dv
    for mask in [Mask::FULL, Mask::CAUSAL] {
        for ranks in [2, 4, 8, 16] {
            let base = problem(ranks, CommType::P2p, 0, length as u32, heads, kv_heads);
            let p = Problem { mask, ..base };
            let (h, hkv) = (u64::from(heads), u64::from(kv_heads));
            let slots = u64::from((ranks - 1).min(2));
            // bf16 keys and values of two stages; fp32 O, maximum and sum.
            let forward = slots * hkv * dims * 2 + h * (dims / 2 + 2) * 4;
            // Keys and values, their gradients on the wire and coming home (bf16, two slots each), one stage's fp32 gradients, and
            // the fp32 sums of dQ, dK, dV and Delta.
            let backward = 3 * slots * hkv * dims * 2
                + hkv * dims * 4
                + h * (dims / 2) * 4
                + hkv * dims * 4
                + h * 4;
            for (pass, per_row) in [(Pass::Forward, forward), (Pass::Backward, backward)] {
                let (_, worst) = costs(&p, pass, false);
                let rows = length / u64::from(ranks);
                println!(
                    "P {ranks:2} {pass:?}: {} bytes, {} a local row",
                    worst.workspace,
                    worst.workspace / rows
                );
                match mask == Mask::FULL {
                    true => assert_eq!(worst.workspace, rows * per_row, "P {ranks} {pass:?}"),
                    false => assert!(worst.workspace <= rows * per_row, "P {ranks} {pass:?}"),
                }
            }
        }
    }
}

/// Bytes that a rank sends, full mask, against the published formulas of the four types (e bytes an element, N elements of a
/// rank's tensor): forward (P−1)·Nkv for p2p and all_gather, (P−1)/P·(Nq+Nkv+No) for a2a; backward 2·(P−1)·Nkv and again
/// (P−1)/P·(No+Nq+Nkv); a2a+p2p is the sum of both over A×R. Ours differ in what they say beside: the head exchange also carries
/// one fp32 number a row and head each way (LSE out, Delta in), because ranks return O and LSE to the caller and take O from the caller
/// instead of keeping a head-split copy; and a backward that was not given the saved head-split tensors trades Q, K, V and
/// LSE again.
#[test]
fn bytes_are_those_of_the_formulas() {
    let (ranks, length, heads, kv_heads) = (8u64, 4096u64, 16u64, 8u64);
    let local = length / ranks;
    let (e, d) = (2, 8);
    let (nq, no, nkv) = (local * heads * d, local * heads * d, local * kv_heads * 2 * d);
    let statistic = local * heads * 4;
    let own = |comm, inner| Problem {
        mask: Mask::FULL,
        ..problem(ranks as u32, comm, inner, length as u32, heads as u32, kv_heads as u32)
    };
    let sent = |p: &Problem, pass, saved| {
        let (total, worst) = costs(p, pass, saved);
        assert_eq!(total.sent, total.received);
        assert_eq!(total.sent, worst.sent * ranks, "all ranks send the same");
        worst.sent
    };
    for comm in [CommType::P2p, CommType::AllGather] {
        let p = own(comm, 0);
        assert_eq!(sent(&p, Pass::Forward, false), (ranks - 1) * nkv * e);
        assert_eq!(sent(&p, Pass::Backward, false), 2 * (ranks - 1) * nkv * e);
    }
    for inner in [2, 4, 8] {
        let (a, r) = (inner, ranks / inner);
        let p = match inner == ranks {
            true => own(CommType::A2a, 0),
            false => own(CommType::A2aP2p, inner as u32),
        };
        let trade = |bytes: u64| bytes * (a - 1) / a;
        let forward = trade((nq + nkv + no) * e) + (r - 1) * nkv * e;
        let backward = trade((no + nq + nkv) * e) + 2 * (r - 1) * nkv * e;
        assert_eq!(sent(&p, Pass::Forward, true), forward + trade(statistic));
        assert_eq!(sent(&p, Pass::Backward, true), backward + trade(statistic));
        let again = trade((nq + nkv) * e + statistic);
        assert_eq!(sent(&p, Pass::Backward, false), backward + trade(statistic) + again);
    }
}

/// A billion tokens, 2^59 pairs a rank or so: what does not fit in 64 bits says so, and nothing wraps.
#[test]
fn operations_beyond_64_bits_stay_at_the_largest() {
    let (total, worst) =
        costs(&problem(4, CommType::P2p, 0, (1 << 30) - 1, 4, 4), Pass::Forward, false);
    let n = (1u64 << 30) - 1;
    assert_eq!(total.pairs, 4 * (n * (n + 1) / 2));
    assert_eq!(total.pairs.checked_mul(32), None);
    assert_eq!((total.flops, worst.pairs * 32), (u64::MAX, worst.flops));
}
