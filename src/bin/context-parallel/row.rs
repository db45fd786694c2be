//! One line of `perf`'s table.

use crate::json::Object;
use crate::text::{self, Align, bad, dim};
use context_parallel::dtype::DType;

/// One line of the table.
pub struct Row {
    pub seq: u64,
    pub comm: &'static str,
    pub dtype: DType,
    pub stages: Option<u32>,
    /// Forward, backward: median over runs of the slowest rank.
    pub seconds: [f64; 2],
    /// Of one rank, in 1e9 a second.
    pub rate: [f64; 2],
    pub sent: [u64; 2],
    pub exposed: [f64; 2],
    pub versus: [f64; 2],
    pub errors: Option<[f64; 5]>,
    pub agrees: bool,
}

/// The columns.
pub const COLUMNS: [(&str, Align, usize); 15] = [
    ("seq", Align::Right, 7),
    ("comm", Align::Left, 10),
    ("dtype", Align::Left, 5),
    ("stages", Align::Right, 6),
    ("fwd ms", Align::Right, 8),
    ("GFLOP/s", Align::Right, 7),
    ("exposed", Align::Right, 7),
    ("vs one", Align::Right, 6),
    ("bwd ms", Align::Right, 8),
    ("GFLOP/s", Align::Right, 7),
    ("exposed", Align::Right, 7),
    ("vs one", Align::Right, 6),
    ("sent fwd", Align::Right, 8),
    ("sent bwd", Align::Right, 8),
    ("error", Align::Right, 7),
];

impl Row {
    /// The line's cells.
    pub fn cells(&self) -> [String; 15] {
        let ranks = self.stages.is_some();
        let share = |x: f64| if ranks { format!("{:.0} %", 100.0 * x) } else { String::new() };
        let sent = |n: u64| if ranks { text::bytes(n) } else { String::new() };
        // The LSE is compared absolutely; it counts for `agrees`.
        let worst =
            self.errors.map(|[o, _, dq, dk, dv]| [dq, dk, dv].into_iter().fold(o, f64::max));
        let error = match worst {
            None => String::new(),
            Some(e) if self.agrees => text::error(e),
            Some(e) => bad(&text::error(e)),
        };
        let half = |i: usize| {
            [
                format!("{:.2}", self.seconds[i] * 1e3),
                format!("{:.1}", self.rate[i]),
                share(self.exposed[i]),
                share(self.versus[i]),
            ]
        };
        let ([a, b, c, d], [e, f, g, h]) = (half(0), half(1));
        let stages =
            self.stages.map_or(String::new(), |s| if s == 0 { "–".into() } else { s.to_string() });
        let comm = if ranks { self.comm.into() } else { dim(self.comm) };
        [
            self.seq.to_string(),
            comm,
            self.dtype.name().into(),
            stages,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
            sent(self.sent[0]),
            sent(self.sent[1]),
            error,
        ]
    }

    /// The line as JSON.
    pub fn json(&self) -> String {
        let pass = |i: usize| {
            Object::default()
                .float("seconds", self.seconds[i])
                .float("gflops_per_rank", self.rate[i])
                .raw("bytes_sent_per_rank", self.sent[i])
                .float("exposed", self.exposed[i])
                .float("versus_one_rank", self.versus[i])
                .end()
        };
        let errors = self.errors.map_or("null".into(), |e| {
            let names = ["out", "lse", "dq", "dk", "dv"];
            names.iter().zip(e).fold(Object::default(), |o, (name, x)| o.float(name, x)).end()
        });
        Object::default()
            .raw("seq", self.seq)
            .text("comm", self.comm)
            .raw("stages", self.stages.map_or("null".into(), |s| s.to_string()))
            .text("dtype", self.dtype.name())
            .raw("forward", pass(0))
            .raw("backward", pass(1))
            .raw("errors", errors)
            .raw("agrees", self.agrees)
            .end()
    }
}
