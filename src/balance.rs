//! The balanced partition of packed documents: all ranks hold as many rows, compute about as many causal pairs, and documents stay
//! whole on one rank where they can, so that few keys move.
//!
//! A query row needs all keys before it, so a rank that computes a tail `from .. to` of a long document needs `to` keys whatever its
//! length. Few keys move when few ranks have tails, each as many pairs of it as a rank may compute. So, for one `Tune`:
//!
//! 1. Documents that are too much for one rank lose their tails, the densest rows first, to one rank after the other.
//! 2. What remains, heads and whole documents, goes longest first to the rank that needs pairs most. Short documents, which are a
//!    rank's rows but hardly any of its pairs, fill it up.
//! 3. Rows are made even.
//!
//! How much of a rank's pairs a tail should be, and where tails begin, depends on what else there is. A fixed list of settings is
//! tried, and the best outcome taken. The result is a pure function of the lengths and of P, equal on every rank. It does not
//! depend on the mask, because all layers of a model hold the same rows.

use crate::partition::{Partition, Stretch};
use crate::problem::{Extent, Problem, Sequence};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Documents are cut into pieces of at least this many rows, unless they are shorter than two of them, and no rank holds more rows than
/// another by more than this. Half a rank's share where that is less.
pub const CHUNK: u32 = 256;

/// Most pairs that a rank should compute, as a multiple of the mean.
const MOST_PAIRS: f64 = 1.09;
/// By this much it is not worth missing.
const SLACK: f64 = 0.005;
/// Most rows that should move, as a share of a ring's.
const MOST_MOVED: f64 = 0.145;
/// What moving all that a ring moves is worth, in means of pairs: about its price on a network of 50 GB/s a device, 8k rows a rank.
const PRICE: f64 = 0.4;

/// `threshold`, `spread` and `whole` of [`Tune`].
const KINDS: [(f64, bool, f64); 8] = [
    (0.3, true, 0.0),
    (1.0, true, 0.0),
    (0.3, false, 0.0),
    (1.0, false, 0.0),
    (1.0, true, 0.1),
    (0.3, true, 0.1),
    (0.3, false, 0.1),
    (1.0, false, 0.1),
];

/// One setting.
#[derive(Clone, Copy)]
struct Tune {
    /// Pairs of a tail with what fills up its rank, as a multiple of the mean.
    tail: f64,
    /// Rows that see at most this multiple of the mean number of keys belong to a head.
    threshold: f64,
    /// Heads are dealt out to the ranks that have the tail, who need their keys anyway.
    spread: bool,
    /// A document of fewer pairs than this stays whole, even if that is too much for the rank; a multiple of the mean.
    whole: f64,
    /// Give up when a rank has more pairs than this multiple of the mean,
    most_pairs: f64,
    /// or the score cannot be less than this.
    least: f64,
}

/// Rows `from .. to` of a document, padding included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    doc: u32,
    rank: u32,
    from: u32,
    to: u32,
}

impl Piece {
    fn rows(&self) -> u32 {
        self.to - self.from
    }
}

/// What every setting starts from.
struct Pack<'a> {
    docs: &'a [Extent],
    /// Longest first.
    order: Vec<u32>,
    ranks: u32,
    chunk: u32,
    /// Rows of all documents.
    rows: u64,
    /// Mean pairs of a rank.
    mean: f64,
    /// Pairs per row of short documents.
    light: f64,
}

/// Pairs of rows `from .. to`: a causal row sees itself and all before.
fn pairs(e: &Extent, from: u32, to: u32) -> f64 {
    let below = |position: u32| {
        let n = u64::from(position.saturating_sub(e.before).min(e.len));
        n * (n + 1) / 2
    };
    (below(to) - below(from)) as f64
}

