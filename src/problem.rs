//! A [`Problem`] holds everything that decides what every rank does: shapes, lengths, mask, partition, communication. It is the
//! same on all ranks; its [`Problem::hash`] is what they compare.

use crate::dtype::{DType, Fp8};
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::partition::{Partition, Side};
use crate::regions::{Regions, Sight};
use crate::score::Score;
use std::hash::{Hash, Hasher};

/// Where the true tokens of a sequence lie within its padded length: `before` padding tokens, `len` true ones, padding up to `padded`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Padding tokens before the first true one.
    pub before: u32,
    /// True tokens.
    pub len: u32,
    /// All tokens.
    pub padded: u32,
}

impl Extent {
    /// `len` tokens without padding.
    pub fn full(len: u32) -> Extent {
        Extent { before: 0, len, padded: len }
    }
}

/// One sequence: a batch entry, or a document of a packed buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// Query side.
    pub q: Extent,
    /// Key side.
    pub k: Extent,
}

impl Sequence {
    /// Self-attention without padding.
    pub fn square(len: u32) -> Sequence {
        Sequence { q: Extent::full(len), k: Extent::full(len) }
    }

    /// The extent of a side.
    pub fn extent(&self, side: Side) -> Extent {
        match side {
            Side::Query => self.q,
            Side::Key => self.k,
        }
    }
}

/// The four names. What they mean is [`CommType::inner`] and [`CommType::default_stages`], nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommType {
    /// Ring attention: keys and values from one peer per stage.
    P2p,
    /// Keys and values from all peers in one stage.
    AllGather,
    /// Heads are traded for sequence (Ulysses).
    A2a,
    /// Heads are traded inside teams of consecutive ranks, keys and values exchanged between teams (USP).
    A2aP2p,
}

impl CommType {
    /// Every communication type.
    pub const ALL: [CommType; 4] =
        [CommType::P2p, CommType::AllGather, CommType::A2a, CommType::A2aP2p];

    /// Name as Megatron writes it.
    pub fn name(self) -> &'static str {
        match self {
            CommType::P2p => "p2p",
            CommType::AllGather => "all_gather",
            CommType::A2a => "a2a",
            CommType::A2aP2p => "a2a+p2p",
        }
    }

    /// The type with this name; `allgather` is accepted too.
    pub fn parse(name: &str) -> Option<CommType> {
        let name = if name == "allgather" { "all_gather" } else { name };
        CommType::ALL.into_iter().find(|c| c.name() == name)
    }

    /// Size u of the head exchange: 1, P, or the caller's inner size for `a2a+p2p` (0 = the largest divisor of P that is at most √P).
    pub fn inner(self, ranks: u32, asked: u32) -> Result<u32> {
        match self {
            CommType::P2p | CommType::AllGather if asked > 1 => Err(Error::argument(format!(
                "inner size: got {asked}, but {} trades no heads (allowed: 0 or 1)",
                self.name()
            ))),
            CommType::P2p | CommType::AllGather => Ok(1),
            CommType::A2a if asked != 0 && asked != ranks => Err(Error::argument(format!(
                "inner size: got {asked}, but a2a trades heads among all {ranks} ranks (allowed: 0 or {ranks})"
            ))),
            CommType::A2a => Ok(ranks),
            CommType::A2aP2p if asked == 0 => {
                let u = (1..=ranks.isqrt()).rev().find(|u| ranks.is_multiple_of(*u));
                Ok(u.unwrap_or(1))
            }
            CommType::A2aP2p if !ranks.is_multiple_of(asked) => Err(Error::argument(format!(
                "inner size: got {asked}, which does not divide the group's {ranks} ranks"
            ))),
            CommType::A2aP2p => Ok(asked),
        }
    }

    /// Number of KV stages that the name stands for, among `teams` teams.
    pub fn default_stages(self, teams: u32) -> u32 {
        match self {
            CommType::AllGather => 1.min(teams - 1),
            _ => teams - 1,
        }
    }
}

