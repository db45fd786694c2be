//! The corpus: `tests/data/cases.csv`, described in `tests/data/README.md`.

use context_parallel::balance::Dealt;
use context_parallel::dtype::{DType, Fp8};
use context_parallel::error::Result;
use context_parallel::mask::Mask;
use context_parallel::partition::{Partition, Side, Stretch};
use context_parallel::problem::{CommType, Extent, Latent, Problem, Sequence, Wire};
use context_parallel::regions::{Region, Regions};
use context_parallel::score::{BiasShape, Reach, Score};
use std::ops::Range;
use std::sync::OnceLock;

/// How `[token, head, dim]` lies in a caller's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Bshd,
    Sbhd,
    Thd,
}

/// The partition column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dealing {
    Zigzag,
    Contiguous,
    Striped,
    List,
    Balanced,
}

/// One line of the corpus.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub tags: Vec<String>,
    pub format: Format,
    pub seqs: Vec<Sequence>,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim_qk: usize,
    pub dim_v: usize,
    pub causal: bool,
    pub bottom_right: bool,
    pub left: Option<u32>,
    pub right: Option<u32>,
    pub dealing: Dealing,
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
    /// ALiBi, one for each head; empty: none.
    pub slopes: Vec<f32>,
    /// Probability; 0: none.
    pub dropout: f32,
    pub sinks: Option<Reach>,
    pub max_logit: Option<Reach>,
    /// With a gradient where there is one bias per query.
    pub bias: Option<BiasShape>,
    /// K and V are made of latents.
    pub latent: Option<Latent>,
    /// How keys and values travel.
    pub kv_wire: Option<Fp8>,
    /// If there are any, what queries see at most.
    pub slices: Vec<Part>,
}

/// One of the slices column: `seq/q0:q1/k0:k1/lo:hi`.
#[derive(Clone, Debug)]
pub struct Part {
    pub seq: usize,
    pub q: Range<usize>,
    pub k: Range<usize>,
    pub lo: Option<i64>,
    pub hi: Option<i64>,
}

impl Part {
    fn parse(text: &str) -> Part {
        let fields: Vec<&str> = text.split('/').collect();
        let two = |field: usize| -> [Option<i64>; 2] {
            let Some(words) = fields.get(field) else { return [None; 2] };
            let (a, b) = words.split_once(':').expect(text);
            [a, b].map(|x| (!x.is_empty()).then(|| x.parse().expect(text)))
        };
        let range = |field| {
            let [from, to] = two(field).map(|x| x.expect(text) as usize);
            from..to
        };
        let [lo, hi] = two(3);
        Part { seq: fields[0].parse().expect(text), q: range(1), k: range(2), lo, hi }
    }

    fn sees(&self, seq: usize, i: usize, j: usize) -> bool {
        let after = j as i64 - i as i64;
        self.seq == seq
            && self.q.contains(&i)
            && self.k.contains(&j)
            && self.lo.is_none_or(|lo| after >= lo)
            && self.hi.is_none_or(|hi| after <= hi)
    }
}

/// Key of the corpus' dropout.
pub const SEED: u64 = 0x0123_4567_89ab_cdef;

/// The caller's number for sequence `seq`.
pub fn number(seq: usize) -> u32 {
    7 * seq as u32 + 3
}

/// All cases, in file order.
pub fn cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(|| parse(include_str!("../../data/cases.csv")))
}

const COLUMNS: &str = "name,tags,format,batch,lens_q,lens_k,padded_q,padded_k,before_q,before_k,\
heads,kv_heads,dim_qk,dim_v,causal,bottom_right,window_left,window_right,partition,scale,\
softcap,alibi,bias,dropout,sinks,max_logit,slices,latent,kv_wire";

fn parse(text: &str) -> Vec<Case> {
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(COLUMNS), "cases.csv: the header changed, its readers did not");
    lines.map(line).collect()
}

