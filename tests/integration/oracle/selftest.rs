//! The oracle and the metric, tested: they must be right, and they must be able to fail.

use super::exact::Exact;
use super::*;
use context_parallel::dtype::DType;
use context_parallel::holding::tokens;
use context_parallel::problem::{CommType, Extent};
use std::collections::HashSet;

fn case(name: &str) -> &'static Case {
    cases().iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no case {name}"))
}

#[test]
fn corpus_is_well_formed() {
    let tags: HashSet<&str> = [
        "fast", "tiny", "long", "mask", "window", "cross", "blind", "pad", "format", "thd",
        "heads", "dims", "scale", "score", "slices", "wire", "latent",
    ]
    .into();
    let mut names = HashSet::new();
    let mut used = HashSet::new();
    for c in cases() {
        assert!(names.insert(&c.name), "two cases are named {}", c.name);
        for tag in &c.tags {
            assert!(tags.contains(tag.as_str()), "{}: unknown tag {tag}", c.name);
            used.insert(tag.as_str());
        }
        assert_eq!(
            c.is("pad"),
            c.seqs.iter().any(|s| s.q.len < s.q.padded || s.k.len < s.k.padded),
            "{}: tag pad",
            c.name
        );
        let blind = (0..c.seqs.len()).any(|s| {
            let len = |e: Extent| e.len as usize;
            (0..len(c.seqs[s].q)).any(|i| !(0..len(c.seqs[s].k)).any(|j| c.sees(s, i, j)))
        });
        let score = c.softcap > 0.0 || !c.slopes.is_empty() || c.dropout > 0.0;
        let asked = c.sinks.is_some() || c.max_logit.is_some() || c.bias.is_some();
        assert_eq!(c.is("score"), score || asked, "{}: tag score", c.name);
        assert_eq!(c.is("latent"), c.latent.is_some(), "{}: tag latent", c.name);
        assert_eq!(c.is("slices"), !c.slices.is_empty(), "{}: tag slices", c.name);
        assert_eq!(c.is("blind"), blind, "{}: tag blind", c.name);
    }
    assert_eq!(used, tags, "every tag is used");
    assert!(cases().len() >= 60, "the corpus shrank to {}", cases().len());
}

#[test]
fn every_case_is_a_valid_problem_and_every_row_has_one_holder() {
    for c in cases() {
        for ranks in [1, 2, 3, 5, 8, 16, 33, 64] {
            for comm in CommType::ALL {
                let p = c.problem(ranks, comm, None, DType::Bf16);
                let p = p.unwrap_or_else(|e| panic!("{}, P = {ranks}: {e}", c.name));
                assert_eq!(p.stages == 0, p.teams() == 1);
            }
            let p = c.problem(ranks, CommType::P2p, None, DType::F32).expect("valid above");
            for side in [Side::Query, Side::Key] {
                let global: Vec<f32> = (0..2 * c.tokens(side)).map(|i| i as f32).collect();
                let mut back = vec![f32::NAN; global.len()];
                let mut rows = 0;
                for rank in 0..ranks {
                    let held = tokens(&p, rank, side);
                    rows += held.len();
                    scatter(&gather(&global, &held, 2), &held, 2, &mut back);
                }
                assert_eq!(rows, c.tokens(side), "{}, P = {ranks}, {side:?}", c.name);
                assert_eq!(back, global, "{}, P = {ranks}, {side:?}", c.name);
            }
        }
    }
}

/// The pictures of `tests/data/README.md`.
#[test]
fn masks_are_what_the_corpus_says() {
    let picture = |name: &str, seq: usize, rows: std::ops::Range<usize>, keys: usize| {
        let c = case(name);
        let cell = |i, j| if c.sees(seq, i, j) { '#' } else { '.' };
        rows.map(|i| (0..keys).map(|j| cell(i, j)).collect::<String>()).collect::<Vec<_>>()
    };
    assert_eq!(picture("causal_33", 0, 0..4, 4), ["#...", "##..", "###.", "####"]);
    assert_eq!(picture("full_33", 0, 0..2, 4), ["####", "####"]);
    assert_eq!(picture("window_7_3", 0, 0..2, 6), ["####..", "#####."]);
    assert_eq!(picture("window_7_3", 0, 9..10, 15), ["..###########.."]);
    assert_eq!(picture("window_causal_0", 0, 0..3, 3), ["#..", ".#.", "..#"]);
    assert_eq!(picture("window_left_0", 0, 0..3, 3), ["###", ".##", "..#"]);
    // 13 queries, 30 keys: the last query sees the last key.
    let name = "thd_cross_bottom_right_padded";
    assert_eq!(picture(name, 0, 0..1, 30), [format!("{}{}", "#".repeat(18), ".".repeat(12))]);
    assert_eq!(picture(name, 0, 12..13, 30), ["#".repeat(30)]);
    // 40 queries, 8 keys: the first 32 see nothing.
    assert_eq!(picture(name, 2, 31..34, 8), ["........", "#.......", "##......"]);
}

