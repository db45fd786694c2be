//! Scores beyond scale·q·k: soft-cap, ALiBi, dropout, sinks. Plain attention never comes here.
//!
//! The loops are plain Rust over a panel's 32 lanes, compiled once for every instruction set. Before the softmax (or the gradient) scores get their
//! final values, so that it is the one of plain attention with scale 1; what dropout keeps is a bit per lane and key.

use super::kernels::{EXP2, LANES, LOG2_E_REST};
use super::simd::Simd;
use super::tile::KEYS;
use crate::backend::{Effects, View};
use crate::dtype::DType;
use crate::partition::Segment;
use crate::score::{Seed, drop_below, words};

/// A row that is no token: padding, or keys that no slice covers.
const NONE: u32 = u32::MAX;

/// Which token every row of a step is: position and sequence. Rebuilt for every step without allocating once grown.
#[derive(Default)]
pub struct Places {
    /// Of query rows.
    queries: Vec<(u32, u32)>,
    /// Of key rows.
    keys: Vec<u32>,
}

impl Places {
    /// For a step with so many rows.
    pub fn build(&mut self, effects: &Effects, query_rows: usize, key_rows: usize) {
        fn rows(s: &Segment) -> impl Iterator<Item = (usize, u32)> {
            (0..s.len).map(|i| ((s.offset + i) as usize, s.start + i * s.step))
        }
        self.queries.clear();
        self.queries.resize(query_rows, (NONE, 0));
        for s in effects.queries {
            rows(s).for_each(|(row, position)| self.queries[row] = (position, s.seq));
        }
        self.keys.clear();
        self.keys.resize(key_rows, NONE);
        for s in effects.keys {
            rows(s).for_each(|(row, position)| self.keys[row] = position);
        }
    }

    /// Is this query row a token?
    pub fn is_token(&self, row: usize) -> bool {
        self.queries[row].0 != NONE
    }

    /// Positions of key rows.
    pub fn keys(&self, rows: std::ops::Range<usize>) -> &[u32] {
        &self.keys[rows]
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        8 * self.queries.capacity() + 4 * self.keys.capacity()
    }
}

/// What the lanes of a panel are.
pub struct Lanes {
    /// Position of the query; of lanes without a token any.
    position: [u32; LANES],
    /// The key position on its diagonal.
    diagonal: [i32; LANES],
    /// The caller's number for its sequence.
    sequence: [u32; LANES],
    /// Number of its head over all of the model.
    head: [u32; LANES],
    /// ALiBi.
    slope: [f32; LANES],
    /// Rows of the bias and of its gradient, at the first true key; null where there are none.
    bias: [*const u8; LANES],
    d_bias: [*mut f32; LANES],
    /// Elements of a row of the bias from there on. A key that a lane does not see may be of a longer sequence.
    columns: [u32; LANES],
    /// Storage type of the bias.
    dtype: DType,
}

impl Lanes {
    /// For lanes that are (row, local head), `None` beyond the tile; `q_first` is local head 0's number.
    pub fn new(
        effects: &Effects,
        places: &Places,
        q_first: u32,
        lanes: impl Iterator<Item = Option<(usize, usize)>>,
    ) -> Lanes {
        let mut out = Lanes {
            position: [0; LANES],
            diagonal: [0; LANES],
            sequence: [0; LANES],
            head: [0; LANES],
            slope: [0.0; LANES],
            bias: [std::ptr::null(); LANES],
            d_bias: [std::ptr::null_mut(); LANES],
            columns: [0; LANES],
            dtype: effects.bias.map_or(DType::F32, |view| view.dtype),
        };
        for (lane, at) in lanes.take(LANES).enumerate() {
            let Some((row, head)) = at.filter(|(row, _)| places.is_token(*row)) else { continue };
            let (position, seq) = places.queries[row];
            let at = |view: &View| {
                let first = effects.padding[seq as usize] as usize * view.dtype.size();
                view.at(row, if view.heads == 1 { 0 } else { head }).wrapping_add(first)
            };
            if let Some(bias) = &effects.bias {
                out.columns[lane] = bias.dim as u32 - effects.padding[seq as usize];
            }
            out.bias[lane] = effects.bias.as_ref().map_or(std::ptr::null(), |v| at(v).cast_const());
            out.d_bias[lane] =
                effects.d_bias.as_ref().map_or(std::ptr::null_mut(), |v| at(v).cast());
            let head = q_first + head as u32;
            out.position[lane] = position;
            out.diagonal[lane] = position as i32 + effects.diagonals[seq as usize];
            out.sequence[lane] = effects.ids.get(seq as usize).copied().unwrap_or(seq);
            out.head[lane] = effects.score.head_offset + head;
            out.slope[lane] = effects.score.slopes.get(head as usize).copied().unwrap_or(0.0);
        }
        out
    }
}

