//! How far sequences are padded: what they must divide by under sequence, context and tensor parallelism and FP8, the tail of a pack, the
//! split of a batch. Formulas are Megatron's; where they fall short ours stand beside them, and the caller chooses.
//!
//! This library's own attention needs none of it: lengths may divide by nothing. Frameworks that exchange equal shapes, and FP8 matrix
//! products, do.

use crate::error::{Error, Result};

/// FP8 recipe of the matrix products, as far as it asks for a number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8 {
    /// No FP8.
    Off,
    /// Scales per tensor or per block: rows in multiples of 16.
    Rows16,
    /// MXFP8: rows in multiples of 32.
    Rows32,
}

impl Fp8 {
    /// Rows of a matrix product must divide by this.
    pub fn rows(self) -> u64 {
        match self {
            Fp8::Off => 1,
            Fp8::Rows16 => 16,
            Fp8::Rows32 => 32,
        }
    }
}

/// Whose formula.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Every need at once: equal chunks, and on every rank as many rows as FP8 wants.
    Every,
    /// Megatron's `get_padding`: FP8 counts only where neither context nor sequence parallelism does.
    Megatron,
}

/// How a layer is split, as far as it decides about padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallel {
    /// Tensor-parallel ranks.
    pub tp: u32,
    /// Context-parallel ranks; zigzag, so 2·cp chunks.
    pub cp: u32,
    /// Between attention and MLP every tensor-parallel rank holds its part of the rank's sequence.
    pub sequence_parallel: bool,
    /// FP8 recipe.
    pub fp8: Fp8,
}

impl Parallel {
    /// A sequence's length must be a multiple of this.
    ///
    /// | | Megatron | every need |
    /// |---|---|---|
    /// | cp > 1 and sequence parallel | 2·cp·tp | lcm(2·cp·tp, cp·fp8) |
    /// | cp > 1 | 2·cp | lcm(2·cp, cp·fp8) |
    /// | sequence parallel | tp | lcm(tp, fp8) |
    /// | neither | fp8 | fp8 |
    ///
    /// cp·fp8, not fp8: the matrix products see a rank's share of the sequence, S/cp rows (with sequence parallelism too: they gather first).
    pub fn factor(&self, rule: Rule) -> Result<u64> {
        for (name, size) in [("tp", self.tp), ("cp", self.cp)] {
            if size == 0 || size > 1 << 20 {
                return Err(Error::argument(format!(
                    "{name}: got {size}, allowed 1 … {}",
                    1 << 20
                )));
            }
        }
        let (tp, cp) = (u64::from(self.tp), u64::from(self.cp));
        let chunks = if cp > 1 { 2 * cp } else { 1 };
        let split = chunks * if self.sequence_parallel { tp } else { 1 };
        let fp8 = self.fp8.rows();
        Ok(match rule {
            Rule::Every => lcm(split, cp * fp8),
            Rule::Megatron if cp > 1 || self.sequence_parallel => split,
            Rule::Megatron => fp8,
        })
    }
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// Tokens to add to `length` for a multiple of `factor`: 0 where it is one.
pub fn padding(length: u64, factor: u64) -> u64 {
    length.next_multiple_of(factor) - length
}

/// Tokens to add where tensor-parallel communication overlaps the matrix products, which needs one fixed length.
/// Refuses a sequence that is longer (Megatron returns a negative number), and, unless its rule is asked for, a fixed length that is no
/// multiple of the factor.
pub fn padding_to(length: u64, fixed: u64, parallel: &Parallel, rule: Rule) -> Result<u64> {
    let factor = parallel.factor(rule)?;
    if fixed < length {
        return Err(Error::argument(format!(
            "decoder length: got {fixed}, the sequence has {length} tokens"
        )));
    }
    if rule == Rule::Every && !fixed.is_multiple_of(factor) {
        return Err(Error::argument(format!(
            "decoder length: got {fixed}, must be a multiple of {factor}"
        )));
    }
    Ok(fixed - length)
}

/// Cumulative lengths with every sequence padded to a multiple of `factor`.
pub fn cu_padded(cu: &[u64], factor: u64) -> Result<Vec<u64>> {
    cumulative("cu_seqlens", cu)?;
    if factor == 0 {
        return Err(Error::argument("factor: got 0, must be at least 1"));
    }
    let mut end = 0;
    let padded = |w: &[u64]| {
        end += (w[1] - w[0]).next_multiple_of(factor);
        end
    };
    Ok(std::iter::once(0).chain(cu.windows(2).map(padded)).collect())
}

fn cumulative(name: &str, cu: &[u64]) -> Result<()> {
    if cu.first() != Some(&0) {
        return Err(Error::argument(format!(
            "{name}: got {:?} first, must begin with 0",
            cu.first()
        )));
    }
    match cu.windows(2).position(|w| w[1] < w[0]) {
        Some(i) => Err(Error::argument(format!(
            "{name}: got {} after {} at entry {}, must never fall",
            cu[i + 1],
            cu[i],
            i + 1
        ))),
        None => Ok(()),
    }
}

/// What becomes of the rows between a pack's end and its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// They are a sequence of their own, of true tokens.
    AppendDummy,
    /// They are padding of the last sequence.
    ExtendLast,
}

