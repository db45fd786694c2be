//! Runs one rank's plan: binds slots to memory, compute steps to the backend, exchanges to the transport. Nothing is decided here.
//!
//! `host` runs a plan to its end on the calling thread; `device` enqueues it on CUDA streams and returns.

pub mod device;
mod host;

use crate::backend::{
    Backward, Contract, Delta, Effects, Expand, Forward, Output, SinkTerms, State, View,
};
use crate::error::{Error, Result};
use crate::mask::Slice;
use crate::plan::{Kind, Message, Plan, Slot, Tensor};
use crate::problem::Sequence;
use crate::score::Seed;
use crate::transport::{self, Piece};
pub use host::{Link, Scratch, run};
use std::ops::Range;

/// Memory that a plan's slots are bound to.
pub struct Memory<'a> {
    /// What dropout draws from.
    pub dropout: Dropout<'a>,
    /// The caller's tensors; of several of a kind, in the order of their slots' index.
    pub caller: &'a [(Tensor, View)],
    /// Offsets of all other slots, from [`crate::plan::account::layout`], in the order of `plan.slots`.
    pub offsets: &'a [usize],
    /// At least the plan's workspace bytes, aligned to [`crate::plan::account::ALIGN`].
    pub workspace: *mut u8,
    /// At least the plan's saved bytes, aligned likewise; may be null when there are none.
    pub saved: *mut u8,
}

/// The key of dropout's random words, and the caller's numbers for the sequences (empty: their indices). Backward gets what forward got.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dropout<'a> {
    /// Seed.
    pub seed: Seed,
    /// One for each sequence of the problem, or none.
    pub ids: &'a [u32],
}

/// What a run moved and how long it waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes handed to the transport.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Nanoseconds in which the compute lane stood still for an event: exposed communication.
    pub exposed_ns: u64,
}

/// Binds every slot of a plan to memory, in the order of `plan.slots`.
fn bind(plan: &Plan, memory: &Memory, views: &mut Vec<View>) -> Result<()> {
    views.clear();
    for (info, offset) in plan.slots.iter().zip(memory.offsets) {
        views.push(match info.slot.kind {
            Kind::Caller => {
                let mut like = memory.caller.iter().filter(|(t, _)| *t == info.slot.tensor);
                match like.nth(info.slot.index as usize) {
                    Some((_, view)) => *view,
                    None => {
                        return Err(Error::internal(format!(
                            "the plan needs {:?}, which was not bound",
                            info.slot
                        )));
                    }
                }
            }
            _ => {
                let base = if info.saved { memory.saved } else { memory.workspace };
                View::dense(
                    base.wrapping_add(*offset),
                    info.dtype,
                    info.rows as usize,
                    info.heads as usize,
                    info.dim as usize,
                )
            }
        });
    }
    Ok(())
}

/// What scores depend on besides tokens. Filled anew for every run; nothing if no score depends on it.
#[derive(Default)]
struct PerSequence {
    /// The key position on the diagonal of query position 0.
    diagonals: Vec<i32>,
    /// Padding keys before the first true one.
    padding: Vec<u32>,
}

impl PerSequence {
    fn fill(&mut self, plan: &Plan) {
        let p = &plan.problem;
        self.diagonals.clear();
        self.padding.clear();
        if plan.origins.is_some() {
            let shift = |s: &Sequence| i64::from(s.k.len) - i64::from(s.q.len);
            let diagonal = |s| if p.mask.bottom_right { shift(s) as i32 } else { 0 };
            self.diagonals.extend(p.seqs.iter().map(diagonal));
            self.padding.extend(p.seqs.iter().map(|s| s.k.before));
        }
    }
}

/// Views of a plan's slots.
struct Slots<'a> {
    plan: &'a Plan,
    dropout: Dropout<'a>,
    sequences: &'a PerSequence,
    /// In the order of `plan.slots`, which is sorted.
    views: &'a [View],
}

