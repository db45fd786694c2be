//! Compiles kernels/*.cu for GPUs where an nvcc is found, and lists the results for src/backend/cuda/image.rs; link settings of the C
//! library. Environment:
//!
//! | variable | meaning |
//! |---|---|
//! | `CP_CUDA` | `auto` (default): with kernels if there is an nvcc; `require`: fail without one; `off`: no kernels |
//! | `CP_CUDA_ARCHS` | some of 80, 90, 100, 120 and ptx, separated by commas (default: all): less to compile, runs on fewer GPUs |
//! | `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `VIRTUAL_ENV`, `PATH` | where nvcc is looked for, see [`find_nvcc`] |
//!
//! nvcc takes minutes where rustc takes seconds. Fatbins are therefore kept in `cuda-cache` in the target folder, which all profiles
//! share, under a hash of everything that they depend on.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// Real architectures, and `ptx`: PTX for compute_80, which every later GPU can compile for itself.
const ARCHS: [&str; 5] = ["80", "90", "100", "120", "ptx"];
/// Kernels that need over 99 KB of shared memory are in files *_big.cu, their replacements in *_small.cu. Machine code for sm_80 also runs
/// on sm_86 and sm_89, which have 99 KB.
const BIG: [&str; 3] = ["80", "90", "100"];
const SMALL: [&str; 3] = ["80", "120", "ptx"];
/// The first CUDA whose compiler knows all of them.
const OLDEST_CUDA: (u32, u32) = (12, 8);
/// No warning is left; ptxas says what each kernel uses, which also names the kernels.
const FLAGS: [&str; 8] = [
    "--fatbin",
    "-std=c++17",
    "-O3",
    "--compress-mode=size",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v",
];

struct Nvcc {
    path: PathBuf,
    version: String,
}

/// One kernels/*.cu, compiled.
struct Image {
    name: String,
    file: PathBuf,
    archs: Vec<&'static str>,
    kernels: BTreeSet<String>,
}

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in
        ["CP_CUDA", "CP_CUDA_ARCHS", "NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PATH"]
    {
        println!("cargo:rerun-if-env-changed={name}");
    }
    // Threads and their thread-local data outlive a dlclose, so the library stays mapped.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    if let Err(why) = kernels() {
        eprintln!("context_parallel: {why}");
        std::process::exit(1);
    }
}

fn kernels() -> Result<()> {
    let mode = variable("CP_CUDA").unwrap_or("auto".into());
    let found = match mode.as_str() {
        "off" => None,
        "auto" | "require" => match find_nvcc() {
            Ok(nvcc) => Some(nvcc),
            Err(Missing::Wrong(why)) => return Err(why),
            Err(Missing::Absent(why)) if mode == "require" => {
                return Err(format!(
                    "CP_CUDA=require: {why}. kernels/setup installs an nvcc into .venv/cuda (no GPU or driver is needed); CP_CUDA=off builds for CPUs only"
                ));
            }
            Err(Missing::Absent(why)) => {
                println!(
                    "cargo:warning=built without CUDA kernels: {why} (kernels/setup installs an nvcc; CP_CUDA=off silences this)"
                );
                None
            }
        },
        other => return Err(format!("CP_CUDA: got \"{other}\", allowed auto, require, off")),
    };
    let images = match &found {
        Some(nvcc) => {
            println!("cargo:rerun-if-changed={}", nvcc.path.display());
            compile_all(nvcc, &wanted_archs()?)?
        }
        None => Vec::new(),
    };
    let list = out_dir().join("cuda_images.rs");
    write(&list, listing(found.as_ref(), &images).as_bytes())
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|v| !v.is_empty())
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|e| format!("{}: {e}", path.display()))
}

fn wanted_archs() -> Result<Vec<&'static str>> {
    let Some(list) = variable("CP_CUDA_ARCHS") else { return Ok(ARCHS.to_vec()) };
    let mut wanted = Vec::new();
    for word in list.split(',').map(str::trim) {
        match ARCHS.into_iter().find(|a| *a == word) {
            Some(arch) => wanted.push(arch),
            None => {
                return Err(format!(
                    "CP_CUDA_ARCHS={list}: got \"{word}\", allowed {} with commas between them",
                    ARCHS.join(", ")
                ));
            }
        }
    }
    Ok(wanted)
}

// Finding nvcc