impl<'a> Pack<'a> {
    fn new(docs: &'a [Extent], ranks: u32) -> Pack<'a> {
        let rows: u64 = docs.iter().map(|e| u64::from(e.padded)).sum();
        let all: f64 = docs.iter().map(|e| pairs(e, 0, e.padded)).sum();
        let share = rows / u64::from(ranks);
        let mut order: Vec<u32> =
            (0..docs.len() as u32).filter(|&d| docs[d as usize].padded > 0).collect();
        order.sort_by_key(|&d| Reverse(docs[d as usize].padded));
        let short = docs.iter().filter(|e| u64::from(e.padded) <= share / 4);
        let (short_rows, short_pairs) = short.fold((0.0, 0.0), |(rows, sum), e| {
            (rows + f64::from(e.padded), sum + pairs(e, 0, e.padded))
        });
        Pack {
            docs,
            order,
            ranks,
            chunk: CHUNK.min((share / 2) as u32).max(1),
            rows,
            mean: all / f64::from(ranks),
            light: if short_rows > 0.0 { short_pairs / short_rows } else { 0.0 },
        }
    }

    fn pairs(&self, doc: u32, from: u32, to: u32) -> f64 {
        pairs(&self.docs[doc as usize], from, to)
    }

    /// Least is best. Limits that are kept count more than anything else.
    fn score(&self, imbalance: f64, moved: u64, most_sent: u64) -> f64 {
        let ring = (u64::from(self.ranks - 1) * self.rows).max(1);
        let moved = moved as f64 / ring as f64;
        let most_sent = most_sent as f64 * f64::from(self.ranks) / ring as f64;
        let excess = 100.0 * (imbalance - MOST_PAIRS - SLACK).max(0.0)
            + 20.0 * (moved - MOST_MOVED).max(0.0);
        imbalance + PRICE * (moved + most_sent) / 2.0 + excess
    }

    /// Where a document's tails begin, if it is too much for one rank.
    fn tails_begin(&self, doc: u32, threshold: f64) -> u32 {
        let e = &self.docs[doc as usize];
        let share = self.rows as f64 / f64::from(self.ranks);
        let filled = pairs(e, 0, e.padded) + self.light * (share - f64::from(e.padded)).max(0.0);
        let begin = e.before + ((threshold * self.mean / share) as u32).max(self.chunk);
        let heavy = f64::from(e.padded) > share || filled > MOST_PAIRS * self.mean;
        if heavy && begin + self.chunk <= e.padded { begin } else { e.padded }
    }
}

/// Documents as they are being dealt out.
struct Deal<'a> {
    pack: &'a Pack<'a>,
    tune: Tune,
    rows_left: Vec<i64>,
    pairs_left: Vec<f64>,
    pieces: Vec<Piece>,
    /// What is still to be dealt out.
    rows_to_go: f64,
    pairs_to_go: f64,
}