fn line(line: &str) -> Case {
    let f: Vec<&str> = line.split(',').collect();
    assert_eq!(f.len(), COLUMNS.split(',').count(), "cases.csv: {line}");
    let number =
        |i: usize| -> usize { f[i].parse().unwrap_or_else(|e| panic!("{}: {e}: {}", f[0], f[i])) };
    let batch = number(3);
    let limit = |i: usize| (f[i] != "-").then(|| number(i) as u32);
    let fraction = |i: usize| match f[i] {
        "-" => 0.0,
        text => text.parse().unwrap_or_else(|e| panic!("{}: {e}: {text}", f[0])),
    };
    let reach = |i: usize| match f[i] {
        "-" => None,
        "rank" => Some(Reach::Rank),
        "group" => Some(Reach::Group),
        other => panic!("{}: reach {other}", f[0]),
    };
    let q = extents(batch, f[4], f[6], f[8]);
    let k = extents(batch, f[5], f[7], f[9]);
    let dim_qk = number(12);
    Case {
        name: f[0].to_string(),
        tags: f[1].split(' ').map(str::to_string).collect(),
        format: match f[2] {
            "bshd" => Format::Bshd,
            "sbhd" => Format::Sbhd,
            "thd" => Format::Thd,
            other => panic!("{}: format {other}", f[0]),
        },
        seqs: q.into_iter().zip(k).map(|(q, k)| Sequence { q, k }).collect(),
        heads: number(10),
        kv_heads: number(11),
        dim_qk,
        dim_v: number(13),
        causal: number(14) == 1,
        bottom_right: number(15) == 1,
        left: limit(16),
        right: limit(17),
        dealing: match f[18] {
            "zigzag" => Dealing::Zigzag,
            "contiguous" => Dealing::Contiguous,
            "striped" => Dealing::Striped,
            "list" => Dealing::List,
            "balanced" => Dealing::Balanced,
            other => panic!("{}: partition {other}", f[0]),
        },
        scale: match f[19] {
            "-" => 1.0 / (dim_qk as f32).sqrt(),
            text => text.parse().unwrap_or_else(|e| panic!("{}: {e}: {text}", f[0])),
        },
        softcap: fraction(20),
        slopes: match f[21] {
            "0" => Vec::new(),
            _ => (0..number(10)).map(|h| 0.5f32.powi(1 + h as i32 % 6)).collect(),
        },
        dropout: fraction(23),
        bias: bias(f[22]),
        sinks: reach(24),
        max_logit: reach(25),
        latent: latent(f[27]),
        slices: match f[26] {
            "-" => Vec::new(),
            list => list.split(' ').map(Part::parse).collect(),
        },
        kv_wire: (f[28] != "-").then(|| Fp8::parse(f[28]).unwrap_or_else(|| panic!("{}", f[28]))),
    }
}

/// The latent column: elements of c, a colon, elements of r.
fn latent(word: &str) -> Option<Latent> {
    let (dim, rope) = word.split_once(':')?;
    Some(Latent { dim: dim.parse().expect(word), rope: rope.parse().expect(word) })
}

/// The bias column: the dimensions [batch, heads, queries, keys], 1 where one is for all.
fn bias(word: &str) -> Option<BiasShape> {
    let [batch, heads, queries] = match word {
        "-" => return None,
        "1hss" => [false, true, true],
        "11ss" => [false, false, true],
        "b1ss" => [true, false, true],
        "bhss" => [true, true, true],
        "111s" => [false, false, false],
        other => panic!("bias {other}"),
    };
    Some(BiasShape { batch, heads, queries, gradient: queries })
}