/// Type of partial dK and dV on the wire. Sums are fp32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wire {
    /// The tensors' storage type: one more rounding per stage.
    Storage,
    /// fp32.
    F32,
}

/// Keys and values that are made of one latent per token (multi-head latent attention, arXiv 2405.04434): head h has
/// k = [up_k[h]·c ; r] and v = up_v[h]·c, rounded to the storage type. The latent (c ; r) travels, and who attends it expands it for its own heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Latent {
    /// Elements of c: a multiple of 8 from 8 to 4096.
    pub dim: u32,
    /// Elements of r, which all heads share: a multiple of 8, less than `dim_qk`; it arrives with its positions rotated into it.
    pub rope: u32,
}

impl Latent {
    /// Elements of a token.
    pub fn width(self) -> u32 {
        self.dim + self.rope
    }

    fn validate(self, heads: u32, kv_heads: u32, dim_qk: u32) -> Result<()> {
        let Latent { dim, rope } = self;
        if dim == 0 || dim % 8 != 0 || dim > 4096 {
            return Err(Error::argument(format!(
                "latent_dim: got {dim}, allowed multiples of 8 from 8 to 4096"
            )));
        }
        if rope % 8 != 0 || rope >= dim_qk {
            return Err(Error::argument(format!(
                "latent_rope: got {rope}, allowed multiples of 8 below head_dim_qk = {dim_qk}"
            )));
        }
        if kv_heads != heads {
            return Err(Error::argument(format!(
                "kv_heads: got {kv_heads} with a latent, which is expanded for each of the {heads} query heads (allowed: 0 or {heads})"
            )));
        }
        Ok(())
    }
}

/// Everything that decides. See the field docs for what is allowed; [`Problem::validate`] checks it.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Size P of the group, at least 1.
    pub ranks: u32,
    /// Size u of the head exchange; divides `ranks`.
    pub inner: u32,
    /// Number of KV stages, 1 … b−1 for b = P/u teams (0 when b = 1); a plan has fewer where there is less to move.
    pub stages: u32,
    /// Classical neighbour ring: every team passes on what it received. Needs `stages` = b−1.
    pub relay: bool,
    /// Who holds which tokens.
    pub partition: Partition,
    /// Who may see whom.
    pub mask: Mask,
    /// Sequences lie packed one after another (thd) instead of one per batch entry of equal padded length.
    pub packed: bool,
    /// The sequences.
    pub seqs: Vec<Sequence>,
    /// If there are any, what queries see at most, under `mask`: nothing else of any sequence.
    pub regions: Regions,
    /// Query heads H, a multiple of `kv_heads`.
    pub heads: u32,
    /// Key heads.
    pub kv_heads: u32,
    /// Elements per head of Q and K: a multiple of 8, at most 256.
    pub dim_qk: u32,
    /// Elements per head of V and O: a multiple of 8, at most 256.
    pub dim_v: u32,
    /// Storage type of all tensors.
    pub dtype: DType,
    /// Type of partial gradients on the wire.
    pub wire: Wire,
    /// Format of keys and values on the wire, and so of what is attended, this rank's own keys included: the result does not depend on how many ranks
    /// there are. `None`: the storage type. Gradients are those of the rounded K and V, passed on to K and V as they are.
    pub kv_wire: Option<Fp8>,
    /// Multiplies q·k before the softmax.
    pub scale: f32,
    /// What else happens to scores, and what is asked about them.
    pub score: Score,
    /// Keys and values come as latents.
    pub latent: Option<Latent>,
}

impl Eq for Problem {}

impl Hash for Problem {
    fn hash<H: Hasher>(&self, h: &mut H) {
        let Problem {
            ranks,
            inner,
            stages,
            relay,
            partition,
            mask,
            packed,
            seqs,
            regions,
            heads,
            kv_heads,
            dim_qk,
            dim_v,
            dtype,
            wire,
            kv_wire,
            scale,
            score,
            latent,
        } = self;
        (ranks, inner, stages, relay, partition, mask, packed).hash(h);
        (seqs, regions, heads, kv_heads, dim_qk, dim_v, dtype).hash(h);
        (wire, kv_wire, scale.to_bits(), score, latent).hash(h);
    }
}

