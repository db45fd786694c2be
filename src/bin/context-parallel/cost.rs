//! What plans cost, next to a ring and to the least that is possible.

use crate::json::{Object, array, string};
use crate::text::{self, Align, bold, dim};
use context_parallel::holding::holding;
use context_parallel::partition::{Partition, Segment, Side};
use context_parallel::plan::account::{Account, account};
use context_parallel::plan::{HeadShare, Plan};
use context_parallel::problem::{Problem, Wire};

/// Both passes of all ranks, forward first.
pub struct Cost {
    accounts: [Vec<Account>; 2],
    /// Key rows that all ranks together receive in a ring: everything that others hold.
    ring_rows: u64,
    /// Key rows of other teams that some query of the receiver may see.
    needed_rows: u64,
    /// Allowed (query, key) pairs.
    pairs: u64,
    /// Bytes of the largest rank's own tensors: forward Q, K, V, O, LSE; backward those and dO, dQ, dK, dV.
    own: [u64; 2],
}

impl Cost {
    pub fn of(p: &Problem, plans: &[Vec<Plan>; 2]) -> Cost {
        let accounts = [0, 1].map(|pass| plans[pass].iter().map(account).collect::<Vec<_>>());
        let (ring_rows, needed_rows) = key_rows(p);
        let pairs = accounts[0].iter().map(|a| a.pairs).sum::<u64>() / u64::from(p.heads);
        let own = (0..p.ranks)
            .map(|r| own_bytes(p, r))
            .fold([0, 0], |a, b| [a[0].max(b[0]), a[1].max(b[1])]);
        Cost { accounts, ring_rows, needed_rows, pairs, own }
    }

    /// Allowed (query, key) pairs.
    pub fn pairs(&self) -> u64 {
        self.pairs
    }

    /// (query, key, head) triples of one pass.
    pub fn triples(&self) -> u64 {
        self.accounts[0].iter().map(|a| a.pairs).sum()
    }

    fn sum(&self, pass: usize, of: impl Fn(&Account) -> u64) -> u64 {
        self.accounts[pass].iter().map(of).fold(0, u64::saturating_add)
    }

    fn worst(&self, pass: usize, of: impl Fn(&Account) -> u64) -> u64 {
        self.accounts[pass].iter().map(of).max().unwrap_or(0)
    }

    /// Largest over mean; 1 is even.
    fn imbalance(&self, pass: usize) -> f64 {
        let mean = self.sum(pass, |a| a.flops) as f64 / self.accounts[pass].len() as f64;
        if mean == 0.0 { 1.0 } else { self.worst(pass, |a| a.flops) as f64 / mean }
    }

    /// The account for people.
    pub fn table(&self) -> String {
        let mut rows = vec![vec![String::new(), dim("forward"), dim("backward"), String::new()]];
        let mut row = |name: &str, cell: &dyn Fn(usize) -> String, note: &str| {
            rows.push(vec![name.into(), cell(0), cell(1), dim(note)]);
        };
        let bytes = text::bytes;
        row(
            "received, all ranks",
            &|p| bytes(self.sum(p, |a| a.received)),
            "equal to what is sent",
        );
        row("  keys and values", &|p| bytes(self.sum(p, |a| a.received_keys)), "");
        row(
            "  their gradients",
            &|p| bytes(self.sum(p, |a| a.received_gradients)),
            "on the way home",
        );
        row(
            "  heads for sequence",
            &|p| bytes(self.sum(p, |a| a.received_heads)),
            "the all-to-all",
        );
        row("received, worst rank", &|p| bytes(self.worst(p, |a| a.received)), "");
        row("sent, worst rank", &|p| bytes(self.worst(p, |a| a.sent)), "");
        row(
            "FLOPs, all ranks",
            &|p| text::count(self.sum(p, |a| a.flops)),
            "2·(dqk + dv) a pair and head forward, 2·(3·dqk + 2·dv) backward",
        );
        row(
            "FLOPs, worst rank",
            &|p| text::count(self.worst(p, |a| a.flops)),
            &format!("{:.3} of the mean", self.imbalance(0)),
        );
        row(
            "workspace, worst rank",
            &|p| bytes(self.worst(p, |a| a.workspace)),
            "beside the caller's tensors",
        );
        row(
            "own tensors, worst rank",
            &|p| bytes(self.own[p]),
            "Q, K, V, O, LSE; backward also their gradients",
        );
        use Align::{Left, Right};
        let mut out = text::columns(&[Left, Right, Right, Left], &rows);
        if self.ring_rows > 0 {
            let got = self.sum(0, |a| a.received_key_rows);
            out += &format!(
                "\n  key rows received: {} = {} of a ring ({}); the queries need {}{}\n",
                text::grouped(got),
                bold(&format!("{:.4}", got as f64 / self.ring_rows as f64)),
                text::grouped(self.ring_rows),
                text::grouped(self.needed_rows),
                if got == self.needed_rows {
                    ", the least possible for this partition"
                } else {
                    "; the rest is passed on"
                }
            );
        }
        out
    }