impl Slots<'_> {
    fn view(&self, slot: Slot) -> View {
        let index = self.plan.slots.binary_search_by_key(&slot, |s| s.slot);
        self.views[index.unwrap_or_else(|_| panic!("plan has no slot {slot:?}"))]
    }

    /// The view of a slot that not every plan has.
    fn find(&self, slot: Slot) -> Option<View> {
        let index = self.plan.slots.binary_search_by_key(&slot, |s| s.slot).ok()?;
        Some(self.views[index])
    }

    /// What the scores of stage `stage` depend on.
    fn effects(&self, stage: u32) -> Option<Effects<'_>> {
        let origins = self.plan.origins.as_ref()?;
        Some(Effects {
            score: &self.plan.problem.score,
            queries: &origins.queries,
            keys: &origins.keys[stage as usize],
            diagonals: &self.sequences.diagonals,
            seed: self.dropout.seed,
            ids: self.dropout.ids,
            sinks: self.find(Slot::caller(Tensor::Sinks)),
            bias: self.plan.bias().map(|slot| self.view(slot)),
            d_bias: self.plan.d_bias().map(|slot| self.view(slot)),
            padding: &self.sequences.padding,
        })
    }

    /// A forward attend step.
    fn forward<'b>(
        &'b self,
        stage: u32,
        (q, k): (Slot, Slot),
        slices: &'b [Slice],
        first: bool,
        last: Option<(Slot, Slot)>,
    ) -> Forward<'b> {
        let acc = |tensor| self.view(Slot::of(Kind::Acc, tensor));
        let whole = first && last.is_some();
        let state = (!whole).then(|| State {
            out: acc(Tensor::Out),
            max: acc(Tensor::Max),
            sum: acc(Tensor::Sum),
        });
        Forward {
            q: self.view(q),
            k: self.view(k),
            v: self.view(Slot { tensor: Tensor::V, ..k }),
            slices,
            heads: self.plan.head_map(),
            scale: self.plan.problem.scale,
            state,
            effects: self.effects(stage),
            first,
            last: last.map(|(out, lse)| Output {
                out: self.view(out),
                lse: self.view(lse),
                top: self.find(Slot::of(Kind::Acc, Tensor::Top)),
            }),
        }
    }

    /// A backward attend step.
    fn backward<'b>(
        &'b self,
        stage: u32,
        [q, d_out, lse, delta, k, dk]: [Slot; 6],
        slices: &'b [Slice],
    ) -> Backward<'b> {
        Backward {
            q: self.view(q),
            k: self.view(k),
            v: self.view(Slot { tensor: Tensor::V, ..k }),
            d_out: self.view(d_out),
            lse: self.view(lse),
            delta: self.view(delta),
            slices,
            heads: self.plan.head_map(),
            scale: self.plan.problem.scale,
            effects: self.effects(stage),
            dq: self.view(Slot::of(Kind::Acc, Tensor::DQ)),
            dk: self.view(dk),
            dv: self.view(Slot { tensor: Tensor::DV, ..dk }),
        }
    }

    /// Expands latents.
    fn expand<'b>(&self, latent: Slot, k: Slot, rows: &'b [Range<u32>]) -> Expand<'b> {
        Expand {
            latent: self.view(latent),
            up_k: self.view(Slot::caller(Tensor::UpK)),
            up_v: self.view(Slot::caller(Tensor::UpV)),
            first_head: self.plan.share.kv.start as usize,
            k: self.view(k),
            v: self.view(Slot { tensor: Tensor::V, ..k }),
            rows,
        }
    }

    /// Contracts gradients of what was expanded.
    fn contract<'b>(
        &self,
        dk: Slot,
        latent: Slot,
        d_latent: Slot,
        rows: &'b [Range<u32>],
    ) -> Contract<'b> {
        Contract {
            dk: self.view(dk),
            dv: self.view(Slot { tensor: Tensor::DV, ..dk }),
            latent: self.view(latent),
            up_k: self.view(Slot::caller(Tensor::UpK)),
            up_v: self.view(Slot::caller(Tensor::UpV)),
            first_head: self.plan.share.kv.start as usize,
            d_latent: self.view(d_latent),
            d_up_k: self.view(Slot::caller(Tensor::DUpK)),
            d_up_v: self.view(Slot::caller(Tensor::DUpV)),
            rows,
        }
    }

    /// Backward's row sums over the caller's tensors.
    fn delta(&self) -> Delta {
        let caller = |tensor| self.view(Slot::caller(tensor));
        Delta {
            out: caller(Tensor::Out),
            d_out: caller(Tensor::DOut),
            delta: self.view(Slot::of(Kind::Sum, Tensor::Delta)),
        }
    }

    /// What rows add to the gradients of sinks.
    fn sink_terms(&self) -> SinkTerms {
        SinkTerms {
            sinks: self.view(Slot::caller(Tensor::Sinks)),
            lse: self.view(Slot::caller(Tensor::Lse)),
            delta: self.view(Slot::of(Kind::Sum, Tensor::Delta)),
            terms: self.view(Slot::of(Kind::Sum, Tensor::SinkTerms)),
        }
    }

    /// The bytes of a message's rows, appended as pieces.
    fn pieces(&self, m: &Message, out: &mut Vec<Piece>) {
        let view = self.view(m.slot);
        let row_bytes = view.heads * view.dim * view.dtype.size();
        for r in &m.rows {
            if r.step == 1 {
                out.push(Piece {
                    ptr: view.at(r.first as usize, 0),
                    len: r.count as usize * row_bytes,
                });
            } else {
                out.extend(
                    r.iter().map(|row| Piece { ptr: view.at(row as usize, 0), len: row_bytes }),
                );
            }
        }
    }
}

/// Resolves the messages of an exchange to bytes, reusing what the vectors hold. Messages to one peer become one stream.
fn fill_messages(
    slots: &Slots,
    from: &[Message],
    members: &[u32],
    to: &mut Vec<transport::Message>,
) {
    let mut used = 0;
    for m in from {
        let peer = members[m.peer as usize];
        let at = match to[..used].iter().position(|t| t.peer == peer) {
            Some(at) => at,
            None => {
                if used == to.len() {
                    to.push(transport::Message { peer, pieces: Vec::new() });
                }
                to[used].peer = peer;
                to[used].pieces.clear();
                used += 1;
                used - 1
            }
        };
        slots.pieces(m, &mut to[at].pieces);
    }
    to.truncate(used);
}
