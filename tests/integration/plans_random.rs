//! Random plans, up to 64 ranks, proved together. `CP_SEED` picks other cases, `CP_CASES` more of them:
//! `CP_SEED=$RANDOM CP_CASES=20000 cargo test --release random_plans`.

use crate::plans::prove;
use context_parallel::balance::Dealt;
use context_parallel::dtype::{DType, Fp8};
use context_parallel::error::Status;
use context_parallel::mask::Mask;
use context_parallel::partition::{Partition, Stretch};
use context_parallel::plan::account::workspace_bytes;
use context_parallel::plan::check::check;
use context_parallel::plan::{self, Options, Pass, Plan};
use context_parallel::problem::{CommType, Extent, Latent, Problem, Sequence, Wire};
use context_parallel::regions::{Region, Regions};
use context_parallel::score::{BiasShape, Reach, Score};
use std::sync::Arc;

/// Xorshift (Marsaglia, 2003), 64 bits.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number in `low ..= high`.
    pub fn within(&mut self, low: u32, high: u32) -> u32 {
        low + ((self.next() >> 16) % u64::from(high - low + 1)) as u32
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: u32) -> bool {
        self.within(1, n) == 1
    }

    pub fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.within(0, list.len() as u32 - 1) as usize].clone()
    }
}

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

#[test]
fn random_plans() {
    let (seed, cases) = (setting("CP_SEED", 1), setting("CP_CASES", 400));
    println!("CP_SEED={seed} CP_CASES={cases}");
    for case in 0..cases {
        let mut r = Random::new(seed.wrapping_mul(1_000_003).wrapping_add(case));
        let p = any_problem(&mut r);
        prove(&p);
        if case % 4 == 0 {
            prove_with_mixed_packing(&mut r, p);
        }
    }
}

/// Whether its K and V are dense is each rank's own matter.
fn prove_with_mixed_packing(r: &mut Random, p: Problem) {
    let p = Arc::new(p);
    for pass in [Pass::Forward, Pass::Backward] {
        let same_pieces = r.one_in(2);
        let pack = |r: &mut Random| Options { pack: r.one_in(2), saved: false, same_pieces };
        let plans: Vec<Plan> =
            (0..p.ranks).map(|rank| Plan::new(&p, rank, pass, pack(r))).collect();
        check(&plans).unwrap_or_else(|e| panic!("{e}: mixed packing, {pass:?} {p:?}"));
    }
}

/// The cheap answer about memory against the plans themselves.
#[test]
fn peaks_are_those_of_the_plans() {
    let two_sided = Problem {
        partition: Partition::Contiguous,
        mask: Mask { left: Some(10), right: Some(10), ..Mask::FULL },
        ..crate::plans::problem(5, CommType::P2p, 0, 50, 4, 2)
    };
    let peaks = plan::peaks(&two_sided, false);
    assert!(peaks[0] > peaks[1], "both neighbours at once, or one after the other");
    assert_eq!(peaks[1], peaks[3], "only the neighbours are needed, in however many stages");
    assert_eq!(plan::fewest_stages(&two_sided, peaks[0], false), Ok(1));
    assert_eq!(plan::fewest_stages(&two_sided, peaks[0] - 1, false), Ok(2));
    assert_eq!(plan::fewest_stages(&two_sided, 0, false).unwrap_err().status, Status::OutOfMemory);
    let mut rising = 0;
    let random = (0..60).map(|case| any_problem(&mut Random::new(case)));
    for (case, p) in random.filter(|p| p.ranks <= 16).chain([two_sided]).enumerate() {
        let saved = case % 3 == 0;
        let options = Options { saved, ..Options::default() };
        let most = p.teams() - 1;
        let counts = if p.relay { most..=most } else { most.min(1)..=most };
        let want: Vec<u64> = counts
            .map(|stages| {
                let p = Arc::new(Problem { stages, ..p.clone() });
                let plans = (0..p.ranks).flat_map(|r| Plan::both(&p, r, options));
                plans.map(|plan| workspace_bytes(&plan) as u64).max().unwrap()
            })
            .collect();
        assert_eq!(plan::peaks(&p, saved), want, "saved {saved}: {p:?}");
        rising += u32::from(!want.is_sorted_by(|a, b| a >= b));
    }
    assert!(rising > 0, "if more stages never needed more memory, a binary search would do");
}