impl Lanes {
    /// The bias of a lane for a key at a position; 0 where there is none.
    #[inline(always)]
    fn bias_at(&self, lane: usize, key: u32) -> f32 {
        let row = self.bias[lane];
        if key >= self.columns[lane] {
            return 0.0;
        }
        // SAFETY: the row has so many elements; the backend's caller promises that views are valid.
        unsafe {
            match self.dtype {
                DType::F32 => row.cast::<f32>().add(key as usize).read(),
                DType::Bf16 => row.cast::<half::bf16>().add(key as usize).read().to_f32(),
                DType::F16 => row.cast::<half::f16>().add(key as usize).read().to_f32(),
                DType::Fp8(_) => unreachable!("only keys and values travel so"),
            }
        }
    }

    /// Adds to the gradient of the bias, if there is one.
    #[inline(always)]
    fn add_to_bias(&self, lane: usize, key: u32, value: f32) {
        let row = self.d_bias[lane];
        if !row.is_null() {
            // SAFETY: as above; nobody else adds to the same element now (`Cpu::backward`).
            unsafe { *row.add(key as usize) += value };
        }
    }
}

/// The numbers of a step, and its instruction set.
#[derive(Clone, Copy)]
pub struct Formula {
    scale: f32,
    cap: f32,
    /// Dropout: words below this drop. 0: none.
    below: u32,
    /// 1 / (1 − p).
    grow: f32,
    bias: bool,
    seed: u64,
    simd: Simd,
}

impl Formula {
    /// Of a step.
    pub fn new(effects: &Effects, scale: f32, simd: Simd) -> Formula {
        let score = effects.score;
        Formula {
            scale,
            cap: score.softcap,
            below: drop_below(score.dropout),
            grow: 1.0 / (1.0 - score.dropout),
            bias: score.bias.is_some(),
            seed: match effects.seed {
                Seed::Value(seed) => seed,
                // Layers refuse it: the CPU cannot read device memory.
                Seed::At(_) => 0,
            },
            simd,
        }
    }

    /// Are weights dropped?
    pub fn drops(&self) -> bool {
        self.below > 0
    }

    /// What kept weights are multiplied by.
    pub fn grow(&self) -> f32 {
        self.grow
    }
}

/// Which lanes keep each key, bit per lane.
pub type Kept = [u32; KEYS];

/// Runs a function compiled for the instruction set of a formula.
macro_rules! compiled {
    ($name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        #[doc = concat!("See `", stringify!($body), "`.")]
        #[allow(clippy::too_many_arguments)] // one call site each
        pub fn $name(f: &Formula, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2(f: &Formula, $($arg: $type),*) {
                    $body(f, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512(f: &Formula, $($arg: $type),*) {
                    $body(f, $($arg),*)
                }
                match f.simd {
                    Simd::Scalar => {}
                    // SAFETY: the backend was made with an instruction set that this CPU has.
                    Simd::Avx2 => return unsafe { avx2(f, $($arg),*) },
                    // SAFETY: as above.
                    Simd::Avx512 | Simd::Avx512Bf16 => return unsafe { avx512(f, $($arg),*) },
                }
            }
            $body(f, $($arg),*)
        }
    };
}

/// 2^f · 2^n as in the kernels: polynomial, exponent added; 0 below the least normal number.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let y = x * std::f32::consts::LOG2_E;
    let n = y.round_ties_even().clamp(-127.0, 127.0);
    let f = x.mul_add(std::f32::consts::LOG2_E, -n) + x * LOG2_E_REST;
    let mut p = EXP2[0];
    for c in &EXP2[1..] {
        p = p.mul_add(f, *c);
    }
    let scale = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < super::kernels::EXP_MIN { 0.0 } else { p * scale }
}

