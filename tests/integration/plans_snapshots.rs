//! Printed plans, compared with committed files. After a wanted change: `CP_BLESS=1 cargo test snapshots`.

use crate::plans::problem;
use context_parallel::mask::Mask;
use context_parallel::partition::Partition;
use context_parallel::plan::{Options, Pass, Plan, print::table, svg::attention_matrix};
use context_parallel::problem::{CommType, Extent, Problem, Sequence};
use std::sync::Arc;

fn compare(name: &str, text: &str) {
    let path = format!("{}/tests/data/snapshots/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("CP_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert!(text == want, "{path} differs; got\n{text}");
}

fn cases() -> Vec<(&'static str, Problem)> {
    let ring = || problem(4, CommType::P2p, 0, 16, 2, 1);
    let window = Mask { left: Some(3), ..Mask::CAUSAL };
    let lengths = [3, 14, 1, 22, 8];
    let documents: Vec<Sequence> = lengths.map(Sequence::square).to_vec();
    let extent = |before, len| Extent { before, len, padded: 16 };
    let both = |e| Sequence { q: e, k: e };
    vec![
        ("p2p-causal", ring()),
        ("p2p-full", Problem { mask: Mask::FULL, ..ring() }),
        ("p2p-striped", Problem { partition: Partition::Striped, ..ring() }),
        ("p2p-contiguous", Problem { partition: Partition::Contiguous, ..ring() }),
        ("p2p-window", Problem { mask: window, ..ring() }),
        (
            "p2p-contiguous-window",
            Problem { partition: Partition::Contiguous, mask: window, ..ring() },
        ),
        ("p2p-relay", Problem { relay: true, ..ring() }),
        ("p2p-two-stages", Problem { stages: 2, ..problem(5, CommType::P2p, 0, 33, 6, 2) }),
        (
            "p2p-packed-documents",
            Problem { packed: true, seqs: documents, partition: Partition::Contiguous, ..ring() },
        ),
        (
            "p2p-padded-batch",
            Problem { seqs: vec![both(extent(0, 5)), both(extent(3, 13))], ..ring() },
        ),
        ("p2p-cross-bottom-right", {
            let seqs = vec![Sequence { q: Extent::full(8), k: Extent::full(24) }];
            Problem { mask: Mask { bottom_right: true, ..Mask::CAUSAL }, seqs, ..ring() }
        }),
        ("all-gather-causal", problem(4, CommType::AllGather, 0, 16, 2, 1)),
        ("a2a-causal", problem(4, CommType::A2a, 0, 16, 4, 4)),
        ("a2a-shared-key-heads", problem(3, CommType::A2a, 0, 12, 6, 2)),
        ("a2a-p2p-causal", problem(6, CommType::A2aP2p, 2, 24, 4, 2)),
        ("more-ranks-than-tokens", problem(8, CommType::P2p, 0, 5, 1, 1)),
    ]
}

#[test]
fn tables() {
    for (name, p) in cases() {
        p.validate().unwrap();
        let p = Arc::new(p);
        let tables = [Pass::Forward, Pass::Backward]
            .map(|pass| table(&Plan::all(&p, pass, Options::default())));
        compare(&format!("{name}.txt"), &tables.join("\n"));
    }
}

#[test]
fn whole_plans() {
    let ring = Arc::new(problem(4, CommType::P2p, 0, 16, 2, 1));
    let usp = Arc::new(problem(4, CommType::A2aP2p, 2, 16, 4, 1));
    for (name, p) in [("rank-1-of-p2p", ring), ("rank-1-of-a2a-p2p", usp)] {
        let plans = Plan::both(&p, 1, Options::default());
        compare(&format!("{name}.txt"), &plans.map(|plan| plan.to_string()).join("\n"));
    }
}

/// The README's picture.
#[test]
fn picture() {
    let ring = Arc::new(problem(4, CommType::P2p, 0, 4096, 2, 1));
    compare(
        "attention-matrix.svg",
        &attention_matrix(&Plan::all(&ring, Pass::Forward, Options::default())),
    );
}
