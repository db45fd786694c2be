//! The command-line tool, run as a user runs it.

use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const TOOL: &str = env!("CARGO_BIN_EXE_context-parallel");

fn tool(arguments: &str) -> Output {
    let mut command = Command::new(TOOL);
    command.args(arguments.split_whitespace()).env_remove("CP_SIMD");
    command.output().expect("the tool starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs it, wants success, and returns stdout.
fn succeeds(arguments: &str) -> String {
    let out = tool(arguments);
    assert!(
        out.status.success(),
        "{arguments}: {}\n{}{}",
        out.status,
        text(&out.stdout),
        text(&out.stderr)
    );
    text(&out.stdout)
}

/// Is it JSON? Asks Python, which every user of the JSON has.
fn is_json(what: &str, json: &str) {
    let mut python = Command::new("python3")
        .args(["-m", "json.tool"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    python.stdin.take().expect("piped").write_all(json.as_bytes()).expect("python reads");
    let out = python.wait_with_output().expect("python ends");
    assert!(out.status.success(), "{what}: {}\n{json}", text(&out.stderr));
}

/// The number after `"name":` at its n-th place.
fn number(json: &str, name: &str, place: usize) -> f64 {
    let after = json
        .split(&format!("\"{name}\":"))
        .nth(place + 1)
        .unwrap_or_else(|| panic!("no {name}: {json}"));
    let end = after.find([',', '}', ']']).expect("JSON ends");
    after[..end].parse().unwrap_or_else(|e| panic!("{name}: {e}: {}", &after[..end]))
}

/// A file in the temporary directory, removed again.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        Scratch(std::env::temp_dir().join(format!("cp-cli-{}-{name}", std::process::id())))
    }

    fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for name in [self.path(), self.path().replace(".svg", "-lanes.svg")] {
            // Was perhaps not made.
            let _ = std::fs::remove_file(name);
        }
    }
}

#[test]
fn demo_of_a_short_text_agrees_with_one_rank() {
    let file = Scratch::new("demo.txt");
    std::fs::write(
        &file.0,
        "Seven ranks, or two, make the same sums of these 70 bytes as one rank.\n",
    )
    .unwrap();
    for options in [
        "--ranks 2",
        "--ranks 3 --dtype bf16 --heads 6 --kv-heads 3 --head-dim 24",
        "--ranks 2 --seq-limit 1",
    ] {
        let out = succeeds(&format!("demo --text {} {options}", file.path()));
        let marks = out.lines().filter(|l| l.ends_with('✓')).count();
        // One rank against float64, and four against one rank.
        assert_eq!(marks, 5, "{options}:\n{out}");
        assert!(!out.contains('✗') && out.contains("All four"), "{options}:\n{out}");
        assert!(!out.contains('\x1b'), "no colours without a terminal:\n{out}");
    }
}

/// A rank that is killed is named, the others end, and nothing hangs.
#[test]
fn demo_names_a_rank_that_dies() {
    let file = Scratch::new("long.txt");
    std::fs::write(&file.0, "every byte looks back at all before it. ".repeat(600)).unwrap();
    let arguments = format!(
        "demo --ranks 2 --seq-limit 24k --heads 1 --kv-heads 1 --head-dim 8 --text {}",
        file.path()
    );
    let mut child = Command::new(TOOL)
        .args(arguments.split_whitespace())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let list = format!("/proc/{0}/task/{0}/children", child.id());
    let began = Instant::now();
    let ranks: Vec<i32> = loop {
        let found = std::fs::read_to_string(&list).unwrap_or_default();
        let found: Vec<i32> = found.split_whitespace().filter_map(|p| p.parse().ok()).collect();
        // One alone is still computing before that.
        if found.len() == 2 || began.elapsed() > Duration::from_secs(60) {
            break found;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(ranks.len(), 2, "two ranks were started");
    std::thread::sleep(Duration::from_millis(100));
    // SAFETY: a plain system call; the process is a child of our child and not yet waited for.
    assert_eq!(unsafe { libc::kill(ranks[1], libc::SIGKILL) }, 0);
    let killed = Instant::now();
    let status = child.wait().unwrap();
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    let first = errors.lines().next().unwrap_or("");
    assert!(first.contains("rank 1 ") && first.contains("SIGKILL"), "{errors}");
    assert!(killed.elapsed() < Duration::from_secs(10), "took {:?}", killed.elapsed());
    for pid in ranks {
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} stayed behind"
        );
    }
}

#[test]
fn info_is_text_and_json() {
    let out = succeeds("info");
    for word in [env!("CARGO_PKG_VERSION"), "SIMD", "shm", "CUDA", "NCCL", "MPI", "launcher"] {
        assert!(out.contains(word), "{word}:\n{out}");
    }
    let json = succeeds("info --json");
    is_json("info", &json);
    assert!(json.contains("\"backends\":[\"cpu\""), "{json}");
    let out = Command::new(TOOL)
        .args(["info", "--json"])
        .env("CP_SIMD", "scalar")
        .env("RANK", "1")
        .env("WORLD_SIZE", "2")
        .output()
        .unwrap();
    let json = text(&out.stdout);
    is_json("info", &json);
    assert!(
        json.contains("\"used\":\"scalar\"") && json.contains("\"launcher\":\"torchrun\""),
        "{json}"
    );
}

/// The table of Megatron's documents: world 16, tp 2, cp 2, dp 2, pp 2, in both orders, and its hierarchies.
#[test]
fn info_shows_who_works_with_whom() {
    let row = |out: &str, name: &str| -> String {
        let of = |l: &&str| l.split_whitespace().next() == Some(name);
        let line = out.lines().find(of).unwrap_or_else(|| panic!("no row {name}:\n{out}"));
        line.split_whitespace().find(|w| w.starts_with('[')).unwrap_or("").to_string()
    };
    let out = succeeds("info --mesh tp=2,cp=2,dp=2,pp=2");
    assert!(out.starts_with("16 ranks"), "{out}");
    assert_eq!(row(&out, "cp"), "[0,2][1,3][4,6][5,7][8,10][9,11][12,14][13,15]");
    assert_eq!(row(&out, "dp-cp"), "[0,2,4,6][1,3,5,7][8,10,12,14][9,11,13,15]");
    assert_eq!(row(&out, "tp-dp-cp"), "[0,1,2,3,4,5,6,7][8,9,10,11,12,13,14,15]");
    let out = succeeds("info --mesh tp=2,cp=2,pp=2,world=16 --order tp-cp-ep-pp-dp --experts ep=4");
    assert_eq!(row(&out, "dp-cp"), "[0,2,8,10][1,3,9,11][4,6,12,14][5,7,13,15]");
    assert_eq!(row(&out, "ep"), "[0,1,2,3][4,5,6,7][8,9,10,11][12,13,14,15]");
    let out = succeeds("info --mesh tp=2,cp=8 --levels 2,4");
    let levels: Vec<&str> = out.lines().filter(|l| l.starts_with("cp L")).collect();
    assert!(levels[0].contains("[0,2][4,6][8,10][12,14][1,3]"), "{out}");
    assert!(levels[1].contains("[0,4,8,12][2,6,10,14][1,5,9,13]"), "{out}");
    let out = succeeds("info --mesh cp=64,world=4096");
    assert!(
        row(&out, "cp").starts_with("[0,1,2")
            && out.contains("… 63]")
            && out.contains(" … 59 more"),
        "{out}"
    );
    let json = succeeds("info --mesh cp=4,dp=2 --levels 2,2 --json");
    is_json("mesh", &json);
    assert!(json.contains("\"cp L1\":[[0,2],[1,3],[4,6],[5,7]]"), "{json}");
}

#[test]
fn plan_counts_rows_against_a_ring_and_proves() {
    for (options, share) in [
        ("", 0.75),
        ("--window 4096,0", 0.0625),
        ("--window 4096,0 --partition contiguous", 0.03125),
        ("--relay", 1.0),
    ] {
        let json = succeeds(&format!("plan --cp 8 --seq 128k --json {options}"));
        let got = number(&json, "of_a_ring", 0);
        assert!((got - share).abs() < 1e-4, "{options}: {got}, not {share}");
    }
    for options in [
        "--cp 4 --seq 16",
        "--cp 5 --seq 33 --heads 6 --kv-heads 3 --comm a2a",
        "--cp 6 --seq 33 --comm a2a+p2p --inner 2 --stages 1 --mask full --window 3,5",
        "--cp 3 --cu-seqlens 0,7,7,20 --cu-seqlens-padded 0,8,10,24 --partition striped --comm all_gather",
        "--cp 3 --cu-seqlens 0,900,907,1300 --partition balanced --comm a2a+p2p --inner 3",
        "--cp 2 --lens 3,9 --seq 12 --pad left --seq-k 15 --mask causal-bottom-right",
    ] {
        let out = succeeds(&format!("plan --check {options}"));
        assert!(out.contains("✓ Proved"), "{options}:\n{out}");
        is_json(options, &succeeds(&format!("plan --json {options}")));
    }
    let picture = Scratch::new("matrix.svg");
    succeeds(&format!("plan --cp 4 --seq 64 --svg {}", picture.path()));
    for file in [picture.path(), picture.path().replace(".svg", "-lanes.svg")] {
        let svg = std::fs::read_to_string(&file).expect("the picture was written");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{file}");
    }
    let steps = succeeds("plan --cp 4 --seq 64 --rank 2 --pass backward");
    assert!(steps.contains("rank 2 of 4") && !steps.contains("rank 1 of 4"), "{steps}");
    // More memory, fewer stages.
    let stages = |cap: &str| {
        number(&succeeds(&format!("plan --cp 8 --seq 16k --memory-cap {cap} --json")), "stages", 0)
    };
    assert!(stages("1g") == 1.0 && stages("20m") > 1.0, "{} {}", stages("1g"), stages("20m"));
}

#[test]
fn perf_is_a_table_and_json() {
    let options =
        "perf --cp 2 --min-seq 64 --max-seq 128 --iters 1 --warmup 0 --heads 4 --head-dim 16";
    let out = succeeds(&format!("{options} --comm p2p,a2a"));
    let rows = |word: &str| out.lines().filter(|l| !l.starts_with('#') && l.contains(word)).count();
    assert_eq!((rows(" one rank "), rows(" p2p "), rows(" a2a ")), (2, 2, 2), "{out}");
    let json = succeeds(&format!("{options} --processes --json"));
    is_json("perf", &json);
    assert_eq!(json.matches("\"agrees\":true").count(), 10, "{json}");
    assert!(number(&json, "bytes_sent_per_rank", 2) > 0.0, "{json}");
}

#[test]
fn schedule_is_a_table_and_json() {
    let out = succeeds("schedule --lengths 60k,9000,3000,500,80 --ranks 6 --tokens-per-rank 12k");
    assert!(
        out.contains("0 … 5") && out.contains("(61440)") && out.contains("1 micro-batch,"),
        "{out}"
    );
    let json = succeeds("schedule --lengths 600,300,20 --ranks 2 --scheduler megatron --json");
    is_json("schedule", &json);
    assert!(json.contains("\"sample_id_groups\":[[[0],[1,2]]]"), "{json}");
    assert!(number(&json, "bound", 0) <= number(&json, "seconds", 0), "{json}");
}

/// The command fails if ours is ever slower than Megatron's schedule, its samples in packs or not.
#[test]
fn schedules_are_never_slower_than_megatrons() {
    let json = succeeds(
        "schedule --compare --documents tests/data/doc_length_distribution.csv --batches 25 --json",
    );
    is_json("schedule --compare", &json);
    for size in 0..6 {
        let of = |name| number(&json, name, size);
        assert!(
            of("least") >= 1.0 && of("slower") == 0.0 && of("refused_by_megatron") == 0.0,
            "{json}"
        );
        assert!(of("megatron_over_ours") > 1.1 && of("ours_over_bound") < 1.1, "{json}");
        // 10 ms are shown by the command itself; this is for disasters only.
        assert!(of("scheduling_seconds") < 0.5, "{json}");
    }
    let odd = "schedule --compare --documents tests/data/doc_length_distribution.csv --batches 5 --ranks 12";
    assert!(succeeds(odd).contains("  12  "));
}

#[test]
fn wrong_command_lines_are_named() {
    for (arguments, words) in [
        ("plam", vec!["plam", "plan"]),
        ("--cp 4", vec!["--cp", "--help"]),
        ("plan --partitoin zigzag", vec!["--partitoin", "--partition"]),
        ("plan --comm a2a+p2 --cp 4", vec!["--comm", "a2a+p2", "a2a+p2p"]),
        ("plan --seq 12x", vec!["--seq", "12x"]),
        ("plan --seq", vec!["--seq", "needs a value"]),
        ("plan --heads 6 --kv-heads 4", vec!["heads", "6", "4"]),
        ("plan --stages 9", vec!["stages", "9", "1..=3"]),
        ("plan --stages auto", vec!["--memory-cap"]),
        ("plan --memory-cap 1k --seq 64k", vec!["memory cap", "1024"]),
        ("plan --window 3", vec!["--window", "L,R"]),
        ("plan --window 3,4", vec!["--window", "causal"]),
        ("plan --slices 0:8", vec!["--slices", "0:8", "q0:q1/k0:k1"]),
        ("plan --slices @/nowhere", vec!["--slices @/nowhere"]),
        ("plan --seq 8 --slices 0:8/0:9", vec!["slices[0]", "0 … 9", "8"]),
        (
            "plan --seq 8 --slices 0:8/0:4,4:8/3:8",
            vec!["slices[0] and slices[1]", "query 7", "key 3"],
        ),
        ("plan --rank 4", vec!["--rank", "to 3"]),
        ("plan --cu-seqlens 0,9,3", vec!["--cu-seqlens", "never fall"]),
        ("plan --cu-seqlens 0,9 --seq 9", vec!["--seq", "--cu-seqlens"]),
        ("plan --seq 1m --check", vec!["--check", "at most"]),
        ("demo --ranks 1", vec!["--ranks", "2 to 64"]),
        ("demo --head-dim 12", vec!["head_dim_qk", "12", "8"]),
        ("perf --iters 0", vec!["--iters", "1 to"]),
        ("perf --seq 9 --max-seq 10", vec!["--max-seq", "--seq"]),
        ("info more", vec!["more"]),
        ("info --mesh tp=2,xp=2", vec!["--mesh", "xp", "world"]),
        ("info --mesh tp=2,tp=2", vec!["--mesh", "tp=2", "once"]),
        ("info --mesh tp=0", vec!["--mesh", "tp=0"]),
        ("info --mesh cp=2,ep=2", vec!["--mesh", "ep: got 2 with cp 2"]),
        ("info --mesh tp=3,world=8", vec!["--mesh", "does not divide"]),
        ("info --mesh cp=2 --order tp-pp", vec!["does not name cp"]),
        ("info --mesh cp=8 --levels 4,3", vec!["--levels", "product 12", "8 ranks"]),
        ("info --mesh cp=8 --experts cp=2", vec!["--experts", "ep and tp"]),
        ("info --order tp-cp", vec!["--mesh"]),
        ("schedule", vec!["--lengths", "--documents"]),
        ("schedule --lengths 3 --scheduler best", vec!["--scheduler", "best", "nested"]),
        ("schedule --lengths 3,0", vec!["lengths[1]", "got 0"]),
        ("schedule --lengths 9k --ranks 1", vec!["lengths[0]", "9216", "8192"]),
        ("schedule --lengths 3 --cost 1,2", vec!["--cost", "five numbers"]),
        ("schedule --lengths 3 --cost 1,2,3,4,x", vec!["--cost", "five numbers"]),
        ("schedule --compare", vec!["--compare", "--documents"]),
        ("rank demo2", vec!["not by hand"]),
    ] {
        let out = tool(arguments);
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{arguments}: {errors}");
        assert!(out.stdout.is_empty(), "{arguments}: {}", text(&out.stdout));
        assert_eq!(errors.lines().count(), 1, "{arguments}: {errors}");
        for word in words {
            assert!(errors.contains(word), "{arguments}: no {word:?} in {errors}");
        }
    }
    let out = Command::new(TOOL).arg("demo").env("CP_SIMD", "sse9").output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("sse9") && out.stdout.is_empty(), "{}", text(&out.stderr));
    let out = tool("demo --text /nowhere/at/all");
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("/nowhere/at/all"), "{}", text(&out.stderr));
}

#[test]
fn help_has_every_option_and_examples_that_work() {
    assert!(succeeds("--help").contains("demo") && succeeds("").contains("perf"));
    assert_eq!(
        succeeds("--version").trim(),
        format!("context-parallel {}", env!("CARGO_PKG_VERSION"))
    );
    for command in ["demo", "info", "plan", "perf", "schedule"] {
        let help = succeeds(&format!("{command} --help"));
        assert_eq!(help, succeeds(&format!("help {command}")));
        let examples = help.split("examples:\n").nth(1).expect("examples");
        assert!(examples.matches(&format!("context-parallel {command}")).count() >= 2, "{help}");
        let wide = help.lines().find(|l| l.chars().count() > 140);
        assert!(wide.is_none(), "too wide: {wide:?}");
    }
    // The examples of `plan` and `schedule` compute nothing, so all of them are tried.
    let examples = succeeds("plan --help") + &succeeds("schedule --help");
    for line in examples.lines() {
        if let Some(example) = line.strip_prefix("  context-parallel ") {
            let picture = Scratch::new("plan.svg");
            succeeds(&example.replace("plan.svg", &picture.path()));
        }
    }
}
