//! Pictures of plans: well formed, small, and the tiles cover exactly the pairs. `CP_SVG_DIR=/tmp/pictures` keeps them.

use crate::plans::problem;
use crate::plans_random::{Random, any_problem};
use crate::plans_time::documents;
use crate::slices::blocks;
use context_parallel::mask::Mask;
use context_parallel::partition::Partition;
use context_parallel::plan::account::account;
use context_parallel::plan::svg::{attention_matrix, lanes};
use context_parallel::plan::{Options, Pass, Plan};
use context_parallel::problem::{CommType, Problem, Sequence};
use std::sync::Arc;

/// Every tag is closed, and every attribute quoted.
fn well_formed(svg: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = svg;
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>'), "a stray >");
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
        let name = tag.split_whitespace().next().unwrap();
        match (name.strip_prefix('/'), tag.ends_with('/')) {
            (Some(name), _) => assert_eq!(open.pop(), Some(name)),
            (None, true) => {}
            (None, false) => open.push(name),
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?} not closed");
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
}

fn draw(name: &str, p: &Problem) {
    p.validate().unwrap();
    let p = Arc::new(p.clone());
    for pass in [Pass::Forward, Pass::Backward] {
        let plans = Plan::all(&p, pass, Options::default());
        for (kind, svg) in [("matrix", attention_matrix(&plans)), ("lanes", lanes(&plans))] {
            well_formed(&svg);
            assert!(svg.len() < 1 << 20, "{name} {kind} has {} bytes", svg.len());
            if let Some(folder) = std::env::var_os("CP_SVG_DIR") {
                let file = format!("{name}-{kind}-{pass:?}.svg").to_lowercase();
                std::fs::write(std::path::Path::new(&folder).join(file), svg).unwrap();
            }
        }
    }
}

#[test]
fn pictures_are_small_and_well_formed() {
    let long = |ranks, comm, inner| problem(ranks, comm, inner, 131072, 8, 2);
    let window = Mask { left: Some(4096), ..Mask::CAUSAL };
    let packed = [900, 300, 120, 1500, 700, 40].map(Sequence::square).to_vec();
    let cross = Problem {
        mask: Mask { left: Some(6), right: Some(3), ..Mask::FULL },
        ..problem(3, CommType::P2p, 0, 40, 2, 1)
    };
    for (name, p) in [
        ("small", problem(4, CommType::P2p, 0, 48, 2, 1)),
        (
            "striped",
            Problem { partition: Partition::Striped, ..problem(4, CommType::P2p, 0, 48, 2, 1) },
        ),
        ("two-sided", cross),
        ("zigzag", long(4, CommType::P2p, 0)),
        ("zigzag-8-window", Problem { mask: window, ..long(8, CommType::P2p, 0) }),
        (
            "contiguous-16",
            Problem { partition: Partition::Contiguous, ..long(16, CommType::P2p, 0) },
        ),
        ("striped-long", Problem { partition: Partition::Striped, ..long(4, CommType::P2p, 0) }),
        ("all-gather", long(8, CommType::AllGather, 0)),
        ("a2a", long(4, CommType::A2a, 0)),
        ("a2a-p2p", long(8, CommType::A2aP2p, 2)),
        (
            "documents",
            Problem { packed: true, seqs: packed.clone(), ..problem(4, CommType::P2p, 0, 1, 2, 1) },
        ),
        (
            "documents-contiguous",
            Problem {
                packed: true,
                seqs: packed,
                partition: Partition::Contiguous,
                ..problem(4, CommType::P2p, 0, 1, 2, 1)
            },
        ),
        ("300-documents", documents(16, CommType::P2p)),
        ("64-ranks", long(64, CommType::P2p, 0)),
        ("one-rank", long(1, CommType::P2p, 0)),
    ] {
        draw(name, &p);
    }
    for case in 0..30 {
        draw(&format!("random-{case}"), &any_problem(&mut Random::new(case)));
    }
    well_formed(&attention_matrix(&[]));
    well_formed(&lanes(&[]));
}

/// Area of all tiles, in pixels: the polygons; bars along the axes are drawn with horizontal lines.
fn area(svg: &str) -> f64 {
    let mut sum = 0.0;
    for line in svg.lines().filter(|l| l.starts_with("<path")) {
        let d = line.split('"').nth(1).unwrap();
        if d.contains('h') {
            continue;
        }
        for polygon in d.split('z').filter(|p| !p.is_empty()) {
            let points: Vec<(f64, f64)> = polygon
                .split(['M', 'L'])
                .filter(|p| !p.is_empty())
                .map(|p| {
                    let (x, y) = p.split_once(' ').unwrap();
                    (x.parse().unwrap(), y.parse().unwrap())
                })
                .collect();
            let next = points.iter().cycle().skip(1);
            let doubled: f64 = points.iter().zip(next).map(|(a, b)| a.0 * b.1 - a.1 * b.0).sum();
            sum += doubled.abs() / 2.0;
        }
    }
    sum
}

#[test]
fn tiles_cover_what_is_computed() {
    let window = Mask { left: Some(5), right: Some(7), ..Mask::FULL };
    for (p, pixels) in [
        (problem(4, CommType::P2p, 0, 48, 1, 1), 720.0 / 48.0),
        (Problem { mask: window, ..problem(3, CommType::AllGather, 0, 77, 1, 1) }, 720.0 / 77.0),
        (
            Problem {
                regions: blocks(&mut Random::new(3), 60, 7),
                mask: Mask::FULL,
                ..problem(4, CommType::P2p, 0, 60, 1, 1)
            },
            720.0 / 60.0,
        ),
        (crate::plans_latent::latent(4, CommType::P2p, 0, 48, 1), 720.0 / 48.0),
        // Straight edges instead of steps: half a pixel's row on the diagonal, nothing at this length.
        (problem(8, CommType::P2p, 0, 20000, 1, 1), 720.0 / 20000.0),
    ] {
        let p = Arc::new(p);
        for pass in [Pass::Forward, Pass::Backward] {
            let plans = Plan::all(&p, pass, Options::default());
            let pairs: u64 = plans.iter().map(|p| account(p).pairs).sum();
            let got = area(&attention_matrix(&plans)) / (pixels * pixels);
            assert!((got / pairs as f64 - 1.0).abs() < 2e-3, "{got} of {pairs} pairs");
        }
    }
}