impl<'a> Deal<'a> {
    /// One setting's outcome; none if it is no good.
    fn new(pack: &'a Pack<'a>, tune: Tune) -> Option<Deal<'a>> {
        let p = u64::from(pack.ranks);
        let mut d = Deal {
            pack,
            tune,
            rows_left: vec![pack.rows.div_ceil(p) as i64; p as usize],
            pairs_left: vec![tune.tail * pack.mean; p as usize],
            pieces: Vec::with_capacity(pack.order.len() + 4 * p as usize),
            rows_to_go: pack.rows as f64,
            pairs_to_go: pack.mean * p as f64,
        };
        let mut rest = Vec::with_capacity(pack.order.len());
        for &doc in &pack.order {
            rest.push((d.deal_tails(doc, tune.threshold), doc));
        }
        let tails = d.pieces.len();
        // Tails need all keys before them, but for those that their ranks hold.
        let needed: u64 = d.pieces.iter().map(|p| u64::from(p.to)).sum();
        if pack.score(1.0, needed.saturating_sub(pack.rows), 0) >= tune.least {
            return None;
        }
        let over = (MOST_PAIRS - tune.most_pairs) * pack.mean;
        d.pairs_left.iter_mut().for_each(|left| *left += (MOST_PAIRS - tune.tail) * pack.mean);
        rest.sort_by_key(|&(rows, _)| Reverse(rows));
        // From here on documents have too few pairs for it to matter who takes them.
        let small = |&(rows, doc): &(u32, u32)| pack.pairs(doc, 0, rows) < 0.01 * pack.mean;
        let first_small = rest.partition_point(|item| !small(item));
        for &(rows, doc) in &rest[..first_small] {
            let rows = if tune.spread { d.spread_head(doc, rows, tails) } else { rows };
            d.deal_large(doc, rows);
            if d.pairs_left.iter().any(|left| *left < over) {
                return None;
            }
        }
        d.deal_small(&rest[first_small..]);
        if d.pairs_left.iter().any(|left| *left < over) {
            return None;
        }
        d.make_rows_even();
        Some(d)
    }

    fn take(&mut self, rank: u32, doc: u32, from: u32, to: u32) {
        let pairs = self.pack.pairs(doc, from, to);
        self.rows_left[rank as usize] -= i64::from(to - from);
        self.pairs_left[rank as usize] -= pairs;
        self.rows_to_go -= f64::from(to - from);
        self.pairs_to_go -= pairs;
        self.pieces.push(Piece { doc, rank, from, to });
    }

    /// The rank that has the most pairs left when rows of `density` pairs fill it up, among those that `fit`.
    fn neediest(&self, density: f64, fit: impl Fn(usize) -> bool) -> Option<u32> {
        let need = |r: usize| self.pairs_left[r] - density * self.rows_left[r] as f64;
        let mut best: Option<(usize, f64)> = None;
        for r in (0..self.rows_left.len()).filter(|r| fit(*r)) {
            if best.is_none_or(|(_, most)| need(r) > most) {
                best = Some((r, need(r)));
            }
        }
        best.map(|(r, _)| r as u32)
    }

    /// Most rows before `end`, at most `most`, that `rank` can take and still be filled up with short documents.
    fn room(&self, rank: u32, doc: u32, end: u32, most: u32) -> u32 {
        let rows_left = self.rows_left[rank as usize];
        let fits = |n: u32| {
            let filling = self.pack.light * (rows_left - i64::from(n)) as f64;
            self.pack.pairs(doc, end - n, end) + filling <= self.pairs_left[rank as usize]
        };
        let most = rows_left.clamp(0, i64::from(most)) as u32;
        if fits(most) {
            return most;
        }
        let (mut low, mut high) = (0, most);
        while low + 1 < high {
            let middle = (low + high) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        low
    }

    fn is_open(&self, rank: usize) -> bool {
        self.rows_left[rank] >= i64::from(self.pack.chunk)
    }

    /// Step 1: deals out a document's tails; the rows that remain.
    fn deal_tails(&mut self, doc: u32, threshold: f64) -> u32 {
        let begin = self.pack.tails_begin(doc, threshold);
        let mut end = self.pack.docs[doc as usize].padded;
        while end >= begin + self.pack.chunk {
            let Some(rank) = self.neediest(self.pack.light, |r| self.is_open(r)) else { break };
            let rows = self.room(rank, doc, end, end - begin);
            if rows < self.pack.chunk {
                break;
            }
            self.take(rank, doc, end - rows, end);
            end -= rows;
        }
        end
    }

    /// Deals a head out to the ranks of the document's tails, which are among the first pieces; the rows that remain.
    fn spread_head(&mut self, doc: u32, rows: u32, tails: usize) -> u32 {
        let homes: Vec<usize> =
            self.pieces[..tails].iter().filter(|p| p.doc == doc).map(|p| p.rank as usize).collect();
        let mut end = rows;
        while !homes.is_empty() && end > 0 {
            let density = self.pairs_to_go / self.rows_to_go;
            let need = |r: &usize| self.pairs_left[*r] - density * self.rows_left[*r] as f64;
            let open = homes.iter().filter(|r| self.is_open(**r));
            let Some(&rank) = open.clone().max_by(|a, b| need(a).total_cmp(&need(b))) else {
                break;
            };
            // All homes are filled up to the same part.
            let left: f64 = open.map(|r| self.rows_left[*r] as f64).sum();
            let part = (f64::from(end) / left).min(1.0);
            let n = cut((part * self.rows_left[rank] as f64) as u32, end, self.pack.chunk);
            if self.rows_left[rank] < i64::from(n) {
                break;
            }
            self.take(rank as u32, doc, end - n, end);
            end -= n;
        }
        end
    }

    /// Step 2: whole, where it fits, else in pieces.
    fn deal_large(&mut self, doc: u32, rows: u32) {
        let chunk = self.pack.chunk;
        let mut end = rows;
        while end > 0 {
            let density = (self.pairs_to_go / self.rows_to_go.max(1.0)).max(0.0);
            let whole = self.pack.pairs(doc, 0, end);
            let fits = |r: usize| {
                let filling = self.rows_left[r] - i64::from(end);
                filling >= 0 && whole + self.pack.light * filling as f64 <= self.pairs_left[r]
            };
            let bearable = |r: usize| {
                self.rows_left[r] >= i64::from(end) && whole < self.tune.whole * self.pack.mean
            };
            let whole = self.neediest(density, fits).or_else(|| self.neediest(density, bearable));
            let (rank, n) = match whole {
                Some(rank) => (rank, end),
                None => {
                    let open = self.neediest(density, |r| self.is_open(r));
                    let Some(rank) = open.or_else(|| self.neediest(density, |_| true)) else {
                        return;
                    };
                    (rank, cut(self.room(rank, doc, end, end), end, chunk))
                }
            };
            self.take(rank, doc, end - n, end);
            end -= n;
        }
    }

    /// Step 2 for short documents: to the rank with the most rows left.
    fn deal_small(&mut self, items: &[(u32, u32)]) {
        let chunk = self.pack.chunk;
        let left = self.rows_left.iter().enumerate().map(|(r, left)| (*left, Reverse(r as u32)));
        let mut heap: BinaryHeap<(i64, Reverse<u32>)> = left.collect();
        for &(rows, doc) in items {
            let mut end = rows;
            while end > 0 {
                let Some(mut top) = heap.peek_mut() else { return };
                let (left, Reverse(rank)) = *top;
                let room = left.clamp(0, i64::from(end)) as u32;
                let n = if i64::from(end) <= left + i64::from(chunk / 2) {
                    end
                } else {
                    cut(room, end, chunk)
                };
                top.0 -= i64::from(n);
                drop(top);
                self.take(rank, doc, end - n, end);
                end -= n;
            }
        }
    }

    /// Step 3: while a rank holds a chunk more than another, it gives up a document of about the right size, or the beginning of a piece.
    fn make_rows_even(&mut self) {
        for _ in 0..4 * self.rows_left.len() {
            let ranks = 0..self.rows_left.len();
            let full = ranks.clone().min_by_key(|&r| self.rows_left[r]).unwrap_or(0);
            let short = ranks.max_by_key(|&r| self.rows_left[r]).unwrap_or(0);
            let gap = (self.rows_left[short] - self.rows_left[full]) as u32;
            if gap <= self.pack.chunk {
                return;
            }
            let n = (gap / 2).max(self.pack.chunk.min(gap - 1));
            let mine = || self.pieces.iter().enumerate().filter(|(_, p)| p.rank as usize == full);
            let whole = mine().find(|(_, p)| {
                let all = p.rows() == self.pack.docs[p.doc as usize].padded;
                all && (gap / 4..gap).contains(&p.rows())
            });
            let long = mine().filter(|(_, p)| p.rows() >= n + self.pack.chunk);
            let long = long.min_by_key(|(_, p)| (p.from, p.to));
            let (at, n) = match (whole, long, mine().max_by_key(|(_, p)| p.rows())) {
                (Some((i, p)), ..) => (i, p.rows()),
                (_, Some((i, _)), _) => (i, n),
                (.., Some((i, p))) => (i, p.rows().min(gap / 2)),
                _ => return,
            };
            let p = self.pieces[at];
            let pairs = self.pack.pairs(p.doc, p.from, p.from + n);
            for (rank, sign) in [(full, 1), (short, -1)] {
                self.rows_left[rank] += sign * i64::from(n);
                self.pairs_left[rank] += sign as f64 * pairs;
            }
            self.pieces[at].from += n;
            if self.pieces[at].rows() == 0 {
                self.pieces.swap_remove(at);
            }
            self.pieces.push(Piece { rank: short as u32, to: p.from + n, ..p });
        }
    }

    /// Least is best. Limits that are kept count more than anything else.
    fn score(&self) -> f64 {
        let least_left = self.pairs_left.iter().fold(f64::MAX, |a, b| a.min(*b));
        let imbalance = MOST_PAIRS - least_left / self.pack.mean.max(1.0);
        let whole = |p: &&Piece| p.rows() == self.pack.docs[p.doc as usize].padded;
        let mut cut: Vec<Piece> = self.pieces.iter().filter(|p| !whole(p)).copied().collect();
        cut.sort_unstable();
        let mut sent = vec![0; self.pack.ranks as usize];
        for doc in cut.chunk_by(|a, b| a.doc == b.doc) {
            // Ranks need all keys before their last row.
            let last = |held: &[Piece]| held.last().map_or((0, 0), |p| (p.rank, p.to));
            let reach: Vec<(u32, u32)> = doc.chunk_by(|a, b| a.rank == b.rank).map(last).collect();
            for p in doc {
                let others = reach.iter().filter(|(rank, _)| *rank != p.rank);
                let rows = others.map(|(_, to)| u64::from(p.to.min(*to).saturating_sub(p.from)));
                sent[p.rank as usize] += rows.sum::<u64>();
            }
        }
        let most = sent.iter().copied().max().unwrap_or(0);
        self.pack.score(imbalance, sent.iter().sum(), most)
    }
}