/// (cap·tanh(x / cap), its derivative).
#[inline(always)]
fn capped(x: f32, cap: f32) -> (f32, f32) {
    // tanh |y| = (1 − e) / (1 + e), e = exp(−2·|y|): no overflow. Small |y|: the difference 1 − e would lose digits, so a series.
    let y = x / cap;
    let a = y.abs();
    let e = exp(-2.0 * a);
    let far = (1.0 - e) / (1.0 + e);
    let s = a * a;
    let near =
        a * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0 - s * (62.0 / 2835.0)))));
    let t = if a < 0.25 { near } else { far };
    (cap * t.copysign(x), 1.0 - t * t)
}

/// A score's value before the bias; and by what its gradient is multiplied on the way to scale·q·k. Without ALiBi the slope is 0.
#[inline(always)]
fn value<const CAP: bool>(f: &Formula, qk: f32, slope: f32, distance: i32) -> (f32, f32) {
    let x = qk * f.scale;
    let (x, derivative) = if CAP { capped(x, f.cap) } else { (x, 1.0) };
    (x - slope * distance.abs() as f32, derivative)
}

/// Final values of scores `[keys][32 lanes]`.
#[inline(always)]
fn adjust_body(f: &Formula, lanes: &Lanes, keys: &[u32], scores: &mut [f32]) {
    match f.cap > 0.0 {
        true => adjust_all::<true>(f, lanes, keys, scores),
        false => adjust_all::<false>(f, lanes, keys, scores),
    }
    if f.bias {
        // Lane by lane: a lane's row of the bias is contiguous.
        for lane in 0..LANES {
            for (row, &key) in scores.chunks_exact_mut(LANES).zip(keys) {
                row[lane] += lanes.bias_at(lane, key);
            }
        }
    }
}

#[inline(always)]
fn adjust_all<const CAP: bool>(f: &Formula, lanes: &Lanes, keys: &[u32], scores: &mut [f32]) {
    for (row, &key) in scores.chunks_exact_mut(LANES).zip(keys) {
        for (lane, x) in row.iter_mut().enumerate() {
            let distance = (key as i32).wrapping_sub(lanes.diagonal[lane]);
            *x = value::<CAP>(f, *x, lanes.slope[lane], distance).0;
        }
    }
}
compiled!(adjust, adjust_body, (lanes: &Lanes, keys: &[u32], scores: &mut [f32]));

/// What dropout keeps of a block of keys.
#[inline(always)]
fn keep_body(f: &Formula, lanes: &Lanes, keys: &[u32], kept: &mut Kept) {
    let mut block = NONE;
    let mut random = [[0u32; LANES]; 4];
    for (bits, &key) in kept.iter_mut().zip(keys) {
        // Rows that are no token have weight 0 whatever is kept.
        if key / 4 != block {
            block = key / 4;
            let all = lanes.sequence.iter().zip(&lanes.head).zip(&lanes.position);
            for (lane, ((sequence, head), position)) in all.enumerate() {
                let four = words(f.seed, *sequence, *head, *position, block);
                for (row, word) in random.iter_mut().zip(four) {
                    row[lane] = word;
                }
            }
        }
        *bits = 0;
        for (lane, word) in random[key as usize % 4].iter().enumerate() {
            *bits |= u32::from(*word >= f.below) << lane;
        }
    }
}
compiled!(keep, keep_body, (lanes: &Lanes, keys: &[u32], kept: &mut Kept));

/// Zeroes dropped weights of P, units `[keys / pairs][32 lanes]`.
pub fn drop_weights(units: &mut [u32], pairs: usize, kept: &[u32]) {
    for (row, keys) in units.chunks_exact_mut(LANES).zip(kept.chunks(pairs)) {
        for (lane, unit) in row.iter_mut().enumerate() {
            let keep = |key: usize| keys.get(key).is_none_or(|bits| bits >> lane & 1 == 1);
            *unit &= match (pairs, keep(0), keep(1)) {
                (1, true, _) | (_, true, true) => u32::MAX,
                (2, true, false) => 0xffff,
                (2, false, true) => 0xffff_0000,
                _ => 0,
            };
        }
    }
}

