//! The shape of the source tree, asserted.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// Hand-written files of these kinds under the project's own folders.
fn files(folders: &[&str], kinds: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = folders.iter().map(|f| root().join(f)).collect();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if path.extension().is_some_and(|e| kinds.iter().any(|k| e == *k)) {
            found.push(path);
        }
    }
    assert!(!found.is_empty());
    found
}

/// The room of a source file: the first part of its path below `src`.
fn room(path: &Path) -> String {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_string()
}

/// Rooms that a source file imports, unit tests apart.
fn imports(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let mut rooms = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let line = code[..at].rsplit('\n').next().unwrap().trim_start();
        if line.starts_with("//") {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        // `use crate::{a, b::c};` or `crate::a::…`
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap().split(',').collect(),
            None => vec![rest],
        };
        for name in names {
            let name: String =
                name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            rooms.insert(name);
        }
    }
    rooms
}

/// design: partition ← mask ← regions ← problem ← balance ← holding ← plan ← exec ← group ← attention ← capi. Each room names all that it may import.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("dtype", &[]),
    ("mask", &["partition"]),
    ("partition", &[]),
    ("score", &["error"]),
    ("regions", &["error", "mask", "partition"]),
    ("problem", &["dtype", "error", "mask", "partition", "regions", "score"]),
    ("balance", &["partition", "problem"]),
    ("holding", &["balance", "partition", "problem"]),
    ("rows", &["holding", "partition", "problem"]),
    ("loss", &["error", "partition", "problem", "rows"]),
    ("mesh", &["error"]),
    ("layers", &["error", "problem"]),
    ("padding", &["error"]),
    // Of `backend` the plan uses plain data only: `HeadMap` and `Run`.
    (
        "plan",
        &[
            "backend",
            "dtype",
            "error",
            "holding",
            "mask",
            "partition",
            "problem",
            "regions",
            "score",
        ],
    ),
    ("schedule", &["error"]),
    ("driver", &["error"]),
    ("backend", &["driver", "dtype", "error", "mask", "partition", "score"]),
    ("transport", &["driver", "error"]),
    (
        "exec",
        &["backend", "driver", "dtype", "error", "mask", "plan", "problem", "score", "transport"],
    ),
    ("group", &["driver", "error", "exec", "plan", "problem", "transport"]),
    (
        "attention",
        &[
            "backend",
            "balance",
            "driver",
            "dtype",
            "error",
            "exec",
            "group",
            "holding",
            "mask",
            "partition",
            "plan",
            "problem",
            "regions",
            "score",
        ],
    ),
    (
        "trade",
        &[
            "attention",
            "backend",
            "balance",
            "driver",
            "dtype",
            "error",
            "exec",
            "group",
            "holding",
            "partition",
            "plan",
            "problem",
        ],
    ),
    (
        "collect",
        &["error", "exec", "group", "holding", "partition", "problem", "rows", "transport"],
    ),
    (
        "capi",
        &[
            "attention",
            "backend",
            "balance",
            "collect",
            "driver",
            "dtype",
            "error",
            "group",
            "holding",
            "layers",
            "loss",
            "mask",
            "mesh",
            "padding",
            "partition",
            "plan",
            "problem",
            "regions",
            "rows",
            "schedule",
            "score",
            "trade",
            "transport",
        ],
    ),
    ("lib", &[]),
];

#[test]
fn imports_run_one_way() {
    for file in files(&["src"], &["rs"]) {
        let room = room(&file);
        // Programs and unit tests sit on top of everything.
        if room == "bin" || file.ends_with("tests.rs") {
            continue;
        }
        let (_, allowed) = MAY_IMPORT
            .iter()
            .find(|(r, _)| *r == room)
            .unwrap_or_else(|| panic!("{room}: a new room; name what it may import"));
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            assert!(
                import == room || allowed.contains(&import.as_str()),
                "{} imports {import}",
                file.display()
            );
        }
    }
}

/// What the plan takes from the backend is data, not kernels.
#[test]
fn plans_know_no_kernels() {
    for file in files(&["src/plan"], &["rs"]) {
        let text = fs::read_to_string(&file).unwrap();
        for word in ["backend::cpu", "Transport", "*mut", "*const", "unsafe"] {
            assert!(!text.contains(word), "{} says {word}", file.display());
        }
    }
}

#[test]
fn the_executor_names_no_algorithm() {
    let text: String =
        files(&["src/exec"], &["rs"]).iter().map(|f| fs::read_to_string(f).unwrap()).collect();
    let text = text.to_lowercase();
    for word in [
        "p2p",
        "ring",
        "all_gather",
        "allgather",
        "a2a",
        "ulysses",
        "zigzag",
        "causal",
        "window",
        "commtype",
        "relay",
    ] {
        // "string" is no ring.
        let found = text
            .match_indices(word)
            .any(|(at, _)| !text[..at].ends_with(|c: char| c.is_alphanumeric()));
        assert!(!found, "src/exec says {word}");
    }
}

#[test]
fn no_file_is_too_long() {
    for file in
        files(&["src", "bindings", "tests", "include"], &["rs", "c", "h", "hpp", "cpp", "py", "sh"])
    {
        let generated = file.ends_with("include/context_parallel.h");
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(generated || lines <= 900, "{}: {lines} lines", file.display());
    }
}

/// No exported function without the guard that turns panics into a status. The exceptions cannot panic and return no status.
#[test]
fn exported_functions_are_guarded() {
    let unguarded =
        ["cp_version", "cp_build_info", "cp_status_string", "cp_last_error", "cp_last_error_copy"];
    let mut count = 0;
    for file in files(&["src/capi"], &["rs"]) {
        let text = fs::read_to_string(&file).unwrap();
        for part in text.split("#[unsafe(no_mangle)]").skip(1) {
            let name = part.split("fn ").nth(1).unwrap().split('(').next().unwrap();
            let body = &part[part.find('{').unwrap()..];
            assert!(
                body.trim_start_matches('{').trim_start().starts_with("guard(")
                    || unguarded.contains(&name),
                "{name} has no guard"
            );
            count += 1;
        }
    }
    assert!(count > 20, "found only {count} exported functions");
}

/// The README's examples are those that the tests run, and its table is a plan's.
#[test]
fn the_readme_shows_what_is_tested() {
    let read = |path: &str| {
        fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    let readme = read("README.md");
    // Blocks of a language, in order.
    let blocks = |language: &str| -> Vec<&str> {
        let fence = format!("```{language}\n");
        readme.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
    };
    let examples = ["bindings/python/example.py", "bindings/python/example_cuda.py"];
    let shown = blocks("python");
    assert_eq!(shown.len(), examples.len());
    for (path, block) in examples.iter().zip(shown) {
        assert!(read(path).contains(block), "the README's Python example is not in {path}");
    }
    let programs = ["tests/c/example_mpi.c", "tests/c/example_cuda.c"];
    let shown = blocks("c");
    assert_eq!(shown.len(), programs.len());
    for (path, block) in programs.iter().zip(shown) {
        let program = read(path);
        for line in block.lines().filter(|l| !l.starts_with("/* attend:")) {
            assert!(
                program.contains(line.trim()),
                "the README has a line that {path} has not: {line}"
            );
        }
    }
    let table = blocks("text")[0];
    assert!(read("tests/data/snapshots/p2p-causal.txt").starts_with(table.trim_end()));
}
