//! Padding rules and communication types per layer: Megatron's own answers (tests/data/mesh), and where ours differ, worked by hand.

use crate::mesh::{numbers, rows};
use context_parallel::layers::{comm_types_per_layer, names};
use context_parallel::padding::*;
use context_parallel::problem::CommType::{A2a, A2aP2p, AllGather, P2p};

#[test]
fn amounts_are_megatrons() {
    let rows = rows("padding.csv");
    assert_eq!(rows.len(), 72);
    for row in rows {
        let fp8 = match row[3].as_str() {
            "off" => Fp8::Off,
            "16" => Fp8::Rows16,
            "32" => Fp8::Rows32,
            other => panic!("{other}"),
        };
        let (tp, cp) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        let parallel = Parallel { tp, cp, sequence_parallel: row[2] == "1", fp8 };
        let theirs = parallel.factor(Rule::Megatron).unwrap();
        let ours = parallel.factor(Rule::Every).unwrap();
        for (length, wanted) in numbers::<u64>(&row[4]).into_iter().zip(numbers::<u64>(&row[5])) {
            assert_eq!(padding(length, theirs), wanted, "{row:?}");
            // Ours meets theirs and FP8's need on every rank.
            let padded = length + padding(length, ours);
            assert_eq!((padded % theirs, padded % u64::from(cp)), (0, 0), "{row:?}");
            assert_eq!(padded / u64::from(cp) % fp8.rows(), 0, "{row:?}");
        }
    }
}

/// By hand. Both factors, for FP8 beside context or sequence parallelism, which Megatron leaves out.
#[test]
fn every_need_at_once() {
    for (tp, cp, sequence_parallel, fp8, theirs, ours) in [
        (1, 1, false, Fp8::Rows16, 16, 16),
        (1, 1, false, Fp8::Rows32, 32, 32),
        (8, 1, true, Fp8::Rows16, 8, 16),
        (3, 1, true, Fp8::Rows16, 3, 48),
        (1, 2, false, Fp8::Off, 4, 4),
        (1, 2, false, Fp8::Rows16, 4, 32),
        (1, 3, false, Fp8::Rows32, 6, 96),
        (2, 4, true, Fp8::Rows16, 16, 64),
        (2, 4, true, Fp8::Rows32, 16, 128),
        (3, 2, true, Fp8::Rows16, 12, 96),
        // Without sequence parallelism tp does not matter.
        (8, 2, false, Fp8::Off, 4, 4),
    ] {
        let parallel = Parallel { tp, cp, sequence_parallel, fp8 };
        assert_eq!(parallel.factor(Rule::Megatron).unwrap(), theirs, "{parallel:?}");
        assert_eq!(parallel.factor(Rule::Every).unwrap(), ours, "{parallel:?}");
    }
    let wrong = Parallel { tp: 0, cp: 2, sequence_parallel: false, fp8: Fp8::Off };
    assert!(wrong.factor(Rule::Every).unwrap_err().text.contains("tp: got 0"));
    assert_eq!([0, 1, 15, 16, 17].map(|n| padding(n, 16)), [0, 15, 1, 0, 15]);
}

#[test]
fn overlap_wants_one_length() {
    let parallel = Parallel { tp: 2, cp: 2, sequence_parallel: true, fp8: Fp8::Off };
    let to = |length, fixed, rule| padding_to(length, fixed, &parallel, rule);
    assert_eq!(to(1000, 4096, Rule::Every), Ok(3096));
    assert_eq!(to(1000, 4095, Rule::Megatron), Ok(3095));
    assert!(to(1000, 4095, Rule::Every).unwrap_err().text.contains("multiple of 8"));
    assert!(to(1000, 999, Rule::Megatron).unwrap_err().text.contains("the sequence has 1000"));
}