/// Philox4x32-10, from the paper (Salmon et al., SC 2011): ten rounds, the key bumped between them.
fn philox(key: u64, mut x: [u32; 4]) -> [u32; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for round in 0..10 {
        if round > 0 {
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        let p0 = 0xD251_1F53u64 * u64::from(x[0]);
        let p1 = 0xCD9E_8D57u64 * u64::from(x[2]);
        let (hi0, lo0) = ((p0 >> 32) as u32, p0 as u32);
        let (hi1, lo1) = ((p1 >> 32) as u32, p1 as u32);
        x = [hi1 ^ x[1] ^ k0, lo1, hi0 ^ x[3] ^ k1, lo0];
    }
    x
}

fn extents(batch: usize, lens: &str, padded: &str, before: &str) -> Vec<Extent> {
    let list = |text: &str, absent: &[u32]| -> Vec<u32> {
        if text == "-" {
            return absent.to_vec();
        }
        let values: Vec<u32> = text.split(' ').map(|v| v.parse().expect(text)).collect();
        if values.len() == 1 {
            return vec![values[0]; batch];
        }
        assert_eq!(values.len(), batch, "{text}: one value, or one for each of {batch} sequences");
        values
    };
    let len = list(lens, &[]);
    let padded = list(padded, &len);
    let before = list(before, &vec![0; batch]);
    (0..batch).map(|i| Extent { before: before[i], len: len[i], padded: padded[i] }).collect()
}

impl Case {
    /// Does the case carry this tag?
    pub fn is(&self, tag: &str) -> bool {
        self.tags.iter().any(|t| t == tag)
    }

    /// May query `i` of a sequence see its key `j`? Positions count from the first true token. This is the definition of the mask.
    pub fn sees(&self, seq: usize, i: usize, j: usize) -> bool {
        let (len_q, len_k) = (i64::from(self.seqs[seq].q.len), i64::from(self.seqs[seq].k.len));
        let diagonal = i as i64 + if self.bottom_right { len_k - len_q } else { 0 };
        let after = j as i64 - diagonal; // keys after the diagonal are positive
        if self.causal && after > 0 {
            return false;
        }
        if !self.slices.is_empty() && !self.slices.iter().any(|s| s.sees(seq, i, j)) {
            return false;
        }
        self.left.is_none_or(|l| after >= -i64::from(l))
            && (self.causal || self.right.is_none_or(|r| after <= i64::from(r)))
    }

    /// How far key `j` is from the diagonal of query `i`.
    pub fn distance(&self, seq: usize, i: usize, j: usize) -> u64 {
        let (len_q, len_k) = (self.seqs[seq].q.len as i64, self.seqs[seq].k.len as i64);
        let diagonal = i as i64 + if self.bottom_right { len_k - len_q } else { 0 };
        (j as i64 - diagonal).unsigned_abs()
    }

    /// Does dropout keep the weight of key `j` for query `i`?
    pub fn keeps(&self, seq: usize, head: usize, i: usize, j: usize) -> bool {
        let counter = [(j / 4) as u32, i as u32, head as u32, number(seq)];
        f64::from(philox(SEED, counter)[j % 4]) >= (f64::from(self.dropout) * 2f64.powi(32)).floor()
    }

    /// Elements of c, of r, and of a key without r; 0 without latents.
    pub fn latent_dims(&self) -> [usize; 3] {
        self.latent
            .map_or([0; 3], |l| [l.dim as usize, l.rope as usize, self.dim_qk - l.rope as usize])
    }

    /// [batch, heads, queries, keys] of the global bias.
    pub fn bias_dims(&self) -> [usize; 4] {
        let Some(b) = self.bias else { return [0; 4] };
        let padded = |side: Side| self.seqs.iter().map(move |s| s.extent(side).padded as usize);
        let queries = match self.format {
            Format::Thd => self.tokens(Side::Query),
            _ => padded(Side::Query).max().unwrap_or(0),
        };
        let keys = padded(Side::Key).max().unwrap_or(0);
        let or_1 = |there, n| if there { n } else { 1 };
        [or_1(b.batch, self.seqs.len()), or_1(b.heads, self.heads), or_1(b.queries, queries), keys]
    }

    /// Index in the global bias of a query's row for head `head`, at its sequence's first true key.
    pub fn bias_row(&self, seq: usize, head: usize, i: usize) -> usize {
        let [batch, heads, queries, keys] = self.bias_dims();
        let (b, h) = (if batch > 1 { seq } else { 0 }, if heads > 1 { head } else { 0 });
        let row = match self.format {
            _ if queries <= 1 => 0,
            Format::Thd => self.first(seq, Side::Query) + i,
            _ => self.seqs[seq].q.before as usize + i,
        };
        ((b * heads + h) * queries + row) * keys + self.seqs[seq].k.before as usize
    }

    /// Tokens of a side, padding included.
    pub fn tokens(&self, side: Side) -> usize {
        self.seqs.iter().map(|s| s.extent(side).padded as usize).sum()
    }

    /// Global index of a sequence's first true token.
    pub fn first(&self, seq: usize, side: Side) -> usize {
        let base: u32 = self.seqs[..seq].iter().map(|s| s.extent(side).padded).sum();
        (base + self.seqs[seq].extent(side).before) as usize
    }

    /// Global indices of the true tokens, in order.
    pub fn true_tokens(&self, side: Side) -> Vec<usize> {
        let of = |s: usize| {
            let first = self.first(s, side);
            first..first + self.seqs[s].extent(side).len as usize
        };
        (0..self.seqs.len()).flat_map(of).collect()
    }

    /// The case as a problem for `ranks` ranks. `stages`: `None` is what the communication type's name stands for.
    pub fn problem(
        &self,
        ranks: u32,
        comm: CommType,
        stages: Option<u32>,
        dtype: DType,
    ) -> Result<Problem> {
        let inner = comm.inner(ranks, 0)?;
        let mut problem = Problem {
            ranks,
            inner,
            stages: stages.unwrap_or(comm.default_stages(ranks / inner)),
            relay: false,
            partition: match self.dealing {
                Dealing::Zigzag => Partition::Zigzag,
                Dealing::Contiguous => Partition::Contiguous,
                Dealing::Striped => Partition::Striped,
                Dealing::Balanced => Partition::Balanced,
                Dealing::List => Partition::List {
                    q: self.lists(ranks, Side::Query),
                    k: self.lists(ranks, Side::Key),
                },
            },
            mask: Mask {
                causal: self.causal,
                bottom_right: self.bottom_right,
                left: self.left,
                right: self.right,
            },
            packed: self.format == Format::Thd,
            seqs: self.seqs.clone(),
            regions: self.regions(),
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            dim_qk: self.dim_qk as u32,
            dim_v: self.dim_v as u32,
            dtype,
            wire: Wire::Storage,
            kv_wire: self.kv_wire,
            scale: self.scale,
            score: Score {
                softcap: self.softcap,
                slopes: self.slopes.clone().into(),
                dropout: self.dropout,
                bias: self.bias,
                sinks: self.sinks,
                max_logit: self.max_logit,
                ..Score::default()
            },
            latent: self.latent,
        };
        problem.validate()?;
        Dealt::default().resolve(&mut problem);
        Ok(problem)
    }

    /// The slices as the library has them.
    pub fn regions(&self) -> Regions {
        let two = |r: &Range<usize>| (r.start as u32, r.end as u32);
        let limit = |x: Option<i64>| x.map(|x| x as i32);
        let region = |s: &Part| Region {
            seq: s.seq as u32,
            q: two(&s.q),
            k: two(&s.k),
            lo: limit(s.lo),
            hi: limit(s.hi),
        };
        Regions::new(&self.slices.iter().map(region).collect::<Vec<_>>())
    }

    /// The corpus' own `list` partition: blocks of 5 positions, dealt by a hash; odd ranks hold their blocks of a sequence in
    /// descending order. Batch entries are dealt alike, documents and the two sides are not.
    fn lists(&self, ranks: u32, side: Side) -> Vec<Vec<Stretch>> {
        let mut lists = vec![Vec::new(); ranks as usize];
        for (seq, s) in self.seqs.iter().enumerate() {
            let padded = s.extent(side).padded;
            let mut of_seq = vec![Vec::new(); ranks as usize];
            for block in 0..padded.div_ceil(5) {
                let document = if self.format == Format::Thd { seq as u64 } else { 0 };
                let key =
                    (u64::from(side == Side::Key) << 62) + (document << 31) + u64::from(block);
                let rank = super::inputs::mix(key) % u64::from(ranks);
                of_seq[rank as usize].push(Stretch {
                    seq: seq as u32,
                    start: block * 5,
                    step: 1,
                    len: (padded - block * 5).min(5),
                });
            }
            for (rank, mut stretches) in of_seq.into_iter().enumerate() {
                if rank % 2 == 1 {
                    stretches.reverse();
                }
                lists[rank].extend(stretches);
            }
        }
        lists
    }
}