    pub fn json(&self) -> String {
        let one = |a: &Account| {
            Object::default()
                .raw("sent", a.sent)
                .raw("received", a.received)
                .raw("received_keys", a.received_keys)
                .raw("received_key_rows", a.received_key_rows)
                .raw("received_gradients", a.received_gradients)
                .raw("received_heads", a.received_heads)
                .raw("pairs", a.pairs)
                .raw("flops", a.flops)
                .raw("workspace", a.workspace)
                .end()
        };
        let got = self.sum(0, |a| a.received_key_rows);
        let of_ring =
            if self.ring_rows == 0 { f64::NAN } else { got as f64 / self.ring_rows as f64 };
        Object::default()
            .raw("pairs", self.pairs)
            .raw("key_rows_received", got)
            .raw("key_rows_of_a_ring", self.ring_rows)
            .raw("key_rows_needed", self.needed_rows)
            .float("of_a_ring", of_ring)
            .float("imbalance", self.imbalance(0))
            .raw("forward", array(self.accounts[0].iter().map(one)))
            .raw("backward", array(self.accounts[1].iter().map(one)))
            .end()
    }
}

/// Bytes of a rank's own tensors, forward and backward.
fn own_bytes(p: &Problem, rank: u32) -> [u64; 2] {
    let rows = |side| u64::from(holding(p, rank, side).rows);
    let (q, k) = (rows(Side::Query), rows(Side::Key));
    let (qk, v) = (u64::from(p.dim_qk), u64::from(p.dim_v));
    let (heads, kv) = (u64::from(p.heads), u64::from(p.kv_heads));
    let tensors = (q * heads + k * kv) * (qk + v) * p.dtype.size() as u64;
    let lse = q * heads * 4;
    [tensors + lse, 2 * tensors + lse]
}

/// Key rows that a ring moves, and that queries need; both over all ranks, rows of a team counted for each member that works on heads.
fn key_rows(p: &Problem) -> (u64, u64) {
    let members = (0..p.inner).filter(|m| !HeadShare::of(p, *m).kv.is_empty()).count() as u64;
    let team = |t: u32, side| -> Vec<Segment> {
        (t * p.inner..(t + 1) * p.inner).flat_map(|r| holding(p, r, side).segments).collect()
    };
    let queries: Vec<Vec<Segment>> = (0..p.teams()).map(|t| team(t, Side::Query)).collect();
    let keys: Vec<Vec<Segment>> = (0..p.teams()).map(|t| team(t, Side::Key)).collect();
    let (mut ring, mut needed) = (0, 0);
    for (mine, queries) in queries.iter().enumerate() {
        for (_, keys) in keys.iter().enumerate().filter(|(theirs, _)| *theirs != mine) {
            ring += keys.iter().map(|k| u64::from(k.len)).sum::<u64>();
            needed += keys.iter().map(|k| seen(p, queries, k)).sum::<u64>();
        }
    }
    (ring * members, needed * members)
}

/// How many keys of a segment some query sees.
fn seen(p: &Problem, queries: &[Segment], key: &Segment) -> u64 {
    let sight = p.sight(key.seq);
    let same = queries.iter().filter(|q| q.seq == key.seq);
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    same.for_each(|q| sight.overlaps(q, key, |o| ranges.push(o.k)));
    ranges.sort_unstable();
    let (mut count, mut end) = (0, 0);
    for (from, to) in ranges {
        count += u64::from(to.max(end) - from.max(end));
        end = end.max(to);
    }
    count
}

