//! `info`: what this build is, and what it found; `info --mesh` is in `mesh`.

use crate::args::{Command, Failure, Given, opt};
use crate::json::{Object, array, string};
use crate::mesh;
use crate::probe::{self, Library};
use crate::text::{self, bold, dim, good};
use context_parallel::backend::cpu::Simd;
use context_parallel::backend::cuda::image;
use context_parallel::driver::{self, Device};
use std::sync::Arc;

pub const COMMAND: Command = Command {
    name: "info",
    about: "version, instruction sets, threads, transports; what of CUDA, NCCL and MPI is here; who works with whom in a mesh",
    options: &[
        (
            "mesh, instead of all else",
            &[
                opt(
                    "mesh",
                    "SIZES",
                    "ranks per axis, as in tp=2,cp=2,pp=2,world=16; dp is what world leaves",
                ),
                opt(
                    "order",
                    "AXES",
                    "the first has stride 1 (tp-cp-ep-dp-pp; Megatron's other one is tp-cp-ep-pp-dp)",
                ),
                opt(
                    "levels",
                    "A,B,…",
                    "hierarchy over the context-parallel ranks, the innermost size first",
                ),
                opt(
                    "experts",
                    "SIZES",
                    "the experts' own mesh over the same ranks, as in ep=4,tp=1",
                ),
            ],
        ),
        ("output", &[opt("json", "", "one line of JSON")]),
    ],
    examples: &[
        ("info", "for people"),
        ("info --json | python3 -m json.tool", "for programs"),
        ("info --mesh tp=2,cp=2,dp=2,pp=2", "who works with whom, as Megatron numbers ranks"),
        ("info --mesh cp=8 --levels 4,2", "the groups of hierarchical context parallelism"),
    ],
    notes: "Environment: CP_SIMD names the instruction set (scalar, avx2, avx512, avx512_bf16); CP_NCCL names the NCCL library's file.",
};

/// Where CUDA is usually installed when the loader does not know it.
const CUDA_PLACES: [&str; 3] =
    ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib"];

struct Found {
    simd: Result<Simd, String>,
    /// CUDA devices, or what is missing to compute on them.
    devices: Result<Vec<Arc<Device>>, String>,
    cuda: Library,
    nccl: Library,
    mpi: Vec<(&'static str, Option<String>)>,
}

pub fn run(given: &Given) -> Result<(), Failure> {
    if mesh::asked(given) {
        return mesh::run(given);
    }
    let program = |name| (name, probe::program(name).map(|p| p.display().to_string()));
    let found = Found {
        simd: Simd::from_env().map_err(|e| e.to_string()),
        devices: devices(),
        cuda: Library::find("libcuda.so.1", None, &CUDA_PLACES),
        nccl: Library::find("libnccl.so.2", Some("CP_NCCL"), &CUDA_PLACES),
        mpi: ["mpirun", "mpicc", "mpiexec"].map(program).to_vec(),
    };
    text::out(&if given.flag("json") { json(&found) + "\n" } else { people(&found) });
    Ok(())
}

fn devices() -> Result<Vec<Arc<Device>>, String> {
    if image::NVCC.is_none() {
        return Err("not on GPUs: this build has no CUDA kernels".into());
    }
    driver::open().map_err(|e| format!("not on GPUs: {}", e.text))?;
    let count = driver::device_count().map_err(|e| format!("not on GPUs: {}", e.text))?;
    if count == 0 {
        return Err("not on GPUs: CUDA's driver is here, but sees no device".into());
    }
    (0..count).map(|ordinal| Device::get(ordinal).map_err(|e| e.to_string())).collect()
}

fn profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}

fn target() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

fn json(f: &Found) -> String {
    let (launcher, variables) = probe::launcher();
    let available = Simd::ALL.into_iter().filter(|s| s.available()).map(|s| string(s.name()));
    let simd = Object::default()
        .text("detected", Simd::detect().name())
        .raw("available", array(available))
        .maybe("override", std::env::var("CP_SIMD").ok().as_deref())
        .maybe("used", f.simd.as_ref().ok().map(|s| s.name()))
        .maybe("error", f.simd.as_ref().err().map(String::as_str))
        .end();
    let backends = if image::NVCC.is_some() { &["cpu", "cuda"][..] } else { &["cpu"] };
    let device = |d: &Arc<Device>| {
        let o = Object::default().raw("ordinal", d.ordinal).text("name", &d.name);
        o.raw("arch", d.arch).raw("multiprocessors", d.multiprocessors).end()
    };
    let devices = f.devices.as_ref().map_or(&[][..], |d| d).iter().map(device);
    let mpi = f.mpi.iter().fold(Object::default(), |o, (name, at)| o.maybe(name, at.as_deref()));
    Object::default()
        .text("version", env!("CARGO_PKG_VERSION"))
        .text("profile", profile())
        .text("target", &target())
        .raw("backends", array(backends.iter().copied().map(string)))
        .raw("transports", array(["local", "shm", "user", "nccl", "staged"].map(string)))
        .text("cpu", &probe::cpu_name())
        .raw("cores", probe::cores())
        .raw("simd", simd)
        .raw("kernels", image::json())
        .raw("cuda", f.cuda.json())
        .raw("nccl", f.nccl.json())
        .raw("mpi", mpi.end())
        .maybe("launcher", launcher)
        .raw("launcher_variables", probe::pairs(&variables))
        .raw("devices", array(devices))
        .maybe("note", f.devices.as_ref().err().map(String::as_str))
        .end()
}

