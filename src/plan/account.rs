//! What a plan costs: bytes, FLOPs, memory. Sums over its steps, nothing modelled.

use super::{Kind, Op, Pass, Plan, Slot, Tensor};
use std::collections::HashMap;
use std::ops::Range;

/// Alignment of every slot in the workspace, one cache line and the widest SIMD load.
pub const ALIGN: usize = 64;

/// Cost of one rank's pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Of those, keys and values between teams.
    pub received_keys: u64,
    /// Key rows received between teams, counted once for K and V together.
    pub received_key_rows: u64,
    /// Of the bytes received, gradients between teams.
    pub received_gradients: u64,
    /// Of the bytes received, the head exchange.
    pub received_heads: u64,
    /// (query, key, head) triples computed. Like every number here it stays at the largest of 64 bits where it would be more.
    pub pairs: u64,
    /// Floating-point operations of attention: 2·(dqk + dv) a triple forward, 2·(3·dqk + 2·dv) backward.
    pub flops: u64,
    /// Beside those, what expanding latents takes, 2·dim·(dqk − rope + dv) a row and head, and contracting their gradients, twice as much.
    pub latent_flops: u64,
    /// Workspace.
    pub workspace: u64,
    /// Kept between forward and backward.
    pub saved: u64,
}

impl Account {
    /// Both, field by field.
    fn zip(self, other: Account, f: impl Fn(u64, u64) -> u64) -> Account {
        Account {
            sent: f(self.sent, other.sent),
            received: f(self.received, other.received),
            received_keys: f(self.received_keys, other.received_keys),
            received_key_rows: f(self.received_key_rows, other.received_key_rows),
            received_gradients: f(self.received_gradients, other.received_gradients),
            received_heads: f(self.received_heads, other.received_heads),
            pairs: f(self.pairs, other.pairs),
            flops: f(self.flops, other.flops),
            latent_flops: f(self.latent_flops, other.latent_flops),
            workspace: f(self.workspace, other.workspace),
            saved: f(self.saved, other.saved),
        }
    }
}

/// Cost of one pass over all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// All ranks together.
    pub total: Account,
    /// The most of any rank, field by field.
    pub worst: Account,
}

/// The cost of all ranks' plans.
pub fn summary(plans: &[Plan]) -> Summary {
    plans.iter().map(account).fold(Summary::default(), |s, a| Summary {
        total: s.total.zip(a, u64::saturating_add),
        worst: s.worst.zip(a, u64::max),
    })
}

/// The cost of a plan.
pub fn account(plan: &Plan) -> Account {
    let mut a = Account {
        workspace: workspace_bytes(plan) as u64,
        saved: saved_bytes(plan) as u64,
        ..Account::default()
    };
    let heads = plan.share.q.len() as u64;
    for step in &plan.steps {
        match &step.op {
            Op::Exchange { sends, recvs } => {
                let bytes = |m: &super::Message| {
                    u64::from(m.count()) * plan.info(m.slot).row_bytes() as u64
                };
                a.sent += sends.iter().map(bytes).sum::<u64>();
                for m in recvs {
                    a.received += bytes(m);
                    match m.slot.kind {
                        Kind::Recv => {
                            a.received_keys += bytes(m);
                            a.received_key_rows +=
                                if matches!(m.slot.tensor, Tensor::K | Tensor::Latent) {
                                    u64::from(m.count())
                                } else {
                                    0
                                };
                        }
                        Kind::Return => a.received_gradients += bytes(m),
                        Kind::Ranks => {} // some bytes a head
                        _ => a.received_heads += bytes(m),
                    }
                }
            }
            Op::Attend { slices, .. } | Op::AttendBackward { slices, .. } => {
                let pairs = slices.iter().map(|s| s.pairs()).sum::<u64>();
                a.pairs = a.pairs.saturating_add(heads.saturating_mul(pairs));
            }
            Op::Expand { rows, .. } => a.latent_flops += expansion(plan, rows),
            Op::Contract { rows, .. } => a.latent_flops += 2 * expansion(plan, rows),
            _ => {}
        }
    }
    let (qk, v) = (u64::from(plan.problem.dim_qk), u64::from(plan.problem.dim_v));
    let each = if plan.pass == Pass::Forward { 2 * (qk + v) } else { 2 * (3 * qk + 2 * v) };
    // A billion tokens have more than 64 bits' worth.
    a.flops = a.pairs.saturating_mul(each);
    a
}

/// What expanding some rows of latents takes.
fn expansion(plan: &Plan, rows: &[Range<u32>]) -> u64 {
    let p = &plan.problem;
    let (dim, rope) = p.latent.map_or((0, 0), |l| (u64::from(l.dim), u64::from(l.rope)));
    let made = u64::from(p.dim_qk) - rope + u64::from(p.dim_v);
    let count: u64 = rows.iter().map(|r| r.len() as u64).sum();
    2 * dim * made * count * plan.share.kv.len() as u64
}

/// Where every slot that is not the caller's lies: offsets into the workspace, or into the saved buffer.
pub fn layout(plan: &Plan) -> HashMap<Slot, usize> {
    let (mut workspace, mut saved) = (0, 0);
    let mut out = HashMap::new();
    for s in plan.slots.iter().filter(|s| s.slot.kind != Kind::Caller) {
        let at = if s.saved { &mut saved } else { &mut workspace };
        out.insert(s.slot, *at);
        *at += s.bytes().next_multiple_of(ALIGN);
    }
    out
}

/// Bytes of workspace that a pass needs beside the caller's tensors.
pub fn workspace_bytes(plan: &Plan) -> usize {
    size(plan, false)
}

/// Bytes that forward leaves for backward.
pub fn saved_bytes(plan: &Plan) -> usize {
    size(plan, true)
}

fn size(plan: &Plan, saved: bool) -> usize {
    let own = plan.slots.iter().filter(|s| s.slot.kind != Kind::Caller && s.saved == saved);
    own.map(|s| s.bytes().next_multiple_of(ALIGN)).sum()
}
