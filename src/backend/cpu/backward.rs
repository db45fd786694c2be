//! Backward: one task per (block of keys, key head), five products per tile (FlashAttention-2, arXiv 2307.08691, algorithm 2).
//!
//! K and V are packed once per task and dK, dV stay in the task. What a task adds to dQ of a tile it adds when its turn has come:
//! blocks of keys take turns in ascending order, so that the sum has the same bits for any number of threads.

use super::Scratch;
use super::effects::{self, Formula, Lanes, Panel, Places};
use super::forward::lanes_of;
use super::kernels::{Gemm, Gradient, Into, Kernels, LANES};
use super::rows::{add, stat};
use super::tile::{Bounds, Groups, KEYS, Packer, Tiling, heads_of, prefetch, stride};
use crate::backend::Backward;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// Panels of lanes whose contributions to dK and dV are added by one product.
const PANELS: usize = 4;

/// One backward step, shared by all threads.
pub struct Task<'a> {
    /// The step.
    pub step: &'a Backward<'a>,
    /// The loops.
    pub kernels: &'static Kernels,
    /// The tiles.
    pub tiling: &'a Tiling,
    /// Whose turn it is to add to dQ, per (key head, tile).
    pub turns: &'a [AtomicU32],
    /// Scores beyond scale·q·k.
    pub beyond: Option<(Formula, &'a Places)>,
}

/// Buffers of a task, all in the thread's scratch. `[a][b]` is row-major with rows of `stride(b)` units.
struct Buffers {
    /// Keys and values, transposed: `[panel of 32 keys][units][32]`.
    k_t: *mut u32,
    v_t: *mut u32,
    /// Keys contracted over.
    k: *mut u32,
    /// Gradients of the block, `[keys][dim]`.
    dk: *mut f32,
    dv: *mut f32,
    /// Gradient of the tile's queries, `[lanes][dqk]`.
    dq: *mut f32,
    /// Queries and output gradients by rows, `[lanes][units]`, and contracted over.
    q_rows: *mut u32,
    o_rows: *mut u32,
    q: *mut u32,
    o: *mut u32,
    /// `[lanes][keys]`.
    scores: *mut f32,
    d_p: *mut f32,
    /// With pairs: P and dS paired along lanes, and dS paired along keys.
    p_lanes: *mut u32,
    ds_lanes: *mut u32,
    ds_keys: *mut u32,
}

/// Panels whose P and dS wait to be multiplied into dV and dK.
struct Pending {
    panels: usize,
    keys: Range<usize>,
}

