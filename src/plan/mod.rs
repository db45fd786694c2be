//! A [`Plan`] is what one rank does, as data: steps on two lanes, joined only by events, over named slots.
//!
//! ```text
//!   Problem, rank ──▶ team     who is in which team, which heads and rows a rank works on
//!                     needs    which key rows one team needs of another; the slices they make
//!                     survey   both, for all stages: what the two passes of a rank have in common
//!                     heads    head exchange: trade heads for sequence, and back
//!                     stages   KV exchange: arrive, attend, return; forward and backward
//!                     latent   keys and values that are expanded where they are attended
//!                     statistics   numbers per head: gradients of sinks, largest scores
//!                     trade    head exchange alone, for other layers than attention
//!                  ──▶ Plan ──▶ check (proves all ranks' plans together), account (bytes, FLOPs, memory), print
//! ```
//! A plan is a pure function of (problem, rank, [`Options`]). It holds no pointers: slots are bound to memory at launch.

pub mod account;
mod build;
pub mod check;
mod fit;
mod heads;
pub mod json;
mod latent;
mod needs;
pub mod print;
mod stages;
mod statistics;
mod survey;
pub mod svg;
mod team;
pub mod trade;

use crate::backend::{HeadMap, Run};
use crate::dtype::DType;
use crate::mask::Slice;
use crate::partition::Segment;
use crate::problem::Problem;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use fit::{fewest_stages, peaks};
pub use team::{HeadShare, Team};

/// Which half of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Q, K, V → O, LSE.
    Forward,
    /// Q, K, V, O, LSE, dO → dQ, dK, dV.
    Backward,
    /// Of a trade: this rank's rows of all heads → whole sequences of this rank's heads.
    ToHeads,
    /// Of a trade: the way back.
    ToSequence,
}

/// What a launch knows beside the problem. `pack` changes no message, so ranks may differ in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    /// The caller's K and V (in a trade: the whole tensors) are not dense in memory: gather their rows before sending.
    pub pack: bool,
    /// Forward leaves the head-split Q, K, V and LSE for backward, which then exchanges only what is new. Only matters when u > 1.
    pub saved: bool,
    /// Both sides of a message are cut into the same runs of consecutive rows, and those are few: NCCL matches sends and receives one by one.
    pub same_pieces: bool,
}

/// A tensor's role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tensor {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output.
    Out,
    /// Log-sum-exp of the scores, fp32.
    Lse,
    /// Gradient of the output.
    DOut,
    /// Σ O∘dO, fp32.
    Delta,
    /// Gradient of Q.
    DQ,
    /// Gradient of K.
    DK,
    /// Gradient of V.
    DV,
    /// Running maximum.
    Max,
    /// Running sum.
    Sum,
    /// Sink of every query head: one row, fp32.
    Sinks,
    /// Its gradient.
    DSinks,
    /// What every row adds to it.
    SinkTerms,
    /// Largest visible score of every row.
    Top,
    /// Of every query head: one row, fp32.
    MaxLogit,
    /// Additive bias: one row per query, an element per key of the whole sequence.
    Bias,
    /// Its gradient.
    DBias,
    /// Latents that keys and values are made of: one head, shared by all.
    Latent,
    /// Their gradient.
    DLatent,
    /// Weights that make keys of latents, without what all heads share: a row per element of a key.
    UpK,
    /// Weights that make values.
    UpV,
    /// This rank's part of their gradient, fp32.
    DUpK,
    /// Likewise.
    DUpV,
    /// Of a trade: this rank's rows, all heads; the slot's index is the tensor's number.
    Local,
    /// Of a trade: whole sequences, this rank's heads. The index of a peer's buffer is the tensor's number times ranks plus the peer.
    Whole,
}

impl Tensor {
    /// Has one row for the whole call: a number per query head.
    pub fn per_head(self) -> bool {
        matches!(self, Tensor::Sinks | Tensor::DSinks | Tensor::MaxLogit)
    }

    /// Has one row per key instead of one per query.
    pub fn key_side(self) -> bool {
        use Tensor::*;
        matches!(self, K | V | DK | DV | Latent | DLatent)
    }

    /// Has a row per element of a key or value: weights and their gradients, the same for every token.
    pub fn weights(self) -> bool {
        matches!(self, Tensor::UpK | Tensor::UpV | Tensor::DUpK | Tensor::DUpV)
    }
}