/// How many rows every rank gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A multiple of this many per rank.
    Multiple(u64),
    /// So many per rank.
    Rows(u64),
}

/// How a pack is filled up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailRule {
    /// Context-parallel ranks.
    pub ranks: u32,
    /// Chunks per rank that every sequence is cut into: 2 for zigzag, 1 where the pack is cut as one piece.
    pub chunks: u32,
    /// Rows per rank.
    pub target: Target,
    /// What the tail is.
    pub tail: Tail,
    /// Sequences in the result, the dummy included: missing ones are empty. `None`: as many as there are.
    pub slots: Option<u32>,
}

/// A pack that is filled up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pack {
    /// Cumulative true lengths.
    pub cu: Vec<u64>,
    /// Cumulative padded lengths; the last is the number of rows of all ranks.
    pub padded: Vec<u64>,
    /// Longest sequence, padding included; with slots, where shapes must not depend on the batch, all rows.
    pub longest: u64,
}

/// Fills up a pack of sequences with cumulative true lengths `cu` and padded lengths `padded`.
pub fn fill(cu: &[u64], padded: &[u64], rule: &TailRule) -> Result<Pack> {
    cumulative("cu_seqlens", cu)?;
    cumulative("cu_seqlens_padded", padded)?;
    let bad = |text: String| Err(Error::argument(text));
    if cu.len() != padded.len() {
        return bad(format!(
            "cu_seqlens_padded: got {} entries, cu_seqlens has {}",
            padded.len(),
            cu.len()
        ));
    }
    let pairs = cu.windows(2).zip(padded.windows(2));
    if let Some(i) = pairs.clone().position(|(c, p)| c[1] - c[0] > p[1] - p[0]) {
        return bad(format!(
            "cu_seqlens_padded: sequence {i} has {} tokens and a padded length of {}",
            cu[i + 1] - cu[i],
            padded[i + 1] - padded[i]
        ));
    }
    if rule.ranks == 0 || rule.ranks > 1 << 20 || !(1..=2).contains(&rule.chunks) {
        return bad(format!(
            "ranks: got {} with {} chunks each, allowed 1 … {} with 1 or 2",
            rule.ranks,
            rule.chunks,
            1 << 20
        ));
    }
    let ranks = u64::from(rule.ranks);
    let whole = *padded.last().expect("begins with 0");
    let rows = match rule.target {
        Target::Multiple(0) => return bad("alignment: got 0, must be at least 1".into()),
        Target::Multiple(n) => whole.div_ceil(ranks).checked_next_multiple_of(n),
        Target::Rows(n) => Some(n),
    };
    let Some(target) = rows.and_then(|r| r.checked_mul(ranks)).filter(|t| *t <= 1 << 60) else {
        return bad(format!("target: got {:?}, too many rows", rule.target));
    };
    if target < whole {
        return bad(format!(
            "target: got {} rows on each of {ranks} ranks, the sequences need {whole} in all",
            target / ranks
        ));
    }
    let tail = target - whole;
    // Zigzag between equal shapes cuts every sequence, the dummy too, into equal chunks.
    let parts = if rule.ranks > 1 && rule.chunks == 2 { 2 * ranks } else { 1 };
    let (cut, what) = match rule.tail {
        Tail::AppendDummy => (tail, "the dummy sequence"),
        Tail::ExtendLast => (target, "the pack"),
    };
    if cut % parts != 0 {
        return bad(format!(
            "target: {what} would have {cut} tokens, which 2 × {ranks} ranks do not divide; choose an even number of rows per rank, and pad every sequence to a multiple of {parts}"
        ));
    }
    let (mut cu, mut padded) = (cu.to_vec(), padded.to_vec());
    if tail > 0 {
        match rule.tail {
            Tail::AppendDummy => {
                cu.push(cu[cu.len() - 1] + tail);
                padded.push(target);
            }
            Tail::ExtendLast if cu.len() == 1 => {
                return bad("cu_seqlens: got no sequence, none can be extended".into());
            }
            Tail::ExtendLast => *padded.last_mut().expect("begins with 0") = target,
        }
    }
    let mut longest = padded.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    if let Some(slots) = rule.slots {
        if slots > 1 << 24 {
            return bad(format!("slots: got {slots}, allowed at most {}", 1 << 24));
        }
        if cu.len() - 1 > slots as usize {
            let dummy = if tail > 0 && rule.tail == Tail::AppendDummy {
                ", the dummy included"
            } else {
                ""
            };
            return bad(format!("slots: got {slots}, there are {} sequences{dummy}", cu.len() - 1));
        }
        cu.resize(slots as usize + 1, cu[cu.len() - 1]);
        padded.resize(slots as usize + 1, target);
        longest = target;
    }
    Ok(Pack { cu, padded, longest })
}

/// A rank's part of a batch that is split by entries, each rank as many: the first ranks' are whole, the last ones' padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// First entry.
    pub start: u64,
    /// Entries.
    pub len: u64,
    /// Entries of padding after them.
    pub padding: u64,
}