fn people(f: &Found) -> String {
    let mut out = format!(
        "{} {} · {} build for {}\n\n",
        bold("context-parallel"),
        env!("CARGO_PKG_VERSION"),
        profile(),
        target()
    );
    let mut line =
        |name: &str, value: &str| out += &format!("{}  {value}\n", bold(&format!("{name:<11}")));
    line("computes on", "CPU");
    match &f.devices {
        Ok(devices) => devices.iter().for_each(|d| {
            let (n, name, arch, sms) = (d.ordinal, &d.name, d.arch, d.multiprocessors);
            line("", &format!("CUDA device {n}: {name}, sm_{arch}, {sms} multiprocessors"));
        }),
        Err(why) => line("", &dim(why)),
    }
    line("processor", &format!("{}, {} for this process", probe::cpu_name(), cores()));
    let sets: Vec<String> = Simd::ALL
        .into_iter()
        .map(|s| {
            if s.available() {
                good(s.name())
            } else {
                dim(&format!("{} (not on this CPU)", s.name()))
            }
        })
        .collect();
    line("SIMD", &sets.join("  "));
    let chosen = match (&f.simd, std::env::var("CP_SIMD")) {
        (Ok(s), Ok(_)) => format!(
            "uses {}, as CP_SIMD says; the best here is {}",
            s.name(),
            Simd::detect().name()
        ),
        (Ok(s), Err(_)) => format!("uses {}, the best here; CP_SIMD overrides", s.name()),
        (Err(e), _) => text::bad(e),
    };
    line("", &chosen);
    line(
        "threads",
        "as many per rank as the caller says; demo and perf divide the cores among their ranks",
    );
    line(
        "transports",
        "local   ranks are threads of one process, also with a CUDA device each or one for all",
    );
    line("", "shm     ranks are processes of one host, over shared memory without a name");
    line(
        "",
        "user    the caller's own table of functions; MPI comes in this way (context_parallel_mpi.h)",
    );
    line("", "nccl    CUDA: a device per rank");
    line("", "staged  CUDA: through host memory and one of the others; the last resort");
    line("kernels", &kernels());
    for library in [&f.cuda, &f.nccl] {
        let name = if library.name.contains("nccl") { "NCCL" } else { "CUDA" };
        match &library.found {
            Some(at) => line(name, &format!("{} at {at}", good("found"))),
            None => line(name, &format!("{} is not here; looked in", library.name)),
        }
        let missed = library.tried.iter().filter(|(_, result)| !result.starts_with("found"));
        missed.for_each(|(place, why)| line("", &dim(&format!("· {place}: {why}"))));
    }
    for (name, at) in &f.mpi[..2] {
        let title = if *name == "mpirun" { "MPI" } else { "" };
        match at {
            Some(at) => line(title, &format!("{name} {} at {at}", good("found"))),
            None => line(title, &format!("{name} is not on PATH")),
        }
    }
    let (launcher, variables) = probe::launcher();
    match launcher {
        Some(name) => line("launcher", &format!("started by {name}")),
        None => line(
            "launcher",
            "none: no RANK and WORLD_SIZE (torchrun), OMPI_COMM_WORLD_* (Open MPI) or PMI_* (MPICH) in the environment",
        ),
    }
    variables.iter().for_each(|(name, value)| line("", &dim(&format!("{name}={value}"))));
    out
}

/// The CUDA kernels inside.
fn kernels() -> String {
    let Some(nvcc) = image::NVCC else {
        return "none for GPUs: built without nvcc (kernels/setup installs one; CP_CUDA=require insists)".into();
    };
    format!(
        "{} for {}, compiled by nvcc {nvcc}, {:.1} MB",
        image::IMAGES.iter().map(|i| i.kernels.len()).sum::<usize>(),
        image::archs().into_iter().map(image::spelled).collect::<Vec<_>>().join(", "),
        image::IMAGES.iter().map(|i| i.bytes.len()).sum::<usize>() as f64 / 1e6
    )
}

fn cores() -> String {
    match probe::cores() {
        1 => "1 core".into(),
        n => format!("{n} cores"),
    }
}