/// Rows to cut off of `rows` where there is room for `room`: neither they nor the others are fewer than a chunk if that can be.
fn cut(room: u32, rows: u32, chunk: u32) -> u32 {
    if room >= rows || rows < 2 * chunk { rows } else { room.clamp(chunk, rows - chunk) }
}

/// The positions that every rank holds, in the order of its rows.
pub fn balance(docs: &[Extent], ranks: u32) -> Vec<Vec<Stretch>> {
    let mut out = vec![Vec::new(); ranks as usize];
    for p in best(&Pack::new(docs, ranks)) {
        let list: &mut Vec<Stretch> = &mut out[p.rank as usize];
        match list.last_mut() {
            Some(l) if (l.seq, l.start + l.len) == (p.doc, p.from) => l.len += p.rows(),
            _ => list.push(Stretch { seq: p.doc, start: p.from, step: 1, len: p.rows() }),
        }
    }
    out
}

/// The pieces of the best setting, sorted by document and rank.
fn best(pack: &Pack) -> Vec<Piece> {
    if pack.rows == 0 {
        return Vec::new();
    }
    // Fewer settings where there are more documents: the time stays about the same. The last kinds are rarely best.
    let steps = (3000 / pack.order.len()).clamp(4, 40);
    let kinds = if steps > 20 { KINDS.len() } else { 5 };
    let mut best: Option<(f64, Vec<Piece>)> = None;
    // What cannot be even is as even as it gets.
    for most_pairs in [MOST_PAIRS + SLACK, f64::MAX] {
        for step in 0..steps {
            for &(threshold, spread, whole) in &KINDS[..kinds] {
                let tail = 1.16 - 0.46 * step as f64 / steps as f64;
                let least = best.as_ref().map_or(f64::MAX, |(least, _)| *least);
                let tune = Tune { tail, threshold, spread, whole, most_pairs, least };
                let Some(deal) = Deal::new(pack, tune) else { continue };
                let score = deal.score();
                if score < tune.least {
                    best = Some((score, deal.pieces));
                }
            }
        }
        if best.is_some() {
            break;
        }
    }
    let mut pieces = best.map_or(Vec::new(), |(_, pieces)| pieces);
    pieces.sort_unstable();
    pieces
}

/// The last lists that were worked out: calls repeat.
#[derive(Default)]
pub struct Dealt(RefCell<Option<(Vec<Sequence>, u32, Partition)>>);

impl Dealt {
    /// Puts lists, the same for queries and keys, in place of a valid problem's `Balanced`.
    pub fn resolve(&self, problem: &mut Problem) {
        if problem.partition != Partition::Balanced {
            return;
        }
        let mut last = self.0.borrow_mut();
        if let Some((.., lists)) =
            last.as_ref().filter(|(seqs, p, _)| *p == problem.ranks && *seqs == problem.seqs)
        {
            problem.partition = lists.clone();
            return;
        }
        let docs: Vec<Extent> = problem.seqs.iter().map(|s| s.q).collect();
        let q = balance(&docs, problem.ranks);
        problem.partition = Partition::List { k: q.clone(), q };
        *last = Some((problem.seqs.clone(), problem.ranks, problem.partition.clone()));
    }
}