/// Why there is no nvcc: none was found, or what the caller named is none.
enum Missing {
    Absent(String),
    Wrong(String),
}

/// `$NVCC`; `$CUDA_HOME` or `$CUDA_PATH`; NVIDIA's wheels in `$VIRTUAL_ENV` or in the project's own .venv/cuda; `PATH`; /usr/local/cuda.
fn find_nvcc() -> std::result::Result<Nvcc, Missing> {
    if let Some(named) = variable("NVCC") {
        let path = PathBuf::from(&named);
        return version_of(path).map_err(|why| Missing::Wrong(format!("NVCC={named}: {why}")));
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let mut candidates: Vec<PathBuf> = Vec::new();
    candidates.extend(
        ["CUDA_HOME", "CUDA_PATH"]
            .iter()
            .filter_map(|v| variable(v))
            .map(|dir| Path::new(&dir).join("bin/nvcc")),
    );
    candidates.extend(variable("VIRTUAL_ENV").and_then(|dir| in_wheels(Path::new(&dir))));
    candidates.extend(in_wheels(&root.join(".venv/cuda")));
    let path = env::var_os("PATH").unwrap_or_default();
    candidates.extend(env::split_paths(&path).map(|dir| dir.join("nvcc")));
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    match candidates.into_iter().find(|c| c.is_file()) {
        Some(path) => version_of(path).map_err(Missing::Absent),
        None => Err(Missing::Absent(
            "no nvcc in NVCC, CUDA_HOME, CUDA_PATH, VIRTUAL_ENV, .venv/cuda, PATH, /usr/local/cuda"
                .into(),
        )),
    }
}

/// nvcc as the Python wheels install it.
fn in_wheels(venv: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(venv.join("lib")).ok()?.flatten();
    pythons.map(|p| p.path().join("site-packages/nvidia/cu13/bin/nvcc")).find(|p| p.is_file())
}

/// Resolves links, beside which nvcc would look for its headers in vain, and asks for the version.
fn version_of(path: PathBuf) -> Result<Nvcc> {
    let path = fs::canonicalize(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let output = Command::new(&path).arg("--version").output();
    let output = output.map_err(|e| format!("{}: {e}", path.display()))?;
    // "Cuda compilation tools, release 13.0, V13.0.88"
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split(", V").nth(1).and_then(|v| v.split_whitespace().next());
    let version = version.ok_or(format!("{} --version names no version", path.display()))?;
    let mut numbers = version.split('.').map(|n| n.parse().unwrap_or(0));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if (major, minor) < OLDEST_CUDA {
        return Err(format!(
            "{} is CUDA {version}, needed {}.{} or later",
            path.display(),
            OLDEST_CUDA.0,
            OLDEST_CUDA.1
        ));
    }
    Ok(Nvcc { path, version: version.into() })
}

// Compiling

/// Every kernels/*.cu for which an architecture is wanted, as many at a time as cargo has jobs.
fn compile_all(nvcc: &Nvcc, wanted: &[&'static str]) -> Result<Vec<Image>> {
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let out = out_dir();
    let target = out.ancestors().nth(4).ok_or(format!("OUT_DIR={}: too short", out.display()))?;
    let cache = target.join("cuda-cache");
    fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;

    let folder = fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))?;
    let mut sources: Vec<PathBuf> = folder.flatten().map(|e| e.path()).collect();
    sources.retain(|s| s.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let work = Mutex::new(sources.into_iter());
    let done = Mutex::new(Vec::new());
    let jobs = variable("NUM_JOBS").and_then(|n| n.parse().ok()).unwrap_or(2);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = work.lock().unwrap().next();
                    let Some(source) = next else { break };
                    let image = compile(nvcc, &source, wanted, &cache);
                    done.lock().unwrap().push((source, image));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by(|(a, _), (b, _)| a.cmp(b));
    let images: Result<Vec<Option<Image>>> = done.into_iter().map(|(_, image)| image).collect();
    Ok(images?.into_iter().flatten().collect())
}

/// One source file, from the cache if nothing changed; `None` if it has code for no architecture that is wanted.
fn compile(
    nvcc: &Nvcc,
    source: &Path,
    wanted: &[&'static str],
    cache: &Path,
) -> Result<Option<Image>> {
    let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut archs = wanted.to_vec();
    if name.ends_with("_big") {
        archs.retain(|a| BIG.contains(a));
    } else if name.ends_with("_small") {
        archs.retain(|a| SMALL.contains(a));
    }
    // PTX goes with machine code: ptxas, which names the kernels, makes only that.
    if archs.iter().all(|a| *a == "ptx") {
        return Ok(None);
    }
    let mut options: Vec<String> = FLAGS.map(String::from).to_vec();
    for arch in &archs {
        options.push("-gencode".into());
        options.push(match *arch {
            "ptx" => "arch=compute_80,code=compute_80".into(),
            sm => format!("arch=compute_{sm},code=sm_{sm}"),
        });
    }

    let mut hash = DefaultHasher::new();
    (&nvcc.version, &options).hash(&mut hash);
    let mut files = BTreeSet::new();
    included(source, &mut files);
    for file in files {
        (&file, fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?).hash(&mut hash);
    }
    let key = format!("{name}-{:016x}", hash.finish());
    let (fatbin, log) = (cache.join(format!("{key}.fatbin")), cache.join(format!("{key}.log")));
    if !(fatbin.is_file() && log.is_file()) {
        // Another build may be at it: each writes its own file and renames it, the fatbin last.
        let mine = cache.join(format!("{key}.{}", std::process::id()));
        let run = Command::new(&nvcc.path).args(&options).arg("-o").arg(&mine).arg(source).output();
        let run = run.map_err(|e| format!("{}: {e}", nvcc.path.display()))?;
        let text = String::from_utf8_lossy(&run.stderr).into_owned();
        if !run.status.success() {
            let said: Vec<&str> = text.lines().filter(|l| !l.starts_with("ptxas info")).collect();
            return Err(format!(
                "nvcc {} could not compile {} ({}):\n{}",
                nvcc.version,
                source.display(),
                run.status,
                said.join("\n")
            ));
        }
        write(&log, text.as_bytes())?;
        fs::rename(&mine, &fatbin).map_err(|e| format!("{}: {e}", fatbin.display()))?;
    }
    let file = out_dir().join(format!("{name}.fatbin"));
    fs::copy(&fatbin, &file).map_err(|e| format!("{}: {e}", file.display()))?;
    let log = fs::read_to_string(&log).map_err(|e| format!("{}: {e}", log.display()))?;
    Ok(Some(Image { name, file, archs, kernels: entries(&log) }))
}

/// A source file and what it includes by `#include "…"`, of those beside it.
fn included(file: &Path, seen: &mut BTreeSet<PathBuf>) {
    if !file.is_file() || !seen.insert(file.to_path_buf()) {
        return;
    }
    for line in fs::read_to_string(file).unwrap_or_default().lines() {
        let rest = line.trim_start().strip_prefix('#').map(str::trim_start);
        let quoted = rest.and_then(|r| r.strip_prefix("include")).and_then(|r| r.split('"').nth(1));
        if let Some(name) = quoted {
            included(&file.with_file_name(name), seen);
        }
    }
}

/// Kernels named in ptxas's log: `Compiling entry function 'cp_delta' for 'sm_80'`.
fn entries(log: &str) -> BTreeSet<String> {
    let parts = log.split("Compiling entry function '").skip(1);
    parts.filter_map(|part| part.split('\'').next()).map(String::from).collect()
}

/// The Rust file that src/backend/cuda/image.rs includes.
fn listing(nvcc: Option<&Nvcc>, images: &[Image]) -> String {
    let version = nvcc.map(|n| n.version.as_str());
    let mut text = format!("pub const NVCC: Option<&str> = {version:?};\n");
    for (i, image) in images.iter().enumerate() {
        let file = &image.file;
        text += &format!(
            "#[unsafe(link_section = \".nv_fatbin\")]\nstatic BYTES_{i}: Aligned<[u8; include_bytes!({file:?}).len()]> = Aligned(*include_bytes!({file:?}));\n"
        );
    }
    text += "pub static IMAGES: &[Image] = &[\n";
    for (i, Image { name, archs, kernels, .. }) in images.iter().enumerate() {
        let kernels: Vec<&String> = kernels.iter().collect();
        text += &format!(
            "    Image {{ name: {name:?}, archs: &{archs:?}, kernels: &{kernels:?}, bytes: &BYTES_{i}.0 }},\n"
        );
    }
    text + "];\n"
}