impl Problem {
    /// Number of teams b = P/u.
    pub fn teams(&self) -> u32 {
        self.ranks / self.inner
    }

    /// Query heads per key head.
    pub fn group(&self) -> u32 {
        self.heads / self.kv_heads
    }

    /// Columns of an additive bias: keys of a padded sequence, of the longest if they are packed.
    pub fn bias_columns(&self) -> u32 {
        self.seqs.iter().map(|s| s.k.padded).max().unwrap_or(0)
    }

    /// What the queries of a sequence may see of its keys.
    pub fn sight(&self, seq: u32) -> Sight<'_> {
        let s = &self.seqs[seq as usize];
        self.regions.sight(seq, self.mask.band(s.q.len, s.k.len))
    }

    /// 64 bits that two ranks compare; includes the library's version. FNV-1a.
    pub fn fingerprint(&self) -> u64 {
        let mut h = Fnv::default();
        (env!("CARGO_PKG_VERSION"), self).hash(&mut h);
        h.finish()
    }

    /// Checks everything that does not depend on a rank; the error names the field.
    pub fn validate(&self) -> Result<()> {
        let bad = |text: String| Err(Error::argument(text));
        if self.ranks == 0 || self.inner == 0 || !self.ranks.is_multiple_of(self.inner) {
            return bad(format!(
                "inner size: got {}, which does not divide the group's {} ranks",
                self.inner, self.ranks
            ));
        }
        let teams = self.teams();
        let allowed = if teams == 1 { 0..=0 } else { 1..=teams - 1 };
        if !allowed.contains(&self.stages) {
            return bad(format!(
                "stages: got {}, allowed {}..={}",
                self.stages,
                allowed.start(),
                allowed.end()
            ));
        }
        if self.relay && self.stages + 1 != teams {
            return bad(format!(
                "relay: the neighbour ring has {} stages, got {}",
                teams - 1,
                self.stages
            ));
        }
        if self.kv_heads == 0 || self.heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return bad(format!(
                "heads: got {} query heads and {} key heads; query heads must be a multiple of key heads",
                self.heads, self.kv_heads
            ));
        }
        for (name, dim) in [("head_dim_qk", self.dim_qk), ("head_dim_v", self.dim_v)] {
            if dim == 0 || dim % 8 != 0 || dim > 256 {
                return bad(format!("{name}: got {dim}, allowed multiples of 8 from 8 to 256"));
            }
        }
        if !self.scale.is_finite() {
            return bad(format!("softmax_scale: got {}, must be finite", self.scale));
        }
        self.score.validate(self.heads)?;
        if let Some(latent) = self.latent {
            latent.validate(self.heads, self.kv_heads, self.dim_qk)?;
            if self.kv_wire.is_some() {
                return Err(Error::unsupported(
                    "kv_wire: latents travel in the storage type; a format of 8 bits for them is not offered",
                ));
            }
        }
        if self.packed && self.score.bias.is_some_and(|b| b.batch) {
            return bad("bias: packed sequences have no batch dimension".into());
        }
        for side in [Side::Query, Side::Key] {
            self.validate_lengths(side)?;
        }
        if !self.regions.is_empty() {
            let lengths: Vec<_> = self.seqs.iter().map(|s| (s.q.len, s.k.len)).collect();
            self.regions.validate(&lengths)?;
        }
        if self.partition == Partition::Balanced {
            self.validate_balanced()?;
        }
        if let Partition::List { q, k } = &self.partition {
            validate_list(self, q, Side::Query)?;
            validate_list(self, k, Side::Key)?;
            validate_steps(self, q, k)?;
            if !self.packed && self.score.bias.is_some_and(|b| !b.batch && b.queries) {
                validate_entries_alike(q, self.seqs.len() as u32)?;
            }
        }
        Ok(())
    }

    fn validate_balanced(&self) -> Result<()> {
        if !self.packed {
            return Err(Error::unsupported(
                "partition: balanced deals out packed documents; in a dense batch zigzag is as even, and cuts all entries alike",
            ));
        }
        match self.seqs.iter().position(|s| s.q != s.k) {
            None => Ok(()),
            Some(i) => Err(Error::unsupported(format!(
                "partition: balanced deals out queries and keys together, but sequence {i} has {} of {} query rows and {} of {} key rows",
                self.seqs[i].q.len,
                self.seqs[i].q.padded,
                self.seqs[i].k.len,
                self.seqs[i].k.padded
            ))),
        }
    }

    fn validate_lengths(&self, side: Side) -> Result<()> {
        let name = if side == Side::Query { "q" } else { "k" };
        if self.seqs.is_empty() {
            return Err(Error::argument("sequences: got none"));
        }
        let mut total = 0u64;
        for (i, s) in self.seqs.iter().enumerate() {
            let e = s.extent(side);
            if u64::from(e.before) + u64::from(e.len) > u64::from(e.padded) {
                return Err(Error::argument(format!(
                    "{name} length of sequence {i}: {} padding and {} true tokens exceed the padded length {}",
                    e.before, e.len, e.padded
                )));
            }
            if !self.packed && e.padded != self.seqs[0].extent(side).padded {
                return Err(Error::argument(format!(
                    "{name} padded length of batch entry {i}: got {}, entry 0 has another",
                    e.padded
                )));
            }
            total += u64::from(e.padded);
        }
        if total > u64::from(u32::MAX / 4) {
            return Err(Error::unsupported(format!(
                "{name}: {total} tokens in all; at most {} are addressed",
                u32::MAX / 4
            )));
        }
        Ok(())
    }
}

