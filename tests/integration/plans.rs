//! Plans without tensors: every rank's plan proved together.

use context_parallel::dtype::DType;
use context_parallel::mask::Mask;
use context_parallel::partition::Partition;
use context_parallel::plan::account::layout;
use context_parallel::plan::{Options, Pass, Plan, check::check};
use context_parallel::problem::{CommType, Extent, Problem, Sequence, Wire};
use context_parallel::regions::Regions;
use context_parallel::score::Score;
use std::sync::Arc;

/// One causal sequence over a plain ring.
pub fn problem(
    ranks: u32,
    comm: CommType,
    inner: u32,
    len: u32,
    heads: u32,
    kv_heads: u32,
) -> Problem {
    let inner = comm.inner(ranks, inner).unwrap();
    Problem {
        score: Score::default(),
        latent: None,
        ranks,
        inner,
        stages: comm.default_stages(ranks / inner),
        relay: false,
        partition: Partition::Zigzag,
        mask: Mask::CAUSAL,
        packed: false,
        seqs: vec![Sequence::square(len)],
        regions: Regions::default(),
        heads,
        kv_heads,
        dim_qk: 8,
        dim_v: 8,
        dtype: DType::Bf16,
        wire: Wire::Storage,
        kv_wire: None,
        scale: 0.25,
    }
}

/// Checks both passes with every launch option.
pub fn prove(p: &Problem) {
    p.validate().unwrap_or_else(|e| panic!("{e}: {p:?}"));
    let p = Arc::new(p.clone());
    for (pack, saved, same_pieces) in [
        (false, false, false),
        (true, false, false),
        (false, true, false),
        (true, true, false),
        (false, false, true),
        (true, true, true),
    ] {
        let options = Options { pack, saved, same_pieces };
        for pass in [Pass::Forward, Pass::Backward] {
            let plans = Plan::all(&p, pass, options);
            if let Err(e) = check(&plans) {
                for plan in &plans {
                    println!("{plan}");
                }
                panic!("{e}\n{pass:?} {options:?} {p:?}");
            }
        }
        if saved {
            for rank in 0..p.ranks {
                let [forward, backward] = [Pass::Forward, Pass::Backward].map(|pass| {
                    let plan = Plan::new(&p, rank, pass, options);
                    let offsets = layout(&plan);
                    let kept = plan.slots.into_iter().filter(|s| s.saved);
                    kept.map(|s| (s, offsets[&s.slot])).collect::<Vec<_>>()
                });
                assert_eq!(forward, backward, "what forward saves is what backward finds: {p:?}");
            }
        }
    }
}

/// The case that exercises most at once: trimmed needs, direct return, replicated heads, nothing divides.
#[test]
fn backward_with_uneven_everything() {
    prove(&problem(5, CommType::A2a, 0, 33, 6, 3));
    prove(&problem(5, CommType::P2p, 0, 33, 6, 2));
    prove(&problem(10, CommType::A2aP2p, 5, 33, 6, 3));
    prove(&problem(6, CommType::A2aP2p, 2, 33, 6, 3));
}

#[test]
fn every_small_case() {
    let masks = [
        Mask::FULL,
        Mask::CAUSAL,
        Mask { bottom_right: true, ..Mask::CAUSAL },
        Mask { left: Some(3), ..Mask::CAUSAL },
        Mask { left: Some(2), right: Some(4), ..Mask::FULL },
        Mask { left: Some(0), right: Some(0), bottom_right: true, ..Mask::FULL },
    ];
    let square = vec![Sequence::square(13)];
    let cross = vec![Sequence { q: Extent::full(9), k: Extent::full(14) }];
    let padded = Extent { before: 2, len: 9, padded: 12 };
    let batch = vec![
        Sequence { q: padded, k: padded },
        Sequence {
            q: Extent { before: 0, len: 0, padded: 12 },
            k: Extent { before: 1, len: 5, padded: 12 },
        },
    ];
    let docs = vec![
        Sequence::square(1),
        Sequence::square(7),
        Sequence { q: padded, k: padded },
        Sequence::square(0),
        Sequence::square(4),
    ];
    for ranks in [1, 2, 3, 4, 6] {
        for comm in CommType::ALL {
            for inner in (1..=ranks)
                .filter(|u| comm == CommType::A2aP2p && ranks % u == 0)
                .chain((comm != CommType::A2aP2p).then_some(0))
            {
                for mask in masks {
                    for partition in [Partition::Zigzag, Partition::Contiguous, Partition::Striped]
                    {
                        for (seqs, packed) in
                            [(&square, false), (&cross, false), (&batch, false), (&docs, true)]
                        {
                            let base = problem(ranks, comm, inner, 13, 4, 2);
                            let p = Problem {
                                mask,
                                partition: partition.clone(),
                                seqs: seqs.clone(),
                                packed,
                                ..base
                            };
                            prove(&p);
                            if p.stages > 1 {
                                prove(&Problem { relay: true, ..p.clone() });
                                prove(&Problem { relay: true, wire: Wire::F32, ..p.clone() });
                                prove(&Problem { stages: p.stages - 1, wire: Wire::F32, ..p });
                            }
                        }
                    }
                }
            }
        }
    }
}
