//! Forward: blocked attention with online softmax (FlashAttention-2, arXiv 2307.08691), one task per (tile, key head).
//!
//! Scores are computed transposed, `[keys][32 lanes]`, so that maximum and sum of a query row are plain vector operations
//! and P is already laid out for the product with V. K and V are packed one block at a time and serve all lanes of the tile.

use super::Scratch;
use super::effects::{self, Formula, Lanes, Places};
use super::kernels::{Gemm, Into, Kernels, LANES, Softmax};
use super::rows::{set_stat, stat};
use super::tile::{Bounds, KEYS, Packer, Tiling, heads_of, prefetch, stride};
use crate::backend::Forward;
use std::ops::Range;

/// One forward step, shared by all threads.
pub struct Task<'a> {
    /// The step.
    pub step: &'a Forward<'a>,
    /// The loops.
    pub kernels: &'static Kernels,
    /// The tiles.
    pub tiling: &'a Tiling,
    /// Scores beyond scale·q·k.
    pub beyond: Option<(Formula, &'a Places)>,
}

/// Buffers of a task, all in the thread's scratch.
struct Buffers {
    /// Queries, transposed: `[panel][units][32]`.
    q: *mut u32,
    /// Un-normalised output `[lanes][stride(dv)]`.
    out: *mut f32,
    max: *mut f32,
    sum: *mut f32,
    /// Keys by rows.
    k: *mut u32,
    /// Values, contracted over.
    v: *mut u32,
    /// Scores, then P, of a panel: `[keys][32]`.
    scores: *mut f32,
}