/// Are lists of plain runs each position of each padded sequence exactly once? What is not as simple counts as no.
fn runs_cover(p: &Problem, lists: &[Vec<crate::partition::Stretch>], side: Side) -> bool {
    let mut runs: Vec<_> = lists.iter().flatten().collect();
    runs.sort_unstable_by_key(|s| (s.seq, s.start));
    let mut runs = runs.into_iter().peekable();
    for (seq, s) in p.seqs.iter().enumerate() {
        let mut end = 0;
        while let Some(run) = runs.next_if(|r| r.seq as usize == seq) {
            if run.start != end || run.step != 1 || run.len == 0 {
                return false;
            }
            let Some(next) = end.checked_add(run.len) else { return false };
            end = next;
        }
        if end != s.extent(side).padded {
            return false;
        }
    }
    runs.next().is_none()
}

/// Every position of every padded sequence exactly once.
fn validate_list(p: &Problem, lists: &[Vec<crate::partition::Stretch>], side: Side) -> Result<()> {
    if lists.len() == p.ranks as usize && runs_cover(p, lists, side) {
        return Ok(());
    }
    let name = if side == Side::Query { "q" } else { "k" };
    if lists.len() != p.ranks as usize {
        return Err(Error::argument(format!(
            "{name} partition list: got lists for {} ranks, the group has {}",
            lists.len(),
            p.ranks
        )));
    }
    let mut holder: Vec<Vec<u32>> =
        p.seqs.iter().map(|s| vec![u32::MAX; s.extent(side).padded as usize]).collect();
    for (rank, list) in lists.iter().enumerate() {
        for s in list {
            let Some(seq) = holder.get_mut(s.seq as usize) else {
                return Err(Error::argument(format!(
                    "{name} partition list of rank {rank}: sequence {} does not exist",
                    s.seq
                )));
            };
            if s.step == 0 || s.len == 0 {
                return Err(Error::argument(format!(
                    "{name} partition list of rank {rank}: step and length must be at least 1"
                )));
            }
            for i in 0..u64::from(s.len) {
                let position = u64::from(s.start) + i * u64::from(s.step);
                match seq.get_mut(position as usize) {
                    Some(h) if *h == u32::MAX => *h = rank as u32,
                    Some(h) => {
                        return Err(Error::argument(format!(
                            "{name} partition list: position {position} of sequence {} is on rank {h} and on rank {rank}",
                            s.seq
                        )));
                    }
                    None => {
                        return Err(Error::argument(format!(
                            "{name} partition list of rank {rank}: position {position} is beyond sequence {}",
                            s.seq
                        )));
                    }
                }
            }
        }
    }
    for (seq, positions) in holder.iter().enumerate() {
        if let Some(position) = positions.iter().position(|&h| h == u32::MAX) {
            return Err(Error::argument(format!(
                "{name} partition list: position {position} of sequence {seq} is on no rank"
            )));
        }
    }
    Ok(())
}