/// Any problem that validates, small enough to be proved.
pub fn any_problem(r: &mut Random) -> Problem {
    let ranks = match r.within(0, 9) {
        0..6 => r.within(1, 8),
        6..9 => r.within(9, 24),
        _ => r.within(25, 64),
    };
    let comm = r.of(&CommType::ALL);
    let divisors: Vec<u32> = (1..=ranks).filter(|u| ranks.is_multiple_of(*u)).collect();
    let inner = comm.inner(ranks, if comm == CommType::A2aP2p { r.of(&divisors) } else { 0 });
    let inner = inner.unwrap();
    let teams = ranks / inner;
    let stages = match r.within(0, 2) {
        0 if teams > 1 => r.within(1, teams - 1),
        _ => comm.default_stages(teams),
    };
    let kv_heads = r.within(1, 5);
    let (seqs, packed) = any_sequences(r, ranks);
    let mut p = Problem {
        score: any_score(r),
        latent: None,
        ranks,
        inner,
        stages,
        relay: stages + 1 == teams && stages > 0 && r.one_in(4),
        partition: r.of(&[Partition::Zigzag, Partition::Contiguous, Partition::Striped]),
        mask: any_mask(r, seqs[0].k.padded),
        packed,
        regions: any_regions(r, &seqs),
        seqs,
        heads: kv_heads * r.within(1, 4),
        kv_heads,
        dim_qk: 8 * r.within(1, 3),
        dim_v: 8 * r.within(1, 3),
        dtype: r.of(&[DType::F32, DType::Bf16, DType::F16]),
        wire: r.of(&[Wire::Storage, Wire::F32]),
        kv_wire: r.of(&[None, None, Some(Fp8::E4m3), Some(Fp8::E5m2)]),
        scale: 1.0,
    };
    if r.one_in(4) {
        p.partition = any_list(r, &p);
    } else if p.packed && p.seqs.iter().all(|s| s.q == s.k) && r.one_in(3) {
        p.partition = Partition::Balanced;
        Dealt::default().resolve(&mut p);
    }
    if p.kv_wire.is_none() && r.one_in(4) {
        p.kv_heads = p.heads;
        let rope = 8 * r.within(0, p.dim_qk / 8 - 1);
        p.latent = Some(Latent { dim: 8 * r.within(1, 5), rope });
    }
    if matches!(p.partition, Partition::List { .. }) && !p.packed {
        p.score.bias = None; // entries are dealt differently
    }
    p
}

/// What scores depend on changes no message between teams; numbers per head add an exchange.
fn any_score(r: &mut Random) -> Score {
    let reach = [None, Some(Reach::Rank), Some(Reach::Group)];
    match r.one_in(2) {
        true => Score::default(),
        false => Score {
            softcap: if r.one_in(2) { 3.0 } else { 0.0 },
            sinks: r.of(&reach),
            max_logit: r.of(&reach),
            bias: any_bias(r),
            ..Score::default()
        },
    }
}

fn any_bias(r: &mut Random) -> Option<BiasShape> {
    let queries = !r.one_in(4);
    let shape = BiasShape {
        batch: false,
        heads: queries && r.one_in(2),
        queries,
        gradient: queries && r.one_in(2),
    };
    (!r.one_in(3)).then_some(shape)
}

fn any_mask(r: &mut Random, length: u32) -> Mask {
    let window = |r: &mut Random| match r.within(0, 3) {
        0 => Some(r.within(0, 3)),
        1 => Some(r.within(0, length + 2)),
        _ => None,
    };
    Mask { causal: !r.one_in(3), bottom_right: r.one_in(3), left: window(r), right: window(r) }
}