impl Task<'_> {
    fn lanes(&self) -> usize {
        let heads = self.step.q.heads.min(self.step.heads.group as usize);
        (self.tiling.tile_rows * heads).next_multiple_of(LANES)
    }

    fn sizes(&self) -> [usize; 7] {
        let (lanes, dqk, dv) = (self.lanes(), self.step.q.dim, self.step.v.dim);
        let rows = lanes.max(KEYS);
        // Before the queries are transposed they lie by rows where the keys will.
        [
            lanes * dqk,
            lanes * stride(dv),
            lanes,
            lanes,
            rows * stride(dqk),
            KEYS * stride(dv),
            KEYS * LANES,
        ]
    }

    /// Attends one tile with the query heads of one key head. `tick` is called often; false stops the task half-way.
    ///
    /// # Safety
    /// The views of the step are valid, and no other task writes the same tile and heads.
    pub unsafe fn run(
        &self,
        tile: usize,
        kv: usize,
        scratch: &mut Scratch,
        tick: &mut dyn FnMut() -> bool,
    ) {
        let heads = heads_of(self.step.heads, kv, self.step.q.heads);
        let rows = self.tiling.rows_of(tile);
        let (units, groups) = scratch.units_and_groups(self.sizes());
        let [q, out, max, sum, k, v, scores] = units;
        let buffers = Buffers {
            q,
            out: out.cast(),
            max: max.cast(),
            sum: sum.cast(),
            k,
            v,
            scores: scores.cast(),
        };
        let lanes = rows.len() * heads.len();
        let panels = lanes.div_ceil(LANES);
        let all = 0..self.step.k.rows;
        groups.load(self.tiling, tile, all.clone());
        // SAFETY: the buffers have the sizes asked for, and rows and heads of the tile lie in the views.
        unsafe {
            self.start(&buffers, rows.clone(), heads.clone(), panels);
            let mut packed = false;
            while groups.next(all.clone()) {
                if !packed {
                    self.pack_queries(&buffers, rows.clone(), heads.clone(), &groups.seen);
                    packed = true;
                }
                for from in groups.keys.clone().step_by(KEYS) {
                    let block = from..(from + KEYS).min(groups.keys.end);
                    self.pack_keys(&buffers, block.clone(), kv);
                    let next = block.end..(block.end + KEYS).min(groups.keys.end);
                    let share = next.len().div_ceil(panels);
                    for panel in 0..panels {
                        let ahead = next.start + panel * share..next.start + (panel + 1) * share;
                        for key in ahead.start.min(next.end)..ahead.end.min(next.end) {
                            prefetch(&self.step.k, key, kv);
                            prefetch(&self.step.v, key, kv);
                        }
                        let bounds =
                            Bounds::new(&groups.rows, panel * LANES, heads.len(), block.clone());
                        if !bounds.keys.is_empty() {
                            let lanes = self.lanes_at(rows.clone(), heads.clone(), panel);
                            self.attend(&buffers, panel, &bounds, from, lanes.as_ref());
                        }
                    }
                    if !tick() {
                        return;
                    }
                }
            }
            self.finish(&buffers, rows, heads);
        }
    }

    /// What a panel's lanes are, where scores depend on it.
    fn lanes_at(&self, rows: Range<usize>, heads: Range<usize>, panel: usize) -> Option<Lanes> {
        let (_, places) = self.beyond?;
        let effects = self.step.effects.as_ref().filter(|e| e.score.changes())?;
        let lanes = lanes_of(rows, heads).skip(panel * LANES).map(Some);
        Some(Lanes::new(effects, places, self.step.heads.q_first, lanes))
    }

    /// Fetches the state of the tile's rows, or starts from the empty one.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn start(&self, b: &Buffers, rows: Range<usize>, heads: Range<usize>, panels: usize) {
        let (lanes, dv) = (panels * LANES, self.step.v.dim);
        let state = self.step.state.filter(|_| !self.step.first);
        // SAFETY: the buffers hold the tile's lanes; (row, head) lies in the state.
        unsafe {
            b.out.write_bytes(0, lanes * stride(dv));
            b.sum.write_bytes(0, lanes);
            std::slice::from_raw_parts_mut(b.max, lanes).fill(f32::NEG_INFINITY);
            let Some(state) = state else { return };
            for (lane, (row, head)) in lanes_of(rows, heads).enumerate() {
                let from = state.out.at(row, head).cast::<f32>();
                from.copy_to_nonoverlapping(b.out.add(lane * stride(dv)), dv);
                *b.max.add(lane) = stat(&state.max, row, head);
                *b.sum.add(lane) = stat(&state.sum, row, head);
            }
        }
    }

    /// Packs and transposes the queries; rows in no slice become zeros.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn pack_queries(
        &self,
        b: &Buffers,
        rows: Range<usize>,
        heads: Range<usize>,
        seen: &[bool],
    ) {
        let packer = Packer { kernels: self.kernels, view: &self.step.q };
        let units = self.step.q.dim / self.kernels.pairs;
        let (first_row, lanes) = (rows.start, rows.len() * heads.len());
        // SAFETY: as many rows as the tile has lanes fit where the keys go later.
        unsafe {
            for (lane, (row, head)) in lanes_of(rows, heads).enumerate() {
                let row = seen[row - first_row].then_some((row, head));
                packer.row(row, b.k.add(lane * stride(units)));
            }
            for lane in lanes..lanes.next_multiple_of(LANES) {
                packer.row(None, b.k.add(lane * stride(units)));
            }
            for lane in (0..lanes).step_by(LANES) {
                let to = b.q.add(lane * units);
                (self.kernels.transpose)(b.k.add(lane * stride(units)), stride(units), units, to);
            }
        }
    }

    /// Packs a block of keys and values; rows in no slice become zeros.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn pack_keys(&self, b: &Buffers, block: Range<usize>, kv: usize) {
        let row = |i: usize| {
            let key = block.start + i;
            (key < block.end && self.tiling.key_seen(key)).then_some((key, kv))
        };
        let units = self.step.k.dim / self.kernels.pairs;
        // SAFETY: a block has at most `KEYS` rows, which lie in the views where a slice covers them.
        unsafe {
            let keys = Packer { kernels: self.kernels, view: &self.step.k };
            for i in 0..block.len() {
                keys.row(row(i), b.k.add(i * stride(units)));
            }
            let values = Packer { kernels: self.kernels, view: &self.step.v };
            values.contracted(block.len().next_multiple_of(self.kernels.pairs), row, b.v);
        }
    }

    /// One panel of lanes against what it sees of the packed block.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn attend(
        &self,
        b: &Buffers,
        panel: usize,
        bounds: &Bounds,
        first_key: usize,
        lanes: Option<&Lanes>,
    ) {
        let pairs = self.kernels.pairs;
        let (k_units, dv) = (self.step.q.dim / pairs, self.step.v.dim);
        let from = bounds.keys.start / pairs * pairs;
        let to = bounds.keys.end.next_multiple_of(pairs);
        let (lo, hi) = bounds.relative_to(from);
        let mut shrink = [0f32; LANES];
        let mut scale = self.step.scale;
        let mut kept = [0; KEYS];
        // The last keys may be beyond the buffer, to fill a unit.
        let last = (first_key + to).min(self.step.k.rows);
        // SAFETY: keys `from .. to` are packed, the panel's queries too, and the buffers do not overlap.
        unsafe {
            (self.kernels.gemm)(&Gemm {
                m: to - from,
                n: LANES,
                k: k_units,
                a: b.k.add(from * stride(k_units)),
                a_stride: stride(k_units),
                a_columns: false,
                b: b.q.add(panel * LANES * k_units),
                b_step: LANES,
                b_panel: 0,
                c: b.scores,
                c_stride: LANES,
                into: Into::Set,
            });
            if let (Some((formula, places)), Some(lanes)) = (&self.beyond, lanes) {
                let keys = places.keys(first_key + from..last);
                let scores = std::slice::from_raw_parts_mut(b.scores, (to - from) * LANES);
                effects::adjust(formula, lanes, keys, scores);
                scale = 1.0;
                if formula.drops() {
                    effects::keep(formula, lanes, keys, &mut kept);
                }
            }
            (self.kernels.softmax)(&Softmax {
                scores: b.scores,
                keys: to - from,
                scale,
                lo: lo.as_ptr(),
                hi: hi.as_ptr(),
                // With a scale of 0 or less the maximum must be taken of the scaled scores, as the masked loop does.
                masked: !bounds.full || (from..to) != bounds.keys || scale <= 0.0,
                max: b.max.add(panel * LANES),
                sum: b.sum.add(panel * LANES),
                shrink: shrink.as_mut_ptr(),
            });
            if self.beyond.is_some_and(|(formula, _)| formula.drops()) {
                let units = (to - from) / pairs * LANES;
                let units = std::slice::from_raw_parts_mut(b.scores.cast::<u32>(), units);
                effects::drop_weights(units, pairs, &kept[..to - from]);
            }
            (self.kernels.gemm)(&Gemm {
                m: LANES,
                n: dv.next_multiple_of(16),
                k: (to - from) / pairs,
                a: b.scores.cast(),
                a_stride: LANES,
                a_columns: true,
                b: b.v.add(from / pairs * stride(dv)),
                b_step: stride(dv),
                b_panel: LANES,
                c: b.out.add(panel * LANES * stride(dv)),
                c_stride: stride(dv),
                into: Into::Scale(shrink.as_ptr()),
            });
        }
    }

    /// The sink of a row that is a token.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn sink(&self, row: usize, head: usize) -> Option<f32> {
        let (_, places) = self.beyond?;
        let sinks = self.step.effects.as_ref()?.sinks?;
        let head = self.step.heads.q_first as usize + head;
        // SAFETY: a sink for every head.
        places.is_token(row).then(|| unsafe { stat(&sinks, 0, head) })
    }

    /// Writes O and LSE, or leaves the state behind.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn finish(&self, b: &Buffers, rows: Range<usize>, heads: Range<usize>) {
        let dv = self.step.v.dim;
        for (lane, (row, head)) in lanes_of(rows, heads).enumerate() {
            // SAFETY: the lane lies in the buffers and (row, head) in the output and the state.
            unsafe {
                let out = std::slice::from_raw_parts_mut(b.out.add(lane * stride(dv)), dv);
                let (max, sum) = (*b.max.add(lane), *b.sum.add(lane));
                if let Some(last) = &self.step.last {
                    // NaN in the inputs must not look like a row that saw nothing.
                    let (norm, lse) = match self.sink(row, head) {
                        Some(sink) => effects::with_sink(max, sum, sink),
                        None if sum == 0.0 => (0.0, f32::NEG_INFINITY),
                        None => (1.0 / sum, max + sum.ln()),
                    };
                    if norm == 0.0 {
                        out.fill(0.0);
                    }
                    let norm = norm * self.beyond.map_or(1.0, |(formula, _)| formula.grow());
                    out.iter_mut().for_each(|x| *x *= norm);
                    if let Some(top) = &last.top {
                        set_stat(top, row, head, max);
                    }
                    let to = last.out.at(row, head);
                    (self.kernels.narrow)(last.out.dtype, out.as_ptr(), to, dv);
                    set_stat(&last.lse, row, head, lse);
                } else if let Some(state) = &self.step.state {
                    let to = state.out.at(row, head).cast::<f32>();
                    to.copy_from_nonoverlapping(out.as_ptr(), dv);
                    set_stat(&state.max, row, head, max);
                    set_stat(&state.sum, row, head, sum);
                }
            }
        }
    }
}

/// The lanes of a tile in order.
pub fn lanes_of(rows: Range<usize>, heads: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    rows.flat_map(move |row| heads.clone().map(move |head| (row, head)))
}