/// Where a buffer comes from and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The caller's tensor: local rows, all heads.
    Caller,
    /// After the head exchange: the team's rows, this rank's heads.
    Team,
    /// Keys or values as they travel, where that is not how they are stored: the team's rows, this rank's heads.
    Code,
    /// Packed for member `index` of the team: local rows, that member's heads.
    Split,
    /// Received from member `index`: local rows, that member's heads.
    Merge,
    /// A member's rows of a team buffer without gaps, where messages must be cut alike on both sides; `index` = member.
    Pack,
    /// Own keys or values for the peers of a stage, gathered where messages must be one piece; `index` = stage mod 2.
    Send,
    /// Keys or values of a stage, `index` = stage mod 2.
    Recv,
    /// Keys and values as they are attended, where that is not how they travel: decoded, or expanded from latents, and then also their fp32 gradients. One
    /// for all stages: they are attended one after another.
    Seen,
    /// fp32 gradients of a stage's keys or values, `index` = stage mod 2.
    Part,
    /// The same in wire type.
    Wire,
    /// Gradients that came back from other teams, `index` = stage mod 2.
    Return,
    /// fp32 accumulator over all stages: the team's rows, this rank's heads.
    Acc,
    /// fp32 sum over members that share a key head: local rows, all heads.
    Sum,
    /// Numbers per head of all ranks, one row a rank.
    Ranks,
}

/// A named buffer. Printed as e.g. `RecvK1`, `SplitQ.3`, `AccDQ`; the caller's tensors by their bare name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// What it is for.
    pub kind: Kind,
    /// What it holds.
    pub tensor: Tensor,
    /// Which of several.
    pub index: u16,
}

impl Slot {
    /// A slot without an index.
    pub const fn of(kind: Kind, tensor: Tensor) -> Slot {
        Slot { kind, tensor, index: 0 }
    }

    /// The caller's tensor.
    pub const fn caller(tensor: Tensor) -> Slot {
        Slot::of(Kind::Caller, tensor)
    }

    /// One of several.
    pub const fn indexed(kind: Kind, tensor: Tensor, index: u32) -> Slot {
        Slot { kind, tensor, index: index as u16 }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Caller | Kind::Sum if matches!(self.tensor, Tensor::Local | Tensor::Whole) => {
                let sum = if self.kind == Kind::Sum { "Sum" } else { "" };
                write!(f, "{sum}{:?}{}", self.tensor, self.index)
            }
            Kind::Caller => write!(f, "{:?}", self.tensor),
            Kind::Split | Kind::Merge | Kind::Pack => {
                write!(f, "{:?}{:?}.{}", self.kind, self.tensor, self.index)
            }
            Kind::Send | Kind::Recv | Kind::Part | Kind::Wire | Kind::Return => {
                write!(f, "{:?}{:?}{}", self.kind, self.tensor, self.index)
            }
            Kind::Team | Kind::Code | Kind::Seen | Kind::Acc | Kind::Sum | Kind::Ranks => {
                write!(f, "{:?}{:?}", self.kind, self.tensor)
            }
        }
    }
}

/// Shape and type of a slot: dense `[rows, heads, dim]` unless it is the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Which.
    pub slot: Slot,
    /// Rows.
    pub rows: u32,
    /// Heads.
    pub heads: u32,
    /// Elements per row and head; of [`DType::Fp8`] bytes, those of the scales included.
    pub dim: u32,
    /// Storage type.
    pub dtype: DType,
    /// Lives in the caller's saved buffer between forward and backward, not in the workspace.
    pub saved: bool,
}

impl SlotInfo {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.heads as usize * self.dim as usize * self.dtype.size()
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.rows as usize * self.row_bytes()
    }
}

/// Rows `first`, `first + step`, … of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    /// First row.
    pub first: u32,
    /// Rows between two rows.
    pub step: u32,
    /// Number of rows.
    pub count: u32,
}

impl Rows {
    /// Consecutive rows.
    pub fn range(first: u32, count: u32) -> Rows {
        Rows { first, step: 1, count }
    }

    /// The rows one by one.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..self.count).map(move |i| self.first + i * self.step)
    }
}

/// Rows of a slot that go to, or come from, one peer. Messages between two ranks are matched in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The other rank, in the numbering of the problem (0 … P−1).
    pub peer: u32,
    /// The buffer; dense, never the caller's unless it is dense.
    pub slot: Slot,
    /// The rows, in order.
    pub rows: Vec<Rows>,
}