/// In one of three problems: some regions of each sequence, of all of it or of small parts, without a pair in common.
fn any_regions(r: &mut Random, seqs: &[Sequence]) -> Regions {
    let mut list: Vec<Region> = Vec::new();
    let wanted = if r.one_in(3) { r.within(1, 12) } else { 0 };
    let lengths: Vec<(u32, u32)> = seqs.iter().map(|s| (s.q.len, s.k.len)).collect();
    for _ in 0..wanted {
        let seq = r.within(0, seqs.len() as u32 - 1);
        let (q, k) = lengths[seq as usize];
        if q == 0 || k == 0 {
            continue;
        }
        let region = any_region(r, seq, q, k);
        list.push(region);
        if Regions::new(&list).validate(&lengths).is_err() {
            list.pop();
        }
    }
    let place = |r: &mut Random, list: &[Region]| r.within(0, list.len() as u32 - 1) as usize;
    for i in 0..list.len() {
        let other = place(r, &list);
        list.swap(i, other);
    }
    Regions::new(&list)
}

fn any_region(r: &mut Random, seq: u32, q: u32, k: u32) -> Region {
    let range = |r: &mut Random, len: u32| {
        let from = if r.one_in(3) { 0 } else { r.within(0, len - 1) };
        (from, if r.one_in(3) { len } else { r.within(from + 1, len) })
    };
    let limit = |r: &mut Random| (!r.one_in(3)).then(|| r.within(0, q + k) as i32 - q as i32);
    let (lo, hi) = (limit(r), limit(r));
    let hi = match (lo, hi) {
        (Some(lo), Some(hi)) => Some(hi.max(lo)),
        _ => hi,
    };
    Region { seq, q: range(r, q), k: range(r, k), lo, hi }
}

/// A batch of equal padded lengths, padded left or right, or packed documents; sometimes with other lengths for keys.
fn any_sequences(r: &mut Random, ranks: u32) -> (Vec<Sequence>, bool) {
    let cross = r.one_in(3);
    let packed = r.one_in(2);
    let total = if ranks > 24 { r.within(1, 260) } else { r.within(1, 90) };
    let count = if packed { r.within(1, 12) } else { r.within(1, 3) };
    let padded = [r.within(1, total.div_ceil(count)), r.within(1, total.div_ceil(count))];
    let extent = |r: &mut Random, side: usize| {
        let padded = match packed {
            true => r.within(0, 2 * total.div_ceil(count)),
            false => padded[side],
        };
        match r.within(0, 3) {
            0 => {
                let len = r.within(0, padded);
                Extent { before: r.within(0, padded - len), len, padded }
            }
            1 => Extent { before: 0, len: r.within(0, padded), padded },
            _ => Extent::full(padded),
        }
    };
    let sequence = |r: &mut Random| {
        let q = extent(r, 0);
        Sequence { q, k: if cross { extent(r, 1) } else { q } }
    };
    ((0..count).map(|_| sequence(r)).collect(), packed)
}

/// Every sequence cut into pieces at random, dealt at random, in random order; the same step for its queries and keys. The
/// entries of a dense batch are cut and dealt alike, so that each has as many tokens on a rank.
fn any_list(r: &mut Random, p: &Problem) -> Partition {
    let mut lists = [(); 2].map(|()| vec![Vec::new(); p.ranks as usize]);
    let entries = if p.packed { 1 } else { p.seqs.len() };
    for (seq, s) in p.seqs.iter().enumerate().step_by(entries) {
        let step = if r.one_in(2) { 1 } else { r.within(1, 4) };
        for (side, length) in [s.q.padded, s.k.padded].into_iter().enumerate() {
            for first in 0..step.min(length) {
                let count = (length - first).div_ceil(step);
                let mut at = 0;
                while at < count {
                    let len = r.within(1, count - at);
                    let start = first + at * step;
                    let rank = r.within(0, p.ranks - 1) as usize;
                    for seq in seq..seq + entries {
                        // The step of a single token says nothing.
                        let own_step = if len == 1 { r.within(1, 4) } else { step };
                        let list = &mut lists[side][rank];
                        let place = r.within(0, list.len() as u32) as usize;
                        let seq = seq as u32;
                        list.insert(place, Stretch { seq, start, step: own_step, len });
                    }
                    at += len;
                }
            }
        }
    }
    let [q, k] = lists;
    Partition::List { q, k }
}