impl Task<'_> {
    fn sizes(&self) -> [usize; 15] {
        let heads = self.step.q.heads.min(self.step.heads.group as usize);
        let lanes = (self.tiling.tile_rows * heads).next_multiple_of(LANES);
        let (dqk, dv, wait) = (self.step.q.dim, self.step.v.dim, PANELS * LANES);
        let pairs = if self.kernels.pairs == 2 { 1 } else { 0 };
        let tile = wait * stride(KEYS);
        [
            KEYS * dqk,
            KEYS * dv,
            KEYS * stride(dqk),
            KEYS * stride(dqk),
            KEYS * stride(dv),
            lanes * stride(dqk),
            // Keys and values lie here by rows before they are transposed.
            wait.max(KEYS) * stride(dqk),
            wait.max(KEYS) * stride(dv),
            pairs * wait * stride(dqk),
            pairs * wait * stride(dv),
            tile,
            tile,
            pairs * tile,
            pairs * tile,
            pairs * tile,
        ]
    }

    /// Adds what one block of keys of one key head contributes. `tick` is called often; false stops the task half-way, and then
    /// it must be false for all threads.
    ///
    /// # Safety
    /// The views of the step are valid, and no other task has the same block and key head.
    pub unsafe fn run(
        &self,
        block: usize,
        kv: usize,
        scratch: &mut Scratch,
        tick: &mut dyn FnMut() -> bool,
    ) {
        let tiles = self.tiling.tiles_of(block);
        if tiles.is_empty() {
            return;
        }
        let heads = heads_of(self.step.heads, kv, self.step.q.heads);
        let keys = block * KEYS..((block + 1) * KEYS).min(self.step.k.rows);
        let (units, groups) = scratch.units_and_groups(self.sizes());
        let [
            k_t,
            v_t,
            k,
            dk,
            dv,
            dq,
            q_rows,
            o_rows,
            q,
            o,
            scores,
            d_p,
            p_lanes,
            ds_lanes,
            ds_keys,
        ] = units;
        let buffers = Buffers {
            k_t,
            v_t,
            k,
            dk: dk.cast(),
            dv: dv.cast(),
            dq: dq.cast(),
            q_rows,
            o_rows,
            q,
            o,
            scores: scores.cast(),
            d_p: d_p.cast(),
            p_lanes,
            ds_lanes,
            ds_keys,
        };
        // SAFETY: the buffers have the sizes asked for, and the tiles' rows and heads lie in the views.
        unsafe {
            self.pack_keys(&buffers, keys.clone(), kv);
            for tile in tiles {
                let Some(turn) = self.tiling.turn(tile, block) else { continue };
                self.tile(&buffers, tile, keys.clone(), heads.clone(), groups);
                if !tick() {
                    return;
                }
                let now = &self.turns[kv * self.tiling.tiles + tile];
                let mut spins = 0u32;
                while now.load(Ordering::Acquire) != turn {
                    spins += 1;
                    if spins > 64 {
                        std::thread::yield_now();
                        if !tick() {
                            return;
                        }
                    }
                    std::hint::spin_loop();
                }
                self.add_dq(&buffers, tile, heads.clone(), &groups.touched);
                now.store(turn + 1, Ordering::Release);
            }
            let rows = keys.clone().filter(|&key| self.tiling.key_seen(key));
            for key in rows {
                let i = key - keys.start;
                let dqk = stride(self.step.q.dim);
                let to = self.step.dk.at(key, kv).cast();
                add(to, buffers.dk.add(i * dqk), self.step.k.dim, self.step.scale);
                let dv = stride(self.step.v.dim);
                add(self.step.dv.at(key, kv).cast(), buffers.dv.add(i * dv), self.step.v.dim, 1.0);
            }
        }
    }

    /// Packs keys and values three ways and clears their gradients.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn pack_keys(&self, b: &Buffers, keys: Range<usize>, kv: usize) {
        let row = |i: usize| {
            let key = keys.start + i;
            (key < keys.end && self.tiling.key_seen(key)).then_some((key, kv))
        };
        let count = keys.len().next_multiple_of(LANES);
        let (k, v) = (&self.step.k, &self.step.v);
        let (dqk, dv) = (k.dim, v.dim);
        // SAFETY: the buffers hold a block's rows; rows that a slice covers lie in the views.
        unsafe {
            b.dk.write_bytes(0, KEYS * stride(dqk));
            b.dv.write_bytes(0, KEYS * stride(dv));
            for (view, by_rows, transposed) in [(k, b.q_rows, b.k_t), (v, b.o_rows, b.v_t)] {
                let packer = Packer { kernels: self.kernels, view };
                let units = view.dim / self.kernels.pairs;
                for i in 0..count {
                    packer.row(row(i), by_rows.add(i * stride(units)));
                }
                for i in (0..count).step_by(LANES) {
                    let from = by_rows.add(i * stride(units));
                    (self.kernels.transpose)(from, stride(units), units, transposed.add(i * units));
                }
            }
            Packer { kernels: self.kernels, view: k }.contracted(count, row, b.k);
        }
    }

    /// One tile against the packed block: adds to dK and dV, computes dQ.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn tile(
        &self,
        b: &Buffers,
        tile: usize,
        keys: Range<usize>,
        heads: Range<usize>,
        groups: &mut Groups,
    ) {
        let rows = self.tiling.rows_of(tile);
        let panels = (rows.len() * heads.len()).div_ceil(LANES);
        let first_key = keys.start;
        groups.load(self.tiling, tile, keys.clone());
        groups.touched.clear();
        groups.touched.resize(panels, false);
        while groups.next(keys.clone()) {
            let mut pending = Pending { panels: 0, keys: 0..0 };
            for panel in 0..panels {
                let mut bounds =
                    Bounds::new(&groups.rows, panel * LANES, heads.len(), keys.clone());
                if bounds.keys.is_empty() {
                    continue;
                }
                let from = bounds.keys.start / LANES * LANES;
                let wide = from..bounds.keys.end.next_multiple_of(LANES);
                bounds.full &= wide == bounds.keys;
                // SAFETY: see `run`; at most `PANELS` panels wait.
                unsafe {
                    if pending.panels == PANELS || pending.keys != wide {
                        self.flush(b, &mut pending);
                    }
                    pending.keys = wide;
                    self.panel(
                        b,
                        panel,
                        &mut bounds,
                        rows.clone(),
                        heads.clone(),
                        first_key,
                        &pending,
                        groups.touched[panel],
                    );
                }
                pending.panels += 1;
                groups.touched[panel] = true;
            }
            // SAFETY: as above.
            unsafe { self.flush(b, &mut pending) };
        }
    }

    /// P, dS and dQ of one panel; P and dS go to the next waiting place.
    ///
    /// # Safety
    /// See `run`.
    #[allow(clippy::too_many_arguments)] // one call site; each argument is a different thing
    unsafe fn panel(
        &self,
        b: &Buffers,
        panel: usize,
        bounds: &mut Bounds,
        rows: Range<usize>,
        heads: Range<usize>,
        first_key: usize,
        pending: &Pending,
        add: bool,
    ) {
        let (pairs, dqk, dv) = (self.kernels.pairs, self.step.q.dim, self.step.v.dim);
        let place = pending.panels * LANES;
        let keys = pending.keys.clone();
        let (mut lse, mut delta) = ([0f32; LANES], [0f32; LANES]);
        let lanes = (rows.len() * heads.len() - panel * LANES).min(LANES);
        // (row, head) of every lane that sees a key; others are zeros.
        let mut source = [None; LANES];
        let (mut row, mut head) = (panel * LANES / heads.len(), panel * LANES % heads.len());
        for lane in 0..LANES {
            if lane < lanes && bounds.lo[lane] < bounds.hi[lane] {
                let at = (rows.start + row, heads.start + head);
                // SAFETY: (row, head) lies in the statistics.
                let own = unsafe { stat(&self.step.lse, at.0, at.1) };
                if own != f32::NEG_INFINITY {
                    source[lane] = Some(at);
                    lse[lane] = own;
                    // SAFETY: as above.
                    delta[lane] = unsafe { stat(&self.step.delta, at.0, at.1) };
                }
            }
            if source[lane].is_none() {
                (bounds.lo[lane], bounds.hi[lane], bounds.full) = (0, 0, false);
            }
            head += 1;
            if head == heads.len() {
                (row, head) = (row + 1, 0);
            }
        }
        for lane in panel * LANES..(panel + 1) * LANES {
            let at =
                |lane: usize| (rows.start + lane / heads.len(), heads.start + lane % heads.len());
            let ((row, head), (next_row, next_head)) = (at(lane), at(lane + LANES));
            if next_row < self.step.q.rows {
                prefetch(&self.step.q, next_row, next_head);
                prefetch(&self.step.d_out, next_row, next_head);
            }
            if row < self.step.q.rows {
                prefetch(&self.step.dq, row, head);
            }
        }
        let (lo, hi) = bounds.relative_to(keys.start);
        let (q_units, o_units) = (dqk / pairs, dv / pairs);
        // SAFETY: the waiting place is free, the block is packed, and the buffers do not overlap.
        unsafe {
            let q_rows = b.q_rows.add(place * stride(q_units));
            let o_rows = b.o_rows.add(place * stride(o_units));
            let queries = Packer { kernels: self.kernels, view: &self.step.q };
            let gradients = Packer { kernels: self.kernels, view: &self.step.d_out };
            for (lane, at) in source.iter().enumerate() {
                queries.row(*at, q_rows.add(lane * stride(q_units)));
                gradients.row(*at, o_rows.add(lane * stride(o_units)));
            }
            if pairs == 2 {
                queries.contracted(LANES, |i| source[i], b.q.add(place / 2 * stride(dqk)));
                gradients.contracted(LANES, |i| source[i], b.o.add(place / 2 * stride(dv)));
            }
            let scores = b.scores.add(place * stride(KEYS));
            let d_p = b.d_p.add(place * stride(KEYS));
            let product = |rows: *mut u32, units: usize, transposed: *mut u32, c: *mut f32| Gemm {
                m: LANES,
                n: keys.len(),
                k: units,
                a: rows,
                a_stride: stride(units),
                a_columns: false,
                b: transposed.add(keys.start * units),
                b_step: LANES,
                b_panel: LANES * units,
                c,
                c_stride: stride(KEYS),
                into: Into::Set,
            };
            (self.kernels.gemm)(&product(q_rows, q_units, b.k_t, scores));
            (self.kernels.gemm)(&product(o_rows, o_units, b.v_t, d_p));
            if let (Some((formula, places)), Some(effects)) = (&self.beyond, &self.step.effects) {
                let lanes =
                    Lanes::new(effects, places, self.step.heads.q_first, source.into_iter());
                // The last keys may be beyond the buffer: blocks of keys are whole panels.
                let known = places
                    .keys(first_key + keys.start..(first_key + keys.end).min(self.step.k.rows));
                let panel_of = |at| std::slice::from_raw_parts_mut(at, LANES * stride(KEYS));
                let mut panel = Panel {
                    scores: panel_of(scores),
                    d_p: panel_of(d_p),
                    stride: stride(KEYS),
                    lse: &lse,
                    delta: &delta,
                    bounds: (&lo, &hi),
                };
                for lane in 0..LANES {
                    let end = lane * panel.stride + keys.len();
                    panel.scores[lane * panel.stride + known.len()..end].fill(0.0);
                    panel.d_p[lane * panel.stride + known.len()..end].fill(0.0);
                }
                let mut kept = [u32::MAX; KEYS];
                if formula.drops() {
                    effects::keep(formula, &lanes, known, &mut kept);
                }
                effects::gradient(formula, &lanes, known, &kept, &mut panel);
                if pairs == 2 {
                    let units =
                        |at, rows: usize| std::slice::from_raw_parts_mut(at, rows * stride(KEYS));
                    let at = place / 2 * stride(KEYS);
                    let (p_lanes, ds_lanes) = (b.p_lanes.add(at), b.ds_lanes.add(at));
                    let half = LANES / 2;
                    effects::pair(
                        formula,
                        &panel,
                        keys.len(),
                        units(p_lanes, half),
                        units(ds_lanes, half),
                        units(b.ds_keys, LANES),
                    );
                }
            } else {
                (self.kernels.gradient)(&Gradient {
                    scores,
                    d_p,
                    stride: stride(KEYS),
                    keys: keys.len(),
                    scale: self.step.scale,
                    lse: lse.as_ptr(),
                    delta: delta.as_ptr(),
                    lo: lo.as_ptr(),
                    hi: hi.as_ptr(),
                    masked: !bounds.full,
                    p_by_lanes: b.p_lanes.wrapping_add(place / 2 * stride(KEYS)),
                    ds_by_lanes: b.ds_lanes.wrapping_add(place / 2 * stride(KEYS)),
                    ds_by_keys: b.ds_keys,
                });
            }
            (self.kernels.gemm)(&Gemm {
                m: LANES,
                n: dqk.next_multiple_of(16),
                k: keys.len() / pairs,
                a: if pairs == 2 { b.ds_keys } else { d_p.cast() },
                a_stride: stride(KEYS),
                a_columns: false,
                b: b.k.add(keys.start / pairs * stride(dqk)),
                b_step: stride(dqk),
                b_panel: LANES,
                c: b.dq.add(panel * LANES * stride(dqk)),
                c_stride: stride(dqk),
                into: if add { Into::Add } else { Into::Set },
            });
        }
    }

    /// Multiplies the waiting P and dS into dV and dK.
    ///
    /// # Safety
    /// See `run`.
    unsafe fn flush(&self, b: &Buffers, pending: &mut Pending) {
        if pending.panels == 0 {
            return;
        }
        let pairs = self.kernels.pairs;
        let keys = pending.keys.clone();
        let product = |a: *mut u32, rows: *mut u32, dim: usize, c: *mut f32| Gemm {
            m: keys.len(),
            n: dim.next_multiple_of(16),
            k: pending.panels * LANES / pairs,
            a,
            a_stride: stride(KEYS),
            a_columns: true,
            b: rows,
            b_step: stride(dim),
            b_panel: LANES,
            c: c.wrapping_add(keys.start * stride(dim)),
            c_stride: stride(dim),
            into: Into::Add,
        };
        let (p, ds, q, o) = match pairs {
            2 => (b.p_lanes, b.ds_lanes, b.q, b.o),
            _ => (b.scores.cast(), b.d_p.cast(), b.q_rows, b.o_rows),
        };
        // SAFETY: the waiting panels are packed, and the buffers do not overlap.
        unsafe {
            (self.kernels.gemm)(&product(p, o, self.step.v.dim, b.dv));
            (self.kernels.gemm)(&product(ds, q, self.step.q.dim, b.dk));
        }
        pending.panels = 0;
    }

    /// # Safety
    /// See `run`; it is this task's turn.
    unsafe fn add_dq(&self, b: &Buffers, tile: usize, heads: Range<usize>, touched: &[bool]) {
        let lanes = lanes_of(self.tiling.rows_of(tile), heads).enumerate();
        for (lane, (row, head)) in lanes.filter(|(lane, _)| touched[lane / LANES]) {
            // SAFETY: the lane lies in the buffer and (row, head) in dQ.
            unsafe {
                let from = b.dq.add(lane * stride(self.step.q.dim));
                let to = self.step.dq.at(row, head).cast();
                add(to, from, self.step.q.dim, self.step.scale);
            }
        }
    }
}