/// Published in `tests/data/README.md` for readers in other languages.
#[test]
fn inputs_are_the_published_bits() {
    let c = case("causal_33");
    let x = inputs(c, DType::F32);
    assert_eq!(x.q[..3], GOLDEN[0]);
    assert_eq!(x.k[..3], GOLDEN[1]);
    assert_eq!(x.v[..3], GOLDEN[2]);
    assert_eq!(x.d_o[..3], GOLDEN[3]);
    let n = x.q.len() as f64;
    let mean = x.q.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let variance = x.q.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n;
    assert!(mean.abs() < 0.1 && (variance - 4.0 / 3.0).abs() < 0.15, "{mean} {variance}");
    for dtype in DType::ALL {
        let x = inputs(c, dtype);
        assert_eq!(decode(&encode(&x.k, dtype), dtype), x.k, "{dtype:?}: already rounded");
    }
}
const GOLDEN: [[f32; 3]; 4] = [
    [-2.299_133_3, -2.027_221_7, 0.835_144_04],
    [-1.890_991_2, 0.913_055_4, -1.805_389_4],
    [-0.748_474_1, 0.155_609_13, -1.826_751_7],
    [0.806_182_86, 0.908_325_2, 1.041_626],
];

/// Published too: the ranks of the first blocks at P = 3, and the descending order on odd ranks.
#[test]
fn list_partition_is_the_published_one() {
    let positions = |name: &str, rank: u32, side: Side| {
        let p = case(name).problem(3, CommType::P2p, None, DType::F32).expect("valid");
        tokens(&p, rank, side)
    };
    let holder = |name: &str, token: u32, side: Side| {
        (0..3).find(|&r| positions(name, r, side).contains(&token)).expect("some rank holds it")
    };
    let ranks = |name: &str, first: u32, side: Side| -> Vec<u32> {
        (0..7).map(|block| holder(name, first + block * 5, side)).collect()
    };
    assert_eq!(ranks("causal_101_list", 0, Side::Query), [1, 0, 1, 1, 1, 0, 2]);
    assert_eq!(ranks("causal_101_list", 0, Side::Key), [1, 0, 1, 1, 2, 2, 1]);
    assert_eq!(ranks("causal_101_list", 101, Side::Query), [1, 0, 1, 1, 1, 0, 2]);
    assert_eq!(ranks("thd_list", 17, Side::Query), [2, 2, 0, 1, 0, 1, 1]);
    let odd = positions("causal_101_list", 1, Side::Query);
    let second = odd.iter().position(|&t| t > 100).expect("rows of the second batch entry");
    assert_eq!(odd[second - 5..second], [0, 1, 2, 3, 4]);
    assert_eq!(positions("causal_101_list", 0, Side::Query)[..5], [5, 6, 7, 8, 9]);
}

/// The oracle's gradients against differences of its own outputs.
#[test]
fn oracle_gradients_are_derivatives() {
    /// The inputs, and where the oracle has their gradients.
    type Place = (fn(&mut Inputs) -> &mut Vec<f32>, fn(&Exact) -> &Vec<f64>);
    let places: [Place; 5] = [
        (|x| &mut x.q, |e| &e.right.dq),
        (|x| &mut x.k, |e| &e.right.dk),
        (|x| &mut x.v, |e| &e.right.dv),
        (|x| &mut x.sinks, |e| &e.right.d_sinks),
        (|x| &mut x.bias, |e| &e.right.d_bias),
    ];
    for name in [
        "five_tokens",
        "thd_1_2_14_33_5",
        "window_bottom_right_blind",
        "dim_24_8",
        "softcap",
        "alibi_cross_bottom_right",
        "sinks_rank_left_padding",
        "bias_1hss",
        "bias_documents",
        "bias_and_everything",
    ] {
        let c = case(name);
        let r = reference(c, DType::F32);
        let loss = |x: &Inputs| -> f64 {
            let o = exact::exact(c, x).right.o;
            o.iter().zip(&x.d_o).filter(|(o, _)| **o != 0.0).map(|(o, g)| o * f64::from(*g)).sum()
        };
        for (tensor, (input, gradient)) in places.iter().enumerate() {
            let right = gradient(&r.exact);
            for n in 0..if right.is_empty() { 0 } else { 8 } {
                let i = (inputs::mix(n) % right.len() as u64) as usize;
                let side = |step: f32| {
                    let mut x = r.inputs.clone();
                    let place = &mut input(&mut x)[i];
                    *place += step;
                    let there = f64::from(*place);
                    (loss(&x), there)
                };
                let ((above, a), (below, b)) = (side(1.0 / 512.0), side(-1.0 / 512.0));
                let slope = (above - below) / (a - b);
                assert!(
                    (slope.is_nan() && right[i] == 0.0)
                        || (slope - right[i]).abs() <= 1e-5 * (1.0 + right[i].abs()),
                    "{name}, input {tensor}, element {i}: oracle {}, difference {slope}",
                    right[i]
                );
            }
        }
    }
}

