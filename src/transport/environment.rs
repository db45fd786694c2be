//! What a launcher says about this process: its rank, the number of ranks, and which job it belongs to.

use crate::error::{Error, Result};

/// This process's place in its job.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub rank: u32,
    pub size: u32,
    /// The same on all ranks of a job, another for every other job on this host.
    pub job: String,
}

struct Launcher {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    /// Number of ranks on this host.
    here: &'static str,
}

const LAUNCHERS: [Launcher; 3] = [
    Launcher { name: "torchrun", rank: "RANK", size: "WORLD_SIZE", here: "LOCAL_WORLD_SIZE" },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        here: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    Launcher { name: "MPICH", rank: "PMI_RANK", size: "PMI_SIZE", here: "MPI_LOCALNRANKS" },
];

/// The process id of the launcher on this host: the nearest ancestor with a launcher's name, for ranks may run below a shell, else the parent.
pub(super) fn launcher_process() -> u32 {
    let parent = std::os::unix::process::parent_id();
    let mut ancestor = parent;
    while ancestor > 1 {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{ancestor}/stat")) else { break };
        // "pid (name) state parent …", where the name may hold anything.
        let Some((before, after)) = stat.rsplit_once(')') else { break };
        let name = before.split_once('(').map_or("", |(_, name)| name);
        if ["hydra_pmi_proxy", "mpirun", "mpiexec", "mpiexec.hydra", "orted", "prted", "prterun"]
            .contains(&name)
        {
            return ancestor;
        }
        ancestor = after.split_whitespace().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
    }
    parent
}

/// Reads the variables of the first launcher whose rank and size are both set. `get` reads a variable; `parent` is `launcher_process`.
pub(super) fn place(get: &dyn Fn(&str) -> Option<String>, parent: u32) -> Result<Place> {
    let is_set = |v: &str| get(v).is_some();
    let Some(l) = LAUNCHERS.iter().find(|l| is_set(l.rank) && is_set(l.size)) else {
        return Err(match LAUNCHERS.iter().find(|l| is_set(l.rank) || is_set(l.size)) {
            Some(l) => {
                let (set, missing) =
                    if is_set(l.rank) { (l.rank, l.size) } else { (l.size, l.rank) };
                Error::argument(format!("{missing} is not set, but {set} is; {} sets both", l.name))
            }
            None => {
                let pairs: Vec<String> = LAUNCHERS
                    .iter()
                    .map(|l| format!("{} and {} ({})", l.rank, l.size, l.name))
                    .collect();
                Error::argument(format!(
                    "no rank in the environment: none of {} is set",
                    pairs.join(", ")
                ))
            }
        });
    };
    let size = number(get, l.size, 1, u64::from(u32::MAX))?;
    let rank = number(get, l.rank, 0, size - 1)?;
    if is_set(l.here) {
        let here = number(get, l.here, 1, size)?;
        if here != size {
            return Err(Error::unsupported(format!(
                "{} is {size} but {} is {here}: the ranks run on more than one host, and shared memory serves one; \
                 use an MPI communicator through context_parallel_mpi.h (cp_mpi_transport) or a transport table of your own",
                l.size, l.here
            )));
        }
    }
    let first = |names: &[&str]| names.iter().find_map(|&n| get(n).map(|v| format!("{n}={v}")));
    let family = || format!("parent={parent}");
    let job = match l.name {
        "torchrun" => {
            let address = get("MASTER_ADDR").ok_or_else(|| {
                not_set("MASTER_ADDR", "a host name or address, as torchrun sets it")
            })?;
            let port = number(get, "MASTER_PORT", 1, 65535)?;
            // A restarted worker group must not meet what is left of the one before.
            let run = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"]
                .map(|n| get(n).unwrap_or_default());
            format!("{address}:{port} {run:?}")
        }
        "Open MPI" => first(&["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"]).unwrap_or_else(family),
        _ => match first(&["SLURM_JOB_ID"]) {
            Some(job) => format!("{job} {}", first(&["SLURM_STEP_ID"]).unwrap_or_default()),
            None => first(&["PMI_JOBID"]).unwrap_or_else(family),
        },
    };
    Ok(Place { rank: rank as u32, size: size as u32, job: format!("{} {job}", l.name) })
}

fn not_set(name: &str, allowed: &str) -> Error {
    Error::argument(format!("{name} is not set; allowed is {allowed}"))
}

fn number(get: &dyn Fn(&str) -> Option<String>, name: &str, least: u64, most: u64) -> Result<u64> {
    let allowed = format!("an integer from {least} to {most}");
    let text = get(name).ok_or_else(|| not_set(name, &allowed))?;
    match text.trim().parse::<u64>() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => Err(Error::argument(format!("{name} is {text:?}; allowed is {allowed}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn read(variables: &str) -> Result<Place> {
        let get = |name: &str| {
            variables.split_whitespace().find_map(|v| {
                v.split_once('=').filter(|(n, _)| *n == name).map(|(_, v)| v.to_string())
            })
        };
        place(&get, 77)
    }

    #[test]
    fn launchers() {
        let torch = "RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 MASTER_ADDR=h MASTER_PORT=29500";
        let p = read(torch).unwrap();
        assert_eq!((p.rank, p.size), (1, 4));
        assert_ne!(p.job, read(&format!("{torch} TORCHELASTIC_RESTART_COUNT=1")).unwrap().job);
        assert_eq!(p.job, read(&torch.replace("RANK=1", "RANK=2")).unwrap().job);
        let ompi = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 PMIX_NAMESPACE=a";
        assert_ne!(read(ompi).unwrap().job, read(&ompi.replace("=a", "=b")).unwrap().job);
        assert_eq!(read("PMI_RANK=2 PMI_SIZE=3 MPI_LOCALNRANKS=3").unwrap().job, "MPICH parent=77");
        // A complete pair wins over half of another.
        assert_eq!(read(&format!("RANK=9 {ompi}")).unwrap().size, 2);
    }

    #[test]
    fn refusals() {
        let torch = |rank, size, more| format!("RANK={rank} WORLD_SIZE={size} {more}");
        let address = "MASTER_ADDR=h MASTER_PORT=1";
        for (variables, words) in [
            (String::new(), "RANK and WORLD_SIZE"),
            ("RANK=1".into(), "WORLD_SIZE is not set"),
            ("PMI_SIZE=2".into(), "PMI_RANK is not set"),
            (torch("x", "2", address), "RANK is \"x\"; allowed is an integer from 0 to 1"),
            (torch("2", "2", address), "RANK is \"2\""),
            (torch("-1", "2", address), "RANK is \"-1\""),
            (torch("0", "0", address), "WORLD_SIZE is \"0\""),
            (torch("0", "2", "MASTER_PORT=1"), "MASTER_ADDR is not set"),
            (torch("0", "2", "MASTER_ADDR=h"), "MASTER_PORT is not set"),
            (torch("0", "2", "MASTER_ADDR=h MASTER_PORT=99999"), "MASTER_PORT is \"99999\""),
        ] {
            let e = read(&variables).unwrap_err();
            assert_eq!(e.status, Status::InvalidArgument, "{variables}");
            assert!(e.text.contains(words), "{variables}: {e}");
        }
        let e =
            read("RANK=0 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 MASTER_ADDR=h MASTER_PORT=1").unwrap_err();
        assert_eq!(e.status, Status::Unsupported);
        assert!(e.text.contains("context_parallel_mpi.h"), "{e}");
    }
}