/// A panel of the backward pass: rows of `stride`, one for each lane.
pub struct Panel<'a> {
    /// q·k; becomes the weights that multiply dO.
    pub scores: &'a mut [f32],
    /// dO·v; becomes dS, without the scale.
    pub d_p: &'a mut [f32],
    /// Between lanes.
    pub stride: usize,
    /// LSE of every lane.
    pub lse: &'a [f32; LANES],
    /// Σ O∘dO of every lane.
    pub delta: &'a [f32; LANES],
    /// First key that a lane sees, and one past the last.
    pub bounds: (&'a [i32; LANES], &'a [i32; LANES]),
}

/// P' and dS of a panel of keys; without dropout everything is kept.
#[inline(always)]
fn gradient_body(f: &Formula, lanes: &Lanes, keys: &[u32], kept: &Kept, panel: &mut Panel) {
    for lane in 0..LANES {
        match f.cap > 0.0 {
            true => gradient_of::<true>(f, lanes, lane, keys, kept, panel),
            false => gradient_of::<false>(f, lanes, lane, keys, kept, panel),
        }
    }
}

/// One lane. What goes through memory of the bias, element by element, is kept out of the loop that computes.
#[inline(always)]
fn gradient_of<const CAP: bool>(
    f: &Formula,
    lanes: &Lanes,
    lane: usize,
    keys: &[u32],
    kept: &Kept,
    panel: &mut Panel,
) {
    let (lse, delta) = (panel.lse[lane], panel.delta[lane]);
    let (lo, hi) = (panel.bounds.0[lane], panel.bounds.1[lane]);
    let (slope, diagonal) = (lanes.slope[lane], lanes.diagonal[lane]);
    let seen = lo.max(0) as usize..(hi.max(0) as usize).min(keys.len());
    let (mut bias, mut slants) = ([0f32; KEYS], [0f32; KEYS]);
    if f.bias {
        for i in seen.clone() {
            bias[i] = lanes.bias_at(lane, keys[i]);
        }
    }
    let at = lane * panel.stride..lane * panel.stride + keys.len();
    let rows = panel.scores[at.clone()].iter_mut().zip(&mut panel.d_p[at]);
    let others = keys.iter().zip(kept).zip(bias.iter().zip(&mut slants));
    for (i, ((s, d), ((&key, bits), (bias, slant)))) in rows.zip(others).enumerate() {
        let (x, derivative) = value::<CAP>(f, *s, slope, (key as i32).wrapping_sub(diagonal));
        let p = exp(x + bias - lse);
        let weight = if bits >> lane & 1 == 1 { f.grow } else { 0.0 };
        let seen = (i as i32 >= lo) & ((i as i32) < hi);
        *slant = p * (*d * weight - delta);
        *s = if seen { p * weight } else { 0.0 };
        *d = if seen { *slant * derivative } else { 0.0 };
    }
    if f.bias {
        for i in seen {
            lanes.add_to_bias(lane, keys[i], slants[i]);
        }
    }
}
compiled!(gradient, gradient_body, (lanes: &Lanes, keys: &[u32], kept: &Kept, panel: &mut Panel));

/// bf16, rounded to nearest, ties to even; without a branch.
#[inline(always)]
fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded }
}

/// Pairs P and dS as the products want them: neighbouring lanes, and neighbouring keys of dS.
#[inline(always)]
fn pair_body(
    _: &Formula,
    panel: &Panel,
    keys: usize,
    p_lanes: &mut [u32],
    ds_lanes: &mut [u32],
    ds_keys: &mut [u32],
) {
    let stride = panel.stride;
    let by_lanes = |from: &[f32], to: &mut [u32]| {
        for (rows, to) in from.chunks(2 * stride).zip(to.chunks_mut(stride)) {
            let (even, odd) = rows.split_at(stride);
            for ((a, b), to) in even[..keys].iter().zip(&odd[..keys]).zip(&mut to[..keys]) {
                *to = bf16(*a) | bf16(*b) << 16;
            }
        }
    };
    by_lanes(&panel.scores[..LANES * stride], p_lanes);
    by_lanes(&panel.d_p[..LANES * stride], ds_lanes);
    for (row, to) in panel.d_p[..LANES * stride].chunks(stride).zip(ds_keys.chunks_mut(stride)) {
        for (two, to) in row[..keys].chunks_exact(2).zip(to) {
            *to = bf16(two[0]) | bf16(two[1]) << 16;
        }
    }
}
compiled!(pair, pair_body, (panel: &Panel, keys: usize, p_lanes: &mut [u32], ds_lanes: &mut [u32], ds_keys: &mut [u32]));