/// TransformerEngine's own unit tests of pad_thd_sequences_for_cp (tests/pytorch/attention/test_cp_utils.py).
#[test]
fn sequences_are_padded_one_by_one() {
    assert_eq!(cu_padded(&[0, 3, 5, 9], 8).unwrap(), [0, 8, 16, 24]);
    assert_eq!(cu_padded(&[0, 2, 9, 13, 23], 6).unwrap(), [0, 6, 18, 24, 36]);
    assert_eq!(cu_padded(&[0, 7, 18, 23], 4).unwrap(), [0, 8, 20, 28]);
    // By hand: nothing to pad, an empty sequence, none at all.
    assert_eq!(cu_padded(&[0, 8, 8, 16], 8).unwrap(), [0, 8, 8, 16]);
    assert_eq!(cu_padded(&[0], 8).unwrap(), [0]);
    for (cu, factor, words) in [
        (&[1, 2][..], 2, "must begin with 0"),
        (&[][..], 2, "must begin with 0"),
        (&[0, 5, 4][..], 2, "got 4 after 5 at entry 2"),
        (&[0, 5][..], 0, "factor: got 0"),
    ] {
        let e = cu_padded(cu, factor).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
}

#[test]
fn tails_are_megatrons() {
    let rows = rows("tails.csv");
    assert_eq!(rows.len(), 24);
    for row in rows {
        let slots: u32 = row[6].parse().unwrap();
        let rule = TailRule {
            ranks: row[2].parse().unwrap(),
            chunks: if row[3] == "zigzag" { 2 } else { 1 },
            target: match row[4].parse().unwrap() {
                0 => Target::Rows(row[5].parse().unwrap()),
                n => Target::Multiple(n),
            },
            tail: if row[7] == "extend_last" { Tail::ExtendLast } else { Tail::AppendDummy },
            slots: (slots > 0).then_some(slots),
        };
        let made = fill(&numbers(&row[0]), &numbers(&row[1]), &rule).unwrap();
        let wanted = Pack {
            cu: numbers(&row[8]),
            padded: numbers(&row[9]),
            longest: row[10].parse().unwrap(),
        };
        assert_eq!(made, wanted, "{row:?}");
    }
}

#[test]
fn wrong_tails_are_named() {
    let rule = TailRule {
        ranks: 2,
        chunks: 2,
        target: Target::Multiple(8),
        tail: Tail::AppendDummy,
        slots: None,
    };
    let extend = TailRule { tail: Tail::ExtendLast, ..rule };
    let (cu, padded) = (&[0, 5, 12][..], &[0, 8, 16][..]);
    for (cu, padded, rule, words) in [
        (cu, &[0, 8][..], rule, "got 2 entries, cu_seqlens has 3"),
        (cu, &[0, 8, 14][..], rule, "sequence 1 has 7 tokens and a padded length of 6"),
        (cu, padded, TailRule { ranks: 0, ..rule }, "ranks: got 0"),
        (cu, padded, TailRule { chunks: 3, ..rule }, "3 chunks"),
        (cu, padded, TailRule { target: Target::Multiple(0), ..rule }, "alignment: got 0"),
        (cu, padded, TailRule { target: Target::Multiple(u64::MAX), ..rule }, "too many rows"),
        (cu, padded, TailRule { target: Target::Rows(u64::MAX), ..rule }, "too many rows"),
        (cu, padded, TailRule { target: Target::Rows(7), ..rule }, "the sequences need 16"),
        (
            cu,
            padded,
            TailRule { target: Target::Rows(9), ..rule },
            "dummy sequence would have 2 tokens",
        ),
        (
            cu,
            padded,
            TailRule { target: Target::Rows(9), ..extend },
            "the pack would have 18 tokens",
        ),
        (
            cu,
            padded,
            TailRule { target: Target::Rows(10), slots: Some(2), ..rule },
            "there are 3 sequences, the dummy included",
        ),
        (cu, padded, TailRule { slots: Some(1), ..extend }, "slots: got 1, there are 2 sequences"),
        (&[0][..], &[0][..], TailRule { target: Target::Rows(4), ..extend }, "got no sequence"),
    ] {
        let e = fill(cu, padded, &rule).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
    // A pack of nothing is one dummy; an odd number of rows is fine where the pack is cut as one piece.
    let dummy = fill(&[0], &[0], &TailRule { target: Target::Rows(4), ..rule }).unwrap();
    assert_eq!(dummy, Pack { cu: vec![0, 8], padded: vec![0, 8], longest: 8 });
    let odd = TailRule { target: Target::Rows(9), chunks: 1, ..rule };
    assert_eq!(fill(cu, padded, &odd).unwrap().padded, [0, 8, 16, 18]);
    let alone = TailRule { ranks: 1, target: Target::Rows(17), ..rule };
    assert_eq!(fill(cu, padded, &alone).unwrap().padded, [0, 8, 16, 17]);
    // 17 rows are nine on one of two ranks, so sixteen on both.
    let multiple = TailRule { chunks: 1, ..rule };
    assert_eq!(fill(cu, &[0, 8, 17], &multiple).unwrap().padded, [0, 8, 17, 32]);
}

/// By hand, after split_to_context_parallel_ranks: ⌈count/ranks⌉ each, the last ones padded.
#[test]
fn batches_are_split_by_entries() {
    let parts = |count, ranks| -> Vec<(u64, u64, u64)> {
        (0..ranks)
            .map(|r| split(count, ranks, r).unwrap())
            .map(|s| (s.start, s.len, s.padding))
            .collect()
    };
    assert_eq!(parts(4, 2), [(0, 2, 0), (2, 2, 0)]);
    assert_eq!(parts(5, 2), [(0, 3, 0), (3, 2, 1)]);
    assert_eq!(parts(5, 4), [(0, 2, 0), (2, 2, 0), (4, 1, 1), (5, 0, 2)]);
    assert_eq!(parts(1, 3), [(0, 1, 0), (1, 0, 1), (1, 0, 1)]);
    assert_eq!(parts(0, 2), [(0, 0, 0), (0, 0, 0)]);
    assert!(split(4, 2, 2).is_err() && split(4, 0, 0).is_err());
}

/// By hand, after get_packed_seq_params.
#[test]
fn batches_with_padding_are_packed_for_context_parallelism() {
    let of = |padding, ranks, packed| batch_lengths(2, 12, padding, ranks, packed).unwrap();
    assert_eq!(of(2, 2, false), (vec![0, 10, 20], Some(vec![0, 12, 24])));
    assert_eq!(of(0, 2, true), (vec![0, 12, 24], Some(vec![0, 12, 24])));
    assert_eq!(of(0, 2, false), (vec![0, 12, 24], None));
    assert_eq!(of(2, 1, true), (vec![0, 10, 20], None));
    assert!(batch_lengths(2, 12, 13, 2, false).is_err());
    assert!(batch_lengths(2, u64::MAX, 0, 2, false).is_err());
}

/// The most tokens on a rank.
fn fullest(rows: &[u64], bounds: &[u64]) -> u64 {
    bounds.windows(2).map(|w| rows[w[0] as usize..w[1] as usize].iter().sum()).max().unwrap()
}

#[test]
fn images_stay_whole_and_ranks_even() {
    let ones = |n: usize| vec![1; n];
    let megatron =
        |n, ranks| image_bounds(&vec![5; n], &ones(n), 1, ranks, Rule::Megatron).unwrap();
    let ours =
        |rows: &[u64], ranks| image_bounds(rows, &ones(rows.len()), 1, ranks, Rule::Every).unwrap();
    // By hand, after split_to_context_parallel_ranks_dynamic_res.
    assert_eq!(megatron(7, 4), [0, 1, 2, 3, 7]);
    assert_eq!(megatron(8, 4), [0, 2, 4, 6, 8]);
    assert_eq!(megatron(2, 4), [0, 1, 2, 3, 4]);
    assert_eq!(ours(&[5; 7], 4), [0, 2, 4, 6, 7]);
    assert_eq!(ours(&[9, 1, 1, 1, 1, 1, 4], 3), [0, 1, 6, 7]);
    assert_eq!(ours(&[5, 5], 4), [0, 1, 2, 2, 2]);
    assert_eq!(ours(&[1, 1, 9], 3), [0, 1, 2, 3]);
    assert_eq!(ours(&[], 2), [0, 0, 0]);
    // A picture, a video of five frames in tubelets of two, a picture: cuts at 0 1 3 5 6 7.
    let video = |ranks| image_bounds(&[4; 7], &[1, 5, 1], 2, ranks, Rule::Every).unwrap();
    assert_eq!(video(2), [0, 3, 7]);
    assert_eq!(video(5), [0, 1, 3, 5, 6, 7]);
    for (media, tubelet, ranks, rule, words) in [
        (&[1, 1][..], 1, 2, Rule::Every, "not 3 images"),
        (&[1, 2][..], 0, 2, Rule::Every, "tubelet: got 2 and 0"),
        (&[1, 2][..], 1, 0, Rule::Every, "got 0 and 1"),
        (&[1, 2][..], 2, 2, Rule::Megatron, "single images only"),
    ] {
        let e = image_bounds(&[4; 3], media, tubelet, ranks, rule).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
    // As even as any way to cut, by trying all of them.
    let mut random = crate::plans_random::Random::new(9);
    for _ in 0..300 {
        let rows: Vec<u64> = (0..random.within(1, 8)).map(|_| random.within(0, 9).into()).collect();
        let n = rows.len() as u64;
        let mut best = u64::MAX;
        for a in 0..=n {
            for b in a..=n {
                best = best.min(fullest(&rows, &[0, a, b, n]));
            }
        }
        let bounds = ours(&rows, 3);
        assert_eq!((bounds[0], bounds[3], fullest(&rows, &bounds)), (0, n, best), "{rows:?}");
        assert!(n < 3 || bounds.windows(2).all(|w| w[0] < w[1]), "{rows:?} {bounds:?}");
    }
}

#[test]
fn one_communication_type_per_layer() {
    let of = |text: &str, layers| comm_types_per_layer(&names(text), layers);
    assert_eq!(of("p2p", 3).unwrap(), [P2p; 3]);
    assert_eq!(of("a2a p2p,all_gather", 3).unwrap(), [A2a, P2p, AllGather]);
    assert_eq!(of(" allgather , a2a+p2p ", 4).unwrap(), [AllGather, A2aP2p, AllGather, A2aP2p]);
    for (text, layers, words) in [
        ("a2a p2p", 3, "got 2 names for 3 layers"),
        ("a2a p2p a2a p2p", 2, "got 4 names for 2 layers"),
        ("", 2, "got 0 names for 2 layers"),
        ("p2p", 0, "layers: got 0"),
        ("ring", 2, "got \"ring\", allowed p2p, all_gather (or allgather), a2a, a2a+p2p"),
        ("p2p A2A", 2, "name 1 is \"A2A\", allowed"),
    ] {
        let e = of(text, layers).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
}