impl Message {
    /// Number of rows.
    pub fn count(&self) -> u32 {
        self.rows.iter().map(|r| r.count).sum()
    }
}

/// An ordered queue of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Kernels and copies.
    Compute,
    /// Exchanges: one host-ordered queue per communicator.
    Comm,
}

/// A point that one step signals and others wait for.
pub type Event = u32;

/// What a fill writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// 0 in the slot's type.
    Zero,
    /// −∞ in fp32.
    NegInf,
}

/// What a step does. No variant knows the name of a communication type or a mask.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// One grouped exchange: all sends and receives progress together.
    Exchange {
        /// What leaves.
        sends: Vec<Message>,
        /// What arrives.
        recvs: Vec<Message>,
    },
    /// Forward attention of all rows of `q` over `slices` of a key buffer; state in `AccOut`, `AccMax`, `AccSum`.
    Attend {
        /// Queries.
        q: Slot,
        /// Keys; the values lie in the same kind of slot.
        k: Slot,
        /// The work.
        slices: Vec<Slice>,
        /// Start from the empty state.
        first: bool,
        /// Normalise and write O and LSE here.
        last: Option<(Slot, Slot)>,
    },
    /// Backward attention: adds to dQ and to the key gradients.
    AttendBackward {
        /// Queries; dO and dQ have the same rows.
        q: Slot,
        /// Gradient of the output.
        d_out: Slot,
        /// LSE.
        lse: Slot,
        /// Σ O∘dO.
        delta: Slot,
        /// Keys; the values lie in the same kind of slot.
        k: Slot,
        /// fp32 gradient of the keys, same rows as `k`; that of the values lies in the same kind of slot.
        dk: Slot,
        /// The work.
        slices: Vec<Slice>,
    },
    /// Keys and values of this rank's heads from latents and the caller's weights.
    Expand {
        /// Latents.
        latent: Slot,
        /// Keys; the values lie in the same kind of slot.
        k: Slot,
        /// Rows, the same in all.
        rows: Vec<Range<u32>>,
    },
    /// The gradients of what was expanded: adds to those of the latents, and to the caller's of the weights.
    Contract {
        /// fp32 gradient of the keys; that of the values lies in the same kind of slot.
        dk: Slot,
        /// The latents that were expanded.
        latent: Slot,
        /// Their fp32 gradient.
        d_latent: Slot,
        /// Rows, the same in all.
        rows: Vec<Range<u32>>,
    },
    /// `Delta` = Σ O∘dO over the caller's rows.
    Delta,
    /// `SinkTerms` = −exp(sink − LSE)·Delta over the caller's rows; 0 where the LSE is −∞.
    SinkTerms,
    /// A number per head over all rows of `src`: the sum or the largest.
    Reduce {
        /// From.
        src: Slot,
        /// To.
        dst: Slot,
        /// Row written.
        dst_row: u32,
        /// First head written; as many as `src` has.
        dst_head: u32,
        /// The largest instead of the sum.
        max: bool,
    },
    /// Copies, converts or adds rows; to and from [`DType::Fp8`] it encodes and decodes them.
    Copy {
        /// From.
        src: Slot,
        /// First head read.
        src_head: u32,
        /// To.
        dst: Slot,
        /// First head written.
        dst_head: u32,
        /// Number of heads.
        heads: u32,
        /// Which rows.
        runs: Vec<Run>,
        /// Add in fp32 instead of overwriting.
        add: bool,
    },
    /// Writes a constant.
    Fill {
        /// Where.
        slot: Slot,
        /// Which rows.
        rows: Vec<Rows>,
        /// What.
        value: Value,
    },
}

/// One step: waits for events, does one thing, may signal an event.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its queue.
    pub lane: Lane,
    /// KV stage that it serves; 0 is the rank's own keys, and everything outside the stages. Exchange s brings the keys of stage s
    /// and, in backward, takes home the gradients of stage s − 2, so there it goes on to two more than there are stages.
    pub stage: u32,
    /// Events that come first.
    pub waits: Vec<Event>,
    /// Event that it signals when done.
    pub signal: Option<Event>,
    /// What it does.
    pub op: Op,
}