/// The softmax of a row and its sink: (factor for the un-normalised output, LSE).
pub fn with_sink(max: f32, sum: f32, sink: f32) -> (f32, f32) {
    let top = max.max(sink);
    if top == f32::NEG_INFINITY && sum == 0.0 {
        return (0.0, top); // a sink of −∞ is none
    }
    let own = if max == f32::NEG_INFINITY { 0.0 } else { (max - top).exp() };
    let total = sum * own + (sink - top).exp();
    (own / total, top + total.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_good_to_two_ulp() {
        super::super::kernels::tests::sweep(|x: [f32; 16]| x.map(exp));
    }

    #[test]
    fn soft_cap_and_its_derivative() {
        for cap in [0.5f32, 30.0] {
            for i in -4000..=4000 {
                let x = i as f32 * 0.01 * cap;
                let (y, d) = capped(x, cap);
                let t = (f64::from(x) / f64::from(cap)).tanh();
                assert!(
                    (f64::from(y) - f64::from(cap) * t).abs()
                        <= 4e-7 * f64::from(cap) * t.abs().max(1e-30),
                    "{x} {y}"
                );
                assert!((f64::from(d) - (1.0 - t * t)).abs() <= 5e-7, "{x} {d}");
            }
        }
    }

    /// A panel may hold rows of a sequence with padding before it, and keys of a longer one, whose columns would be beyond the row.
    #[test]
    fn a_row_of_the_bias_ends() {
        let bias = Some(crate::score::BiasShape {
            batch: false,
            heads: false,
            queries: true,
            gradient: false,
        });
        let score = crate::score::Score { bias, ..Default::default() };
        let (mut elements, mut places) = ([10f32, 11.0, 12.0, 13.0, 14.0], Places::default());
        let whole = |seq, len| [Segment { seq, start: 0, step: 1, len, offset: 0 }];
        let effects = Effects {
            score: &score,
            queries: &whole(1, 1),
            keys: &whole(0, 4),
            diagonals: &[0, 0],
            seed: Seed::default(),
            ids: &[],
            sinks: None,
            bias: Some(View::dense(elements.as_mut_ptr().cast(), DType::F32, 1, 1, 4)),
            d_bias: None,
            padding: &[0, 3],
        };
        places.build(&effects, 1, 4);
        let lanes = Lanes::new(&effects, &places, 0, std::iter::once(Some((0, 0))));
        let of_keys = |keys: &[u32]| keys.iter().map(|&k| lanes.bias_at(0, k)).collect::<Vec<_>>();
        assert_eq!(of_keys(places.keys(0..4)), [13.0, 0.0, 0.0, 0.0]);
        assert_eq!((lanes.bias_at(0, NONE), lanes.bias_at(1, 0)), (0.0, 0.0));
    }

    #[test]
    fn a_sink_joins_the_softmax() {
        let (factor, lse) = with_sink(f32::NEG_INFINITY, 0.0, 1.5);
        assert_eq!((factor, lse), (0.0, 1.5));
        let (factor, lse) = with_sink(2.0, 3.0, -1.0);
        let total = 3.0f64 * 2f64.exp() + (-1f64).exp();
        assert!((f64::from(factor) * total / 2f64.exp() - 1.0).abs() < 1e-6);
        assert!((f64::from(lse) - total.ln()).abs() < 1e-6);
        assert_eq!(with_sink(2.0, 3.0, f32::NEG_INFINITY).1, 2.0 + 3f32.ln());
        let none = with_sink(f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY);
        assert_eq!(none, (0.0, f32::NEG_INFINITY));
    }
}