/// Batch entries share the rows of a bias only if a rank holds the same positions of each.
fn validate_entries_alike(lists: &[Vec<crate::partition::Stretch>], entries: u32) -> Result<()> {
    for (rank, list) in lists.iter().enumerate() {
        if !list.is_sorted_by_key(|s| s.seq) {
            return Err(Error::argument(format!(
                "bias: shared by batch entries, but the partition list of rank {rank} does not name one entry after another"
            )));
        }
        let of =
            |seq: u32| list.iter().filter(move |s| s.seq == seq).map(|s| (s.start, s.step, s.len));
        if let Some(entry) = (1..entries).find(|e| !of(*e).eq(of(0))) {
            return Err(Error::argument(format!(
                "bias: shared by batch entries, but the partition list of rank {rank} deals entry {entry} otherwise than entry 0"
            )));
        }
    }
    Ok(())
}

/// A band stays a band only between equally spaced segments.
fn validate_steps(
    p: &Problem,
    q: &[Vec<crate::partition::Stretch>],
    k: &[Vec<crate::partition::Stretch>],
) -> Result<()> {
    let mut step = vec![0u32; p.seqs.len()];
    for s in q.iter().chain(k).flatten().filter(|s| s.len > 1) {
        let first = &mut step[s.seq as usize];
        if *first == 0 {
            *first = s.step;
        } else if *first != s.step {
            return Err(Error::unsupported(format!(
                "partition list: sequence {} has steps {} and {}; one step per sequence is allowed",
                s.seq, *first, s.step
            )));
        }
    }
    Ok(())
}

/// FNV-1a, 64 bits: the standard library's hasher may change between compilers, this may not.
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Fnv {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::regions::Region;

    /// One causal sequence of 16 tokens over `ranks` ranks, plain ring.
    pub(crate) fn small(ranks: u32, heads: u32, kv_heads: u32) -> Problem {
        Problem {
            ranks,
            inner: 1,
            stages: ranks - 1,
            relay: false,
            partition: Partition::Zigzag,
            mask: Mask::CAUSAL,
            packed: false,
            seqs: vec![Sequence::square(16)],
            regions: Regions::default(),
            heads,
            kv_heads,
            dim_qk: 8,
            dim_v: 8,
            dtype: DType::F32,
            wire: Wire::Storage,
            kv_wire: None,
            scale: 1.0,
            score: Score::default(),
            latent: None,
        }
    }

    #[test]
    fn fingerprint_sees_every_field() {
        let base = small(4, 4, 2);
        let changed: [fn(&mut Problem); 14] = [
            |p| p.ranks = 5,
            |p| p.stages = 1,
            |p| p.relay = true,
            |p| p.partition = Partition::Striped,
            |p| p.mask.left = Some(3),
            |p| p.seqs[0].k.len = 15,
            |p| p.regions = Regions::new(&[Region::full(0, (0, 16), (0, 16))]),
            |p| p.dtype = DType::Bf16,
            |p| p.wire = Wire::F32,
            |p| p.kv_wire = Some(Fp8::E5m2),
            |p| p.scale = 2.0,
            |p| p.score.softcap = 30.0,
            |p| p.score.slopes = [0.5; 4].into(),
            |p| p.score.dropout = 0.1,
        ];
        for change in changed {
            let mut p = base.clone();
            change(&mut p);
            assert_ne!(p.fingerprint(), base.fingerprint(), "{p:?}");
        }
    }
}
