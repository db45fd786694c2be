//! JSON of plans, read back with a parser of a page.

use crate::plans::problem;
use crate::plans_random::{Random, any_problem};
use context_parallel::plan::account::account;
use context_parallel::plan::json::json;
use context_parallel::plan::{Lane, Op, Options, Pass, Plan};
use context_parallel::problem::{CommType, Problem};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, PartialEq)]
enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    /// Parses all of a text, or panics where it is not JSON.
    fn parse(text: &str) -> Json {
        let mut rest = text;
        let value = Json::value(&mut rest);
        assert!(rest.trim().is_empty(), "left over: {rest}");
        value
    }

    fn value(rest: &mut &str) -> Json {
        *rest = rest.trim_start();
        let first = rest.chars().next().expect("a value");
        match first {
            '{' => {
                let mut out = BTreeMap::new();
                Json::items(rest, '}', |rest| {
                    let Json::Text(name) = Json::value(rest) else { panic!("a name: {rest}") };
                    *rest = rest.trim_start().strip_prefix(':').expect("a colon");
                    assert!(out.insert(name, Json::value(rest)).is_none(), "a name twice");
                });
                Json::Object(out)
            }
            '[' => {
                let mut out = Vec::new();
                Json::items(rest, ']', |rest| out.push(Json::value(rest)));
                Json::List(out)
            }
            '"' => {
                let end = rest[1..].find('"').expect("an end of text");
                let text = rest[1..=end].to_string();
                assert!(!text.contains(['\\', '\n']));
                *rest = &rest[end + 2..];
                Json::Text(text)
            }
            _ => {
                let end = rest.find([',', ']', '}']).unwrap_or(rest.len());
                let word = rest[..end].trim();
                *rest = &rest[end..];
                match word {
                    "null" => Json::Null,
                    "true" => Json::Bool(true),
                    "false" => Json::Bool(false),
                    _ => Json::Number(word.parse().unwrap_or_else(|_| panic!("{word}"))),
                }
            }
        }
    }

    fn items(rest: &mut &str, end: char, mut item: impl FnMut(&mut &str)) {
        *rest = rest[1..].trim_start();
        while !rest.starts_with(end) {
            item(rest);
            *rest = rest.trim_start();
            if let Some(more) = rest.strip_prefix(',') {
                *rest = more.trim_start();
                assert!(!rest.starts_with(end), "nothing after a comma");
            } else {
                assert!(rest.starts_with(end), "neither comma nor {end}: {rest}");
            }
        }
        *rest = &rest[1..];
    }

    fn get(&self, name: &str) -> &Json {
        let Json::Object(fields) = self else { panic!("{self:?} is no object") };
        fields.get(name).unwrap_or_else(|| panic!("no {name} in {fields:?}"))
    }

    fn list(&self) -> &[Json] {
        let Json::List(items) = self else { panic!("{self:?} is no list") };
        items
    }

    fn number(&self) -> u64 {
        let Json::Number(n) = self else { panic!("{self:?} is no number") };
        *n as u64
    }

    fn text(&self) -> &str {
        let Json::Text(text) = self else { panic!("{self:?} is no text") };
        text
    }

    fn numbers(&self) -> Vec<i64> {
        let number = |n: &Json| match n {
            Json::Number(n) => *n as i64,
            _ => panic!("{n:?} is no number"),
        };
        self.list().iter().map(number).collect()
    }
}

/// What is in the JSON is what is in the plans, and sums to the account.
fn read_back(p: &Problem, options: Options) {
    let p = Arc::new(p.clone());
    for pass in [Pass::Forward, Pass::Backward] {
        let plans = Plan::all(&p, pass, options);
        let read = Json::parse(&json(&plans));
        let problem = read.get("problem");
        assert_eq!(problem.get("ranks").number(), u64::from(p.ranks));
        assert_eq!(problem.get("sequences").list().len(), p.seqs.len());
        assert_eq!(problem.get("fingerprint").text(), format!("{:016x}", p.fingerprint()));
        assert_eq!(read.get("plans").list().len(), plans.len());
        for (plan, got) in plans.iter().zip(read.get("plans").list()) {
            let slots: Vec<&str> =
                got.get("slots").list().iter().map(|s| s.get("name").text()).collect();
            let want: Vec<String> = plan.slots.iter().map(|s| format!("{:?}", s.slot)).collect();
            assert_eq!(slots, want);
            let a = account(plan);
            let cost = got.get("account");
            assert_eq!(cost.get("flops").number(), a.flops);
            assert_eq!(cost.get("latent_flops").number(), a.latent_flops);
            assert_eq!(cost.get("workspace").number(), a.workspace);
            let mut received = 0;
            assert_eq!(got.get("steps").list().len(), plan.steps.len());
            for (step, got) in plan.steps.iter().zip(got.get("steps").list()) {
                let lane = if step.lane == Lane::Comm { "comm" } else { "compute" };
                assert_eq!(got.get("lane").text(), lane);
                let waits: Vec<i64> = step.waits.iter().map(|e| i64::from(*e)).collect();
                assert_eq!(got.get("waits").numbers(), waits);
                match &step.op {
                    Op::Exchange { sends, recvs } => {
                        assert_eq!(got.get("sends").list().len(), sends.len());
                        for (m, got) in recvs.iter().zip(got.get("recvs").list()) {
                            assert_eq!(got.get("peer").number(), u64::from(m.peer));
                            assert!(slots.contains(&got.get("slot").text()));
                            received += got.get("bytes").number();
                            let rows = got.get("rows").list().iter().map(|r| r.numbers()[2]);
                            assert_eq!(rows.sum::<i64>(), i64::from(m.count()));
                        }
                    }
                    Op::Attend { slices, .. } | Op::AttendBackward { slices, .. } => {
                        for (s, got) in slices.iter().zip(got.get("slices").list()) {
                            let want = [s.q, s.q_len, s.k, s.k_len].map(i64::from);
                            assert_eq!(got.numbers()[..4], want);
                            assert_eq!(got.numbers()[4..], [s.lo, s.hi].map(i64::from));
                        }
                    }
                    Op::Copy { runs, .. } => {
                        assert_eq!(got.get("runs").list().len(), runs.len());
                    }
                    Op::SinkTerms => assert_eq!(got.get("op").text(), "sink_terms"),
                    Op::Reduce { dst, dst_row, .. } => {
                        assert_eq!(got.get("dst").text(), format!("{dst:?}"));
                        assert_eq!(got.get("dst_row").number(), u64::from(*dst_row));
                    }
                    Op::Expand { k: slot, rows, .. } | Op::Contract { dk: slot, rows, .. } => {
                        let expands = matches!(step.op, Op::Expand { .. });
                        let (op, name) = if expands { ("expand", "k") } else { ("contract", "dk") };
                        assert_eq!(got.get("op").text(), op);
                        assert_eq!(got.get(name).text(), format!("{slot:?}"));
                        assert_eq!(got.get("rows").list().len(), rows.len());
                    }
                    Op::Delta => assert_eq!(got.get("op").text(), "delta"),
                    Op::Fill { .. } => assert_eq!(got.get("op").text(), "fill"),
                }
            }
            assert_eq!(received, a.received);
        }
    }
}

#[test]
fn json_says_what_plans_say() {
    let plain = Options::default();
    read_back(&problem(4, CommType::P2p, 0, 33, 4, 2), plain);
    read_back(&problem(6, CommType::A2aP2p, 3, 33, 6, 3), Options { saved: true, ..plain });
    for case in 0..20 {
        read_back(&any_problem(&mut Random::new(case)), plain);
    }
}