fn partition(p: &Problem) -> &'static str {
    match p.partition {
        Partition::Zigzag => "zigzag",
        Partition::Contiguous => "contiguous",
        Partition::Striped => "striped",
        // There are no callers' lists here.
        Partition::Balanced | Partition::List { .. } => "balanced",
    }
}

fn mask(p: &Problem) -> String {
    let name = match (p.mask.causal, p.mask.bottom_right) {
        (true, false) => "causal",
        (true, true) => "causal-bottom-right",
        (false, _) => "full",
    };
    let name = match p.regions.list().len() {
        0 => name.to_string(),
        1 => format!("{name} in 1 slice"),
        n => format!("{name} in {n} slices"),
    };
    match (p.mask.left, p.mask.right) {
        (None, None) => name,
        (left, right) => {
            let side = |s: Option<u32>| s.map_or("∞".into(), |n| n.to_string());
            let right = if p.mask.causal { "0".into() } else { side(right) };
            format!("{name}, window {},{right}", side(left))
        }
    }
}

/// The problem in words.
pub fn describe(p: &Problem) -> String {
    let teams = p.teams();
    let how = match (p.inner, p.relay) {
        (u, _) if u == p.ranks => format!("{u} trade heads"),
        (1, true) => format!("neighbour ring, {} stages", p.stages),
        (1, false) => format!("{} stage{}", p.stages, if p.stages == 1 { "" } else { "s" }),
        (u, relay) => format!(
            "teams of {u} trade heads, {} stage{} among {teams} teams{}",
            p.stages,
            if p.stages == 1 { "" } else { "s" },
            if relay { ", relayed" } else { "" }
        ),
    };
    let sum = |side| p.seqs.iter().map(|s| u64::from(s.extent(side).len)).sum::<u64>();
    let (q, k) = (sum(Side::Query), sum(Side::Key));
    let tokens = match q == k {
        true => format!("{} tokens", text::grouped(q)),
        false => format!("{} query and {} key tokens", text::grouped(q), text::grouped(k)),
    };
    let sequences = match (p.seqs.len(), p.packed) {
        (1, _) => String::new(),
        (n, true) => format!(" in {n} packed sequences"),
        (n, false) => format!(" in a batch of {n}"),
    };
    format!("{how} · {tokens}{sequences} · {}", layer(p))
}

/// Mask, partition and heads in words.
pub fn layer(p: &Problem) -> String {
    let dims = if p.dim_qk == p.dim_v {
        p.dim_qk.to_string()
    } else {
        format!("{}/{}", p.dim_qk, p.dim_v)
    };
    format!(
        "{}, {} · {} query heads on {} key heads × {dims}, {}",
        mask(p),
        partition(p),
        p.heads,
        p.kv_heads,
        p.dtype.name()
    )
}

/// The problem for programs.
pub fn problem_json(p: &Problem) -> String {
    let seqs = p.seqs.iter().map(|s| {
        let side = |side| {
            let e = s.extent(side);
            array([e.before, e.len, e.padded])
        };
        Object::default().raw("q", side(Side::Query)).raw("k", side(Side::Key)).end()
    });
    let side = |s: Option<u32>| s.map_or("null".into(), |n| n.to_string());
    Object::default()
        .raw("ranks", p.ranks)
        .raw("inner", p.inner)
        .raw("stages", p.stages)
        .raw("relay", p.relay)
        .text("partition", partition(p))
        .raw("causal", p.mask.causal)
        .raw("bottom_right", p.mask.bottom_right)
        .raw("window", array([side(p.mask.left), side(p.mask.right)]))
        .raw("slices", array(p.regions.list().iter().map(|r| string(&r.to_string()))))
        .raw("packed", p.packed)
        .raw("sequences_before_len_padded", array(seqs))
        .raw("heads", p.heads)
        .raw("kv_heads", p.kv_heads)
        .raw("head_dim_qk", p.dim_qk)
        .raw("head_dim_v", p.dim_v)
        .text("dtype", p.dtype.name())
        .raw("wire", string(if p.wire == Wire::F32 { "fp32" } else { "storage" }))
        .text("kv_wire", p.kv_wire.map_or("storage", |f| f.name()))
        .raw("hash", string(&format!("{:#x}", p.fingerprint())))
        .end()
}
