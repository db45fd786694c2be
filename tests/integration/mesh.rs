//! The rank grid: Megatron's own answers (tests/data/mesh), its documents' examples, and a naive enumeration.

use crate::plans_random::Random;
use context_parallel::mesh::*;

/// The rows of a file in tests/data/mesh, as fields.
pub fn rows(name: &str) -> Vec<Vec<String>> {
    let path = format!("{}/tests/data/mesh/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    text.lines().skip(1).map(|l| l.split(',').map(String::from).collect()).collect()
}

/// Numbers separated by spaces.
pub fn numbers<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Vec<T> {
    text.split_whitespace().map(|n| n.parse().unwrap()).collect()
}

fn mesh(order: &str, tp: u32, cp: u32, ep: u32, dp: u32, pp: u32) -> Mesh {
    Mesh::new(order, Sizes { tp, cp, ep, dp, pp }, None, 0).unwrap()
}

fn axes(text: &str) -> Axes {
    Axes::parse(text).unwrap()
}

#[test]
fn groups_are_megatrons() {
    let rows = rows("groups.csv");
    assert_eq!(rows.len(), 60);
    for row in rows {
        let n: Vec<u32> = row[1..6].iter().map(|n| n.parse().unwrap()).collect();
        let m = mesh(&row[0], n[0], n[1], n[2], n[3], n[4]);
        let wanted: Vec<Vec<u32>> = row[7].split(';').map(numbers).collect();
        assert_eq!(m.groups(axes(&row[6])), wanted, "{row:?}");
    }
}

/// The same by brute force: ranks with equal coordinates on all other axes.
fn naive(order: &[&str], sizes: &[u32], chosen: &[&str], first: u32) -> Vec<Vec<u32>> {
    let world: u32 = sizes.iter().product();
    let mut groups: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
    for rank in 0..world {
        let (mut rest, mut key) = (rank, Vec::new());
        for (axis, size) in order.iter().zip(sizes) {
            if !chosen.contains(axis) {
                key.push(rest % size);
            }
            rest /= size;
        }
        match groups.iter_mut().find(|(k, _)| *k == key) {
            Some((_, members)) => members.push(first + rank),
            None => groups.push((key, vec![first + rank])),
        }
    }
    groups.into_iter().map(|(_, members)| members).collect()
}

#[test]
fn any_order_and_any_combination_is_the_naive_enumeration() {
    let mut random = Random::new(3);
    for _ in 0..2000 {
        let mut order = ["tp", "cp", "ep", "dp", "pp"];
        for i in 1..5 {
            order.swap(i, random.within(0, i as u32) as usize);
        }
        let no_cp = random.one_in(2);
        let sizes: Vec<u32> = order
            .iter()
            .map(|a| if *a == if no_cp { "cp" } else { "ep" } { 1 } else { random.within(1, 4) })
            .collect();
        let of = |axis: &str| sizes[order.iter().position(|a| *a == axis).unwrap()];
        let mut chosen: Vec<&str> = order.into_iter().filter(|_| random.one_in(2)).collect();
        chosen.reverse();
        if chosen.is_empty() {
            continue;
        }
        let first = random.within(0, 1) * 7;
        let world: u32 = sizes.iter().product();
        let asked = Sizes {
            tp: of("tp"),
            cp: of("cp"),
            ep: of("ep"),
            dp: random.within(0, 1) * of("dp"),
            pp: of("pp"),
        };
        let m = Mesh::new(&order.join("-"), asked, Some(world), first).unwrap();
        assert_eq!(m.sizes().dp, of("dp"));
        let set = axes(&chosen.join("-"));
        let groups = m.groups(set);
        assert_eq!(groups, naive(&order, &sizes, &chosen, first), "{order:?} {sizes:?} {chosen:?}");
        for group in &groups {
            assert_eq!(group.len() as u32, m.size(set));
            for (i, rank) in group.iter().enumerate() {
                assert_eq!(m.members(set, *rank).unwrap(), *group);
                assert_eq!(m.rank_in(set, *rank).unwrap(), i as u32);
            }
        }
        assert!(
            m.members(set, first + world).is_err() && (first == 0 || m.members(set, 0).is_err())
        );
    }
}

#[test]
fn levels_of_the_documents_examples() {
    let level = |ranks: &[u32], sizes: &[u32], l| level_groups(ranks, sizes, l).unwrap();
    let eight: Vec<u32> = (0..8).collect();
    assert_eq!(level(&eight, &[4, 2], 0), [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
    assert_eq!(level(&eight, &[4, 2], 1), [[0, 4], [1, 5], [2, 6], [3, 7]]);
    // tp = 2, so that the cp group is every other rank.
    let cp = mesh(DEFAULT_ORDER, 2, 8, 1, 1, 1).members(Axis::Cp.into(), 6).unwrap();
    assert_eq!(cp, [0, 2, 4, 6, 8, 10, 12, 14]);
    assert_eq!(level(&cp, &[2, 4], 0), [[0, 2], [4, 6], [8, 10], [12, 14]]);
    assert_eq!(level(&cp, &[2, 4], 1), [[0, 4, 8, 12], [2, 6, 10, 14]]);
    // Three levels, from the docstring of create_hierarchical_groups.
    let all: Vec<u32> = (0..16).collect();
    let pairs: Vec<Vec<u32>> = (0..8).map(|i| vec![2 * i, 2 * i + 1]).collect();
    assert_eq!(level(&all, &[2, 2, 4], 0), pairs);
    assert_eq!(
        level(&all, &[2, 2, 4], 1),
        [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    );
    assert_eq!(
        level(&all, &[2, 2, 4], 2),
        [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    );
    for (l, wanted) in [(0, vec![10, 11]), (1, vec![8, 10]), (2, vec![2, 6, 10, 14])] {
        assert_eq!(level_members(&all, &[2, 2, 4], l, 10).unwrap(), wanted);
    }
}

/// Every level cuts the ranks into groups, and a rank meets every other by going up the levels.
#[test]
fn levels_partition_and_connect() {
    let mut random = Random::new(5);
    for _ in 0..300 {
        let sizes: Vec<u32> = (0..random.within(1, 4)).map(|_| random.within(1, 4)).collect();
        let n: u32 = sizes.iter().product();
        let ranks: Vec<u32> = (0..n).map(|i| 3 * i + 1).collect();
        let mut reached = vec![ranks[random.within(0, n - 1) as usize]];
        for level in 0..sizes.len() {
            let groups = level_groups(&ranks, &sizes, level).unwrap();
            let mut all = groups.concat();
            all.sort_unstable();
            assert_eq!(all, ranks);
            for group in &groups {
                assert_eq!(group.len() as u32, sizes[level]);
                for rank in group {
                    assert_eq!(level_members(&ranks, &sizes, level, *rank).unwrap(), *group);
                }
            }
            let members = |r: &u32| level_members(&ranks, &sizes, level, *r).unwrap();
            reached = reached.iter().flat_map(members).collect();
        }
        reached.sort_unstable();
        assert_eq!(reached, ranks, "{sizes:?}");
    }
}

/// The dp-cp group of ten ranks (dp = 5, cp = 2 under tp = 2): any size, and no short group under a false name.
#[test]
fn consecutive_members_of_any_size() {
    let all = mesh(DEFAULT_ORDER, 2, 2, 1, 5, 1).members(axes("dp-cp"), 1).unwrap();
    assert_eq!(all, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]);
    let of = |size, rank| consecutive_members(&all, size, rank);
    assert_eq!(of(1, 7).unwrap(), [7]);
    assert_eq!(of(2, 7).unwrap(), [5, 7]);
    assert_eq!(of(3, 7).unwrap(), [7, 9, 11]);
    assert_eq!(of(4, 15).unwrap(), [9, 11, 13, 15]);
    assert_eq!(of(5, 11).unwrap(), [11, 13, 15, 17, 19]);
    assert_eq!(of(7, 13).unwrap(), [1, 3, 5, 7, 9, 11, 13]);
    assert_eq!(of(10, 3).unwrap(), all);
    for (size, rank, words) in [
        (4, 17, "leave over [17, 19]"),
        (7, 15, "leave over [15, 17, 19]"),
        (11, 1, "allowed 1 … 10"),
        (0, 1, "allowed 1 … 10"),
        (2, 2, "which is not in the group"),
    ] {
        let e = of(size, rank).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
}

/// Megatron: one grid with cp, a second one with ep over the same ranks.
#[test]
fn experts_have_a_mesh_of_their_own() {
    let dense = mesh(DEFAULT_ORDER, 2, 2, 1, 2, 2);
    let expert = dense.expert(1, 4).unwrap();
    assert_eq!(expert.sizes(), Sizes { tp: 1, cp: 1, ep: 4, dp: 2, pp: 2 });
    assert_eq!(expert.members(Axis::Ep.into(), 5).unwrap(), [4, 5, 6, 7]);
    assert_eq!(expert.members(Axis::Dp.into(), 5).unwrap(), [1, 5]);
    assert_eq!(expert.groups(Axis::Pp.into()), dense.groups(Axis::Pp.into()));
    // 3 does not divide the 8 ranks of a stage.
    assert!(dense.expert(1, 3).unwrap_err().text.contains("does not divide"));
    // With pp before dp the stages are other ranks unless dp is equal.
    let other = mesh("tp-cp-ep-pp-dp", 2, 2, 1, 2, 2);
    assert!(other.expert(2, 4).unwrap_err().text.contains("other pipeline stages"));
    assert_eq!(other.expert(1, 4).unwrap().sizes().dp, 2);
    assert_eq!(other.expert(2, 2).unwrap().sizes().dp, 2);
}

#[test]
fn what_is_wrong_with_a_mesh_is_named() {
    let one = Sizes::default();
    for (order, sizes, world, first, words) in [
        ("tp-xp", one, None, 0, "\"xp\" is no axis; axes are tp, cp, ep, dp, pp"),
        ("tp--cp", one, None, 0, "\"\" is no axis"),
        ("", one, None, 0, "\"\" is no axis"),
        ("tp-cp-tp", one, None, 0, "names tp twice"),
        ("tp-dp", Sizes { pp: 2, ..one }, None, 0, "does not name pp, whose size is 2"),
        (DEFAULT_ORDER, Sizes { cp: 2, ep: 2, ..one }, None, 0, "ep: got 2 with cp 2"),
        (DEFAULT_ORDER, Sizes { tp: 0, ..one }, None, 0, "tp: got size 0"),
        (DEFAULT_ORDER, Sizes { dp: 0, ..one }, None, 0, "give the world's size"),
        (DEFAULT_ORDER, Sizes { dp: 0, tp: 3, ..one }, Some(8), 0, "does not divide"),
        (DEFAULT_ORDER, Sizes { dp: 0, ..one }, Some(0), 0, "world size: got 0"),
        (
            DEFAULT_ORDER,
            Sizes { dp: 2, ..one },
            Some(4),
            0,
            "got 4, but tp 1 × cp 1 × ep 1 × dp 2 × pp 1 = 2",
        ),
        (
            DEFAULT_ORDER,
            Sizes { tp: u32::MAX, dp: u32::MAX, pp: u32::MAX, ..one },
            None,
            0,
            "at most 1048576",
        ),
        (DEFAULT_ORDER, one, None, u32::MAX, "at most 1048576"),
    ] {
        let e = Mesh::new(order, sizes, world, first).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
    assert_eq!(Mesh::new("TP-CP", one, None, 0).unwrap().order_text(), "tp-cp-ep-dp-pp");
    for (text, words) in
        [("tp-cq", "\"cq\" is no axis"), ("cp-cp", "names cp twice"), ("", "axes: got")]
    {
        assert!(Axes::parse(text).unwrap_err().text.contains(words), "{text}");
    }
    for (sizes, level, words) in [
        (&[4, 3][..], 0, "product 12, the group has 8"),
        (&[][..], 0, "product 1"),
        (&[4, 2][..], 2, "levels 0 … 1"),
        (&[u32::MAX, u32::MAX, u32::MAX][..], 0, "product 18446744073709551615"),
    ] {
        let eight: Vec<u32> = (0..8).collect();
        let e = level_groups(&eight, sizes, level).unwrap_err();
        assert!(e.text.contains(words), "{e}");
    }
}