/// Which tokens the rows of attend steps are. There only if scores depend on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Origins {
    /// Of the query rows of every attend step.
    pub queries: Vec<Segment>,
    /// Of the key rows of stage s: in the buffer of the own keys, or of the stage.
    pub keys: Vec<Vec<Segment>>,
}

/// What one rank does in one pass. Steps are in an order that respects all events, so a single queue may run them too.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The problem, shared by all ranks.
    pub problem: Arc<Problem>,
    /// What is traded, if that is all that this plan does.
    pub trade: Option<Arc<trade::Trade>>,
    /// This rank, 0 … P−1.
    pub rank: u32,
    /// Which pass.
    pub pass: Pass,
    /// What the launch told.
    pub options: Options,
    /// All slots, sorted; the caller's first.
    pub slots: Vec<SlotInfo>,
    /// The steps.
    pub steps: Vec<Step>,
    /// Number of events.
    pub events: u32,
    /// Number of KV stages, at most what the problem asks for: distances at which nobody needs keys are left out.
    pub stages: u32,
    /// Which heads this rank computes.
    pub share: HeadShare,
    /// Which tokens its rows are.
    pub origins: Option<Origins>,
}

impl Plan {
    /// Plans one rank. The problem is validated before.
    pub fn new(problem: &Arc<Problem>, rank: u32, pass: Pass, options: Options) -> Plan {
        let survey = survey::Survey::new(problem, rank, options.pack);
        build::plan(problem, rank, &survey, pass, options)
    }

    /// Bytes of its lists, the regions of its problem among them; what has no length of its own to speak of is left out.
    pub fn bytes(&self) -> usize {
        let messages = |list: &[Message]| -> usize {
            list.iter().map(|m| size_of_val(m) + size_of_val(&m.rows[..])).sum()
        };
        let lists = |op: &Op| match op {
            Op::Exchange { sends, recvs } => messages(sends) + messages(recvs),
            Op::Attend { slices, .. } | Op::AttendBackward { slices, .. } => {
                size_of_val(&slices[..])
            }
            Op::Copy { runs, .. } => size_of_val(&runs[..]),
            _ => 0,
        };
        size_of_val(&self.slots[..])
            + size_of_val(self.problem.regions.list())
            + self.steps.iter().map(|s| size_of_val(s) + lists(&s.op)).sum::<usize>()
    }

    /// Plans forward and backward of one rank, in less time than one after the other.
    pub fn both(problem: &Arc<Problem>, rank: u32, options: Options) -> [Plan; 2] {
        let survey = survey::Survey::new(problem, rank, options.pack);
        [Pass::Forward, Pass::Backward]
            .map(|pass| build::plan(problem, rank, &survey, pass, options))
    }

    /// The plans of all ranks.
    pub fn all(problem: &Arc<Problem>, pass: Pass, options: Options) -> Vec<Plan> {
        (0..problem.ranks).map(|rank| Plan::new(problem, rank, pass, options)).collect()
    }

    /// Shape of a slot; every slot that a step names is there.
    pub fn info(&self, slot: Slot) -> &SlotInfo {
        match self.slots.binary_search_by_key(&slot, |s| s.slot) {
            Ok(index) => &self.slots[index],
            Err(_) => panic!("plan has no slot {slot:?}"),
        }
    }

    /// Number of a tensor's rows that are weights.
    pub fn weight_rows(problem: &Problem, tensor: Tensor) -> u32 {
        match tensor {
            Tensor::UpV | Tensor::DUpV => problem.dim_v,
            _ => problem.dim_qk - problem.latent.map_or(0, |l| l.rope),
        }
    }

    /// Where attend steps find the bias.
    pub fn bias(&self) -> Option<Slot> {
        let slots = [Slot::of(Kind::Team, Tensor::Bias), Slot::caller(Tensor::Bias)];
        slots.into_iter().find(|slot| self.slots.binary_search_by_key(slot, |s| s.slot).is_ok())
    }

    /// Where backward adds its gradient.
    pub fn d_bias(&self) -> Option<Slot> {
        let slot = Slot::of(Kind::Acc, Tensor::DBias);
        self.slots.binary_search_by_key(&slot, |s| s.slot).ok().map(|_| slot)
    }

    /// Query head → key head for this rank's share.
    pub fn head_map(&self) -> HeadMap {
        HeadMap {
            q_first: self.share.q.start,
            group: self.problem.group(),
            kv_first: self.share.kv.start,
        }
    }
}