/// Entries of a batch of `count` that `rank` of `ranks` gets, ⌈count/ranks⌉ with padding. After a gather the padding of all ranks, which
/// is at the end, is cut off.
pub fn split(count: u64, ranks: u32, rank: u32) -> Result<Share> {
    member(ranks, rank)?;
    let each = count.div_ceil(u64::from(ranks));
    let start = each.saturating_mul(u64::from(rank)).min(count);
    let len = each.min(count - start);
    Ok(Share { start, len, padding: each - len })
}

fn member(ranks: u32, rank: u32) -> Result<()> {
    if rank >= ranks {
        return Err(Error::argument(format!("rank: got {rank} of {ranks} ranks")));
    }
    Ok(())
}

/// Cumulative lengths of a batch of `batch` entries of `length` tokens with `padding` of them at the end of each: true ones, and, where the
/// attention must know of padding, padded ones. Megatron's multimodal rule: then the batch is packed (thd), with context parallelism that is
/// `ranks` > 1 and padding, or where packing is asked for.
pub fn batch_lengths(
    batch: u64,
    length: u64,
    padding: u64,
    ranks: u32,
    packed: bool,
) -> Result<(Vec<u64>, Option<Vec<u64>>)> {
    if padding > length || batch.checked_mul(length).is_none_or(|n| n > 1 << 60) || batch > 1 << 24
    {
        return Err(Error::argument(format!(
            "length: got {batch} entries of {length} tokens, {padding} of them padding"
        )));
    }
    let every = |step: u64| (0..=batch).map(|i| i * step).collect();
    let shown = ranks > 1 && (padding > 0 || packed);
    Ok((every(length - padding), shown.then(|| every(length))))
}

/// Where a list of images is cut among ranks so that every image is whole: rank r gets images `bounds[r]` up to `bounds[r + 1]`.
///
/// `rows` are the images' tokens. `media` counts the images that belong together (frames of a video, 1 for a picture), `tubelet` frames of one
/// medium stay together (1: none). [`Rule::Every`]: the fullest rank has as few tokens as it can have, and no rank is empty where there are
/// enough pieces. [`Rule::Megatron`], for `tubelet` 1: ⌊images/ranks⌋ each and the rest on the last rank (7 images on 4 ranks: 1, 1, 1, 4),
/// whatever their size; with fewer images than ranks one each, counting dummies after the true ones.
pub fn image_bounds(
    rows: &[u64],
    media: &[u64],
    tubelet: u64,
    ranks: u32,
    rule: Rule,
) -> Result<Vec<u64>> {
    let images = rows.len() as u64;
    let bad = |text: String| Err(Error::argument(text));
    if ranks == 0 || ranks > 1 << 20 || tubelet == 0 {
        return bad(format!("ranks, tubelet: got {ranks} and {tubelet}, must be at least 1"));
    }
    if media.iter().try_fold(0u64, |n, m| n.checked_add(*m)) != Some(images) {
        return bad(format!("media: got {media:?}, which are not {images} images in all"));
    }
    if rows.iter().try_fold(0u64, |n, r| n.checked_add(*r)).is_none() {
        return bad("rows: the sum overflows".into());
    }
    if rule == Rule::Megatron {
        if tubelet > 1 {
            return Err(Error::unsupported(
                "tubelet: Megatron's rule is offered for single images only; use the other",
            ));
        }
        let each = images.max(ranks.into()) / u64::from(ranks);
        let inner = (0..u64::from(ranks)).map(|r| r * each);
        return Ok(inner.chain([images.max(ranks.into())]).collect());
    }
    // Pieces that stay whole: their end, and their tokens.
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut at = 0u64;
    for frames in media {
        let end = at + frames;
        while at < end {
            let next = end.min(at.saturating_add(tubelet));
            pieces.push((next, rows[at as usize..next as usize].iter().sum()));
            at = next;
        }
    }
    // The least room per rank with which the ranks hold all, found by halving.
    let (mut low, mut high) =
        (pieces.iter().map(|p| p.1).max().unwrap_or(0), rows.iter().sum::<u64>());
    while low < high {
        let room = low + (high - low) / 2;
        if cut(&pieces, ranks, room).last() == Some(&images) { high = room } else { low = room + 1 }
    }
    Ok(cut(&pieces, ranks, low))
}

/// Fills rank after rank with pieces up to `room`, leaving one for every rank to come where there are enough.
fn cut(pieces: &[(u64, u64)], ranks: u32, room: u64) -> Vec<u64> {
    let mut bounds = vec![0];
    let mut next = 0;
    for rank in 0..ranks {
        let others = (ranks - 1 - rank) as usize;
        let (first, mut filled) = (next, 0u64);
        while next < pieces.len()
            && filled + pieces[next].1 <= room
            && (next == first || pieces.len() - next > others)
        {
            filled += pieces[next].1;
            next += 1;
        }
        bounds.push(if next == 0 { 0 } else { pieces[next - 1].0 });
    }
    bounds
}
