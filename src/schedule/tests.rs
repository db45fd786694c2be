//! Megatron's schedulers against what Megatron assigned.

use super::megatron::{balanced, dp_balanced};
use super::*;

/// `COUNTxIDS …; …` as in the fixtures.
fn text(made: &Schedule, batch: &Batch) -> String {
    let mut out = String::new();
    for group in made.sample_id_groups(batch.lengths, batch.ranks) {
        let runs = group.chunk_by(|a, b| a == b).map(|run| {
            let ids: Vec<String> = run[0].iter().map(u32::to_string).collect();
            format!("{}x{}", run.len(), ids.join(","))
        });
        out += &format!(
            "{}{}",
            if out.is_empty() { "" } else { " ; " },
            runs.collect::<Vec<_>>().join(" ")
        );
    }
    out
}

fn numbers(field: &str) -> Vec<u32> {
    field.split_whitespace().map(|w| w.parse().expect("a number")).collect()
}

#[test]
fn megatron_assigns_what_megatron_assigns() {
    let file = include_str!("../../tests/data/megatron_schedules.txt");
    let mut counts = HashMap::new();
    for line in file.lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<&str> = line.split('|').map(str::trim).collect();
        let (name, rest) = fields[0].split_once(' ').expect("a name");
        let (lengths, n) = (numbers(fields[1]), numbers(rest));
        let batch = Batch { lengths: &lengths, ranks: n[0], tokens_per_rank: n[1] };
        let made = match name {
            "balanced" => balanced(&batch),
            "dynamic" => dynamic::dynamic(&batch, n[2]),
            _ => dp_balanced(&batch, n[2]),
        };
        *counts.entry((name, fields[2] == "refused")).or_insert(0) += 1;
        let Ok(made) = made else {
            assert_eq!(fields[2], "refused", "{line}\n{made:?}");
            continue;
        };
        made.check(&batch).unwrap_or_else(|e| panic!("{line}\n{e}"));
        let mut wanted = fields[2].to_string();
        if name == "dp_balanced" {
            // The order inside a pack means nothing; it keeps the samples' own, ours is the longest first.
            let sorted = wanted.split(' ').map(|run| match run.split_once('x') {
                None => run.to_string(),
                Some((count, ids)) => {
                    let mut ids: Vec<u32> =
                        ids.split(',').map(|i| i.parse().expect("an id")).collect();
                    ids.sort_by_key(|&i| (std::cmp::Reverse(lengths[i as usize]), i));
                    format!(
                        "{count}x{}",
                        ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
                    )
                }
            });
            wanted = sorted.collect::<Vec<_>>().join(" ");
        }
        assert_eq!(text(&made, &batch), wanted, "{line}");
    }
    assert!(
        ["balanced", "dynamic", "dp_balanced"].iter().all(|&name| counts[&(name, false)] >= 20)
    );
    assert!(["balanced", "dynamic", "dp_balanced"].iter().all(|&name| counts[&(name, true)] >= 1));
}
