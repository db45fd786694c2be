//! What this machine has, and where it was looked for.

use crate::args::{Failure, usage};
use crate::json::{Object, array, string};
use context_parallel::backend::cpu::Simd;
use std::ffi::{CStr, CString};
use std::path::PathBuf;

/// Cores that this process may use.
pub fn cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

/// The instruction set in use; refuses a wrong `CP_SIMD`.
pub fn simd() -> Result<Simd, Failure> {
    Simd::from_env().map_err(|e| usage(e.text))
}

/// The instruction set in use, as people write it.
pub fn simd_name() -> &'static str {
    match Simd::from_env().unwrap_or(Simd::Scalar) {
        Simd::Scalar => "no SIMD",
        Simd::Avx2 => "AVX2",
        Simd::Avx512 => "AVX-512",
        Simd::Avx512Bf16 => "AVX-512 with bf16",
    }
}

/// The processor's name, as the kernel has it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("model name"));
    line.and_then(|l| l.split_once(':')).map_or("unknown".into(), |(_, name)| name.trim().into())
}

/// A shared library that was looked for.
pub struct Library {
    pub name: &'static str,
    /// Where it was found: the file's path, as the loader says.
    pub found: Option<String>,
    /// What was tried, in order, and what came of it.
    pub tried: Vec<(String, String)>,
}

impl Library {
    /// Looks for a library as the library itself does: first `variable`, then the loader's own places, then where CUDA installs.
    pub fn find(name: &'static str, variable: Option<&str>, more: &[&str]) -> Library {
        let mut candidates: Vec<(String, String)> = Vec::new();
        if let Some(value) = variable.and_then(|v| std::env::var(v).ok()).filter(|v| !v.is_empty())
        {
            candidates.push((format!("{}={value}", variable.unwrap_or("")), value));
        }
        candidates.push((format!("the loader ({})", loader_places()), name.into()));
        candidates
            .extend(more.iter().map(|dir| (format!("{dir}/{name}"), format!("{dir}/{name}"))));
        let mut library = Library { name, found: None, tried: Vec::new() };
        for (place, path) in candidates {
            match open(&path) {
                Ok(at) => {
                    library.tried.push((place, format!("found {at}")));
                    library.found = Some(at);
                    break;
                }
                Err(why) => library.tried.push((place, why)),
            }
        }
        library
    }

    pub fn json(&self) -> String {
        let tried = self.tried.iter().map(|(place, result)| {
            Object::default().text("place", place).text("result", result).end()
        });
        Object::default().maybe("found", self.found.as_deref()).raw("tried", array(tried)).end()
    }
}

/// Where `dlopen` of a bare name looks.
fn loader_places() -> String {
    match std::env::var("LD_LIBRARY_PATH").ok().filter(|v| !v.is_empty()) {
        Some(path) => format!("LD_LIBRARY_PATH={path}, then the system's cache and directories"),
        None => "LD_LIBRARY_PATH is not set; the system's cache and directories".into(),
    }
}

/// Opens and closes a library; its path, or why not.
fn open(name: &str) -> Result<String, String> {
    let Ok(c_name) = CString::new(name) else { return Err("not a name".into()) };
    // SAFETY: a live string. Loading runs the library's initialisers, as any use of it would.
    let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if handle.is_null() {
        // SAFETY: after a failed dlopen this is a string, which lives until the thread's next call.
        let text = unsafe { libc::dlerror() };
        if text.is_null() {
            return Err("cannot be opened".into());
        }
        // SAFETY: as just said.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        let missing = text.contains("No such file");
        return Err(if missing { "not there".into() } else { text });
    }
    let at = mapped_at(name);
    // SAFETY: a handle that was just opened.
    unsafe { libc::dlclose(handle) };
    Ok(at)
}

/// The file that is mapped under this name.
fn mapped_at(name: &str) -> String {
    let file = name.rsplit('/').next().unwrap_or(name);
    let stem = file.split(".so").next().unwrap_or(file);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = |line: &str| line.split_whitespace().nth(5).map(String::from);
    let fits = |path: &String| path.rsplit('/').next().is_some_and(|f| f.starts_with(stem));
    maps.lines().filter_map(path).find(fits).unwrap_or_else(|| name.into())
}

/// The first program of this name on `PATH`.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let runs = |file: &PathBuf| {
        use std::os::unix::fs::PermissionsExt;
        file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(runs)
}

/// The launcher whose variables are set, and those variables.
pub fn launcher() -> (Option<&'static str>, Vec<(String, String)>) {
    let names = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PMI_RANK",
        "PMI_SIZE",
    ];
    let mine = |name: &str| {
        names.contains(&name)
            || name.starts_with("OMPI_COMM_WORLD_")
            || name.starts_with("PMIX_RANK")
    };
    let mut seen: Vec<(String, String)> = std::env::vars_os()
        .map(|(n, v)| (n.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()))
        .filter(|(name, _)| mine(name))
        .collect();
    seen.sort();
    let set = |name: &str| seen.iter().any(|(n, _)| n == name);
    let who = [
        ("RANK", "WORLD_SIZE", "torchrun"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI"),
        ("PMI_RANK", "PMI_SIZE", "MPICH"),
    ];
    (who.into_iter().find(|(rank, size, _)| set(rank) && set(size)).map(|(.., name)| name), seen)
}

/// Pairs as an object.
pub fn pairs(list: &[(String, String)]) -> String {
    let members: Vec<String> =
        list.iter().map(|(n, v)| format!("{}:{}", string(n), string(v))).collect();
    format!("{{{}}}", members.join(","))
}