#[test]
fn plain_attention_passes() {
    for c in cases() {
        for dtype in DType::ALL {
            let r = reference(c, dtype);
            for tensor in Tensor::ALL {
                let worst = r.check(tensor, r.plain.get(tensor)).unwrap_or_else(|e| panic!("{e}"));
                assert!(worst <= 0.5 || tensor == Tensor::Lse, "{}: {tensor:?} {worst}", c.name);
            }
        }
    }
}

/// Which tensors of plain attention with a planted error break the contract.
fn broken(c: &Case, dtype: DType, how: &Variation) -> Vec<Tensor> {
    let r = reference(c, dtype);
    let got = plain(c, &r.inputs, dtype, how);
    Tensor::ALL.into_iter().filter(|t| r.check(*t, got.get(*t)).is_err()).collect()
}

#[test]
fn planted_errors_fail() {
    for dtype in DType::ALL {
        for name in ["causal_33", "causal_257", "thd_1_2_14_33_5", "pad_left", "window_7_3"] {
            let c = case(name);
            let right = |s, i, j| c.sees(s, i, j);
            let good = || Variation::of(c, &right);
            let fails = |how: &Variation, what: &str| {
                assert_eq!(broken(c, dtype, how), Tensor::ALL, "{name}, {dtype:?}, {what}");
            };
            assert_eq!(broken(c, dtype, &good()), [], "{name}, {dtype:?}");
            let late = |s, i, j: usize| c.sees(s, i, j) || (j > 0 && c.sees(s, i, j - 1));
            fails(&Variation { sees: &late, ..good() }, "diagonal one key late");
            let early = |s, i, j| c.sees(s, i, j) && c.sees(s, i, j + 1);
            fails(&Variation { sees: &early, ..good() }, "diagonal one key early");
            let lost = |s, i, j| c.sees(s, i, j) && j / 8 != 2;
            fails(&Variation { sees: &lost, ..good() }, "a block of eight keys lost");
            fails(&Variation { scale: 1.0, ..good() }, "scale forgotten");
            let hole = |s, i, j| c.sees(s, i, j) && (i, j) != (20, 17);
            let hole = Variation { sees: &hole, ..good() };
            assert!(broken(c, dtype, &hole).contains(&Tensor::Lse), "{name}, {dtype:?}, one pair");
        }
    }
}

/// Sums kept in the storage type. The LSE is not one of them.
#[test]
fn sums_in_the_storage_type_fail() {
    for dtype in [DType::Bf16, DType::F16] {
        let c = case("causal_1000");
        let right = |s, i, j| c.sees(s, i, j);
        let how = Variation { accumulator: dtype, ..Variation::of(c, &right) };
        assert_eq!(
            broken(c, dtype, &how),
            [Tensor::O, Tensor::Dq, Tensor::Dk, Tensor::Dv],
            "{dtype:?}"
        );
    }
}

/// What the contract says when element `i` of plain attention's result is `x`.
fn spoil(r: &Reference, tensor: Tensor, i: usize, x: f32) -> String {
    let mut got = r.plain.get(tensor).to_vec();
    got[i] = x;
    r.check(tensor, &got).expect_err("must fail")
}

#[test]
fn spoiled_elements_fail() {
    let c = case("pad_left");
    for dtype in DType::ALL {
        let r = reference(c, dtype);
        assert!(spoil(&r, Tensor::Dk, 3, 1e-30).contains("padding"));
        assert!(spoil(&r, Tensor::Lse, 3, 0.0).contains("padding"));
        let live = c.first(0, Side::Query) * c.heads;
        assert!(spoil(&r, Tensor::O, live * c.dim_v, f32::NAN).contains("head 0"));
        assert!(spoil(&r, Tensor::Lse, live + 2, f32::NEG_INFINITY).contains("head 2"));
        assert!(r.check(Tensor::O, &[]).is_err(), "wrong length");
    }
}

#[test]
fn leakage_is_found() {
    for c in cases().iter().filter(|c| c.is("fast")) {
        for dtype in [DType::F32, DType::Bf16] {
            let run = |sees: &dyn Fn(usize, usize, usize) -> bool, tensor| {
                leakage(c, dtype, tensor, |x| {
                    plain(c, x, dtype, &Variation::of(c, sees)).get(tensor).to_vec()
                })
            };
            let right = |s, i, j| c.sees(s, i, j);
            for tensor in [Tensor::O, Tensor::Dq] {
                run(&right, tensor).unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }
    let c = case("causal_33");
    let run = |sees: &dyn Fn(usize, usize, usize) -> bool| {
        leakage(c, DType::F32, Tensor::O, |x| plain(c, x, DType::F32, &Variation::of(c, sees)).o)
            .expect_err("must fail")
    };
    assert!(run(&|_, i, j| j <= i + 1).contains("must not see it"));
    assert!(run(&|_, i, j| j <= i && j != 32).contains("did not change"));
}
