//! The committed header and symbol list are what the sources say. `CP_BLESS=1` rewrites them.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn compare(path: &str, fresh: &str) {
    let path = root().join(path);
    if std::env::var_os("CP_BLESS").is_some() {
        std::fs::write(&path, fresh).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((line, (a, b))) =
        committed.lines().zip(fresh.lines()).enumerate().find(|(_, (a, b))| a != b)
    {
        panic!(
            "{} line {}: committed\n  {a}\nfresh\n  {b}\nrun the test with CP_BLESS=1",
            path.display(),
            line + 1
        );
    }
    assert_eq!(
        committed.lines().count(),
        fresh.lines().count(),
        "{}: run the test with CP_BLESS=1",
        path.display()
    );
}

#[test]
fn header_is_what_cbindgen_makes() {
    let config = cbindgen::Config::from_file(root().join("include/cbindgen.toml")).unwrap();
    // Parsing file by file in lifecycle order, instead of the crate, keeps the header in that order and needs no cargo at test time.
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in [
        "capi/abi.rs",
        "capi/abi_mesh.rs",
        "capi/abi_schedule.rs",
        "transport/user.rs",
        "capi/abi_rows.rs",
        "capi/abi_trade.rs",
        "capi/about.rs",
        "capi/group.rs",
        "capi/partition.rs",
        "capi/rows.rs",
        "capi/collect.rs",
        "capi/mesh.rs",
        "capi/padding.rs",
        "capi/schedule.rs",
        "capi/trade.rs",
        "capi/attention.rs",
    ] {
        builder = builder.with_src(root().join("src").join(file));
    }
    let mut fresh = Vec::new();
    builder.generate().unwrap().write(&mut fresh);
    // rustdoc's heading for what a caller of an unsafe function must see to.
    let fresh = String::from_utf8(fresh).unwrap().replace("// # Safety\n", "// Requires:\n");
    compare("include/context_parallel.h", &fresh);
}
