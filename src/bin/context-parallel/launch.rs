//! Ranks as threads of this process, or as processes: the tool runs itself again, with the environment that torchrun would set.
//!
//! Ranks report after every case and wait until all have been heard, so that nothing is computed here while a case is timed. A rank
//! that fails or dies is named; the others are given a moment to say what they saw, and are then ended. A process whose parent dies is
//! killed by the kernel, and shared memory has no name: nothing stays behind.

use crate::args::{Failure, Given, failed};
use crate::rank::{self, Job};
use crate::report::Report;
use context_parallel::error::{Error, Status};
use context_parallel::transport::bootstrap::{Kind, init_from_env};
use context_parallel::transport::local::local_group;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long the others may take to report after the first failure.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What is heard of a rank.
enum Event {
    Report(Report),
    /// Its own account of what went wrong.
    Failed(String),
    /// It has nothing more to do.
    Done,
    /// A process that ended without saying so.
    Gone,
}

/// What is done with the reports of a case, in rank order.
pub type OnCase<'a> = dyn FnMut(usize, Vec<Report>) -> Result<(), Failure> + 'a;

/// Listens until all ranks are done. `go` sends a rank on; after a failure it is dropped, which ends the ranks that wait for it.
/// A rank that is not heard of although others are done with the same case has the job's timeout, too.
fn collect<'a>(
    job: &Job,
    events: &Receiver<(u32, Event)>,
    mut go: Vec<Box<dyn FnMut() + 'a>>,
    gone: &mut dyn FnMut(u32) -> String,
    on_case: &mut OnCase,
) -> Result<(), Failure> {
    let mut heard: Vec<Heard> = (0..job.ranks).map(|_| Heard::Nothing).collect();
    let mut case = 0;
    let mut faults: Vec<(bool, String)> = Vec::new();
    let mut until: Option<Instant> = None;
    while heard.iter().any(|h| !matches!(h, Heard::End)) {
        let hour = Duration::from_secs(3600);
        let wait = until.map_or(hour, |t| t.saturating_duration_since(Instant::now()));
        let (rank, event) = match events.recv_timeout(wait) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) if until.is_none() => continue,
            Err(_) => {
                let late = heard.iter().position(|h| matches!(h, Heard::Nothing));
                if let (Some(rank), true) = (late, faults.is_empty()) {
                    let seconds = job.timeout.as_secs();
                    let text = format!("rank {rank} is not heard of, {seconds} s after others");
                    faults.push((true, text));
                }
                break;
            }
        };
        let fault = match event {
            Event::Report(report) => {
                heard[rank as usize] = Heard::Report(report);
                until.get_or_insert_with(|| Instant::now() + job.timeout);
                if heard.iter().all(|h| matches!(h, Heard::Report(_))) && faults.is_empty() {
                    let take = |h: &mut Heard| match std::mem::replace(h, Heard::Nothing) {
                        Heard::Report(report) => Some(report),
                        _ => None,
                    };
                    on_case(case, heard.iter_mut().filter_map(take).collect())?;
                    case += 1;
                    until = None;
                    go.iter_mut().for_each(|go| go());
                }
                continue;
            }
            Event::Done => {
                heard[rank as usize] = Heard::End;
                until.get_or_insert_with(|| Instant::now() + job.timeout);
                continue;
            }
            // Most errors name their rank.
            Event::Failed(text) if text.contains(&format!("rank {rank}:")) => (false, text),
            Event::Failed(text) => (false, format!("rank {rank}: {text}")),
            Event::Gone => (true, format!("rank {rank} {}", gone(rank))),
        };
        heard[rank as usize] = Heard::End;
        if faults.is_empty() {
            until = Some(Instant::now() + LAST_WORDS);
            go.clear();
        }
        faults.push(fault);
    }
    // A death explains the rest.
    faults.sort_by_key(|(death, _)| !death);
    match faults.split_first() {
        None if case == job.cases.len() => Ok(()),
        None => Err(failed("the ranks ended before all cases were done")),
        Some(((_, first), rest)) => {
            Err(failed(rest.iter().fold(first.clone(), |all, (_, text)| all + "\n  " + text)))
        }
    }
}

/// What has been heard of a rank since the last case.
enum Heard {
    Nothing,
    Report(Report),
    /// It has ended, well or not.
    End,
}

/// Runs the job on threads of this process.
pub fn threads(job: &Job, on_case: &mut OnCase) -> Result<(), Failure> {
    let (tell, events) = channel();
    std::thread::scope(|scope| {
        let mut go: Vec<Box<dyn FnMut()>> = Vec::new();
        for (rank, transport) in local_group(job.ranks).into_iter().enumerate() {
            let (send_go, wait_go) = channel();
            // Fails for a rank that has ended; its failure is on its way.
            go.push(Box::new(move || send_go.send(()).unwrap_or(())));
            let tell: Sender<(u32, Event)> = tell.clone();
            let rank = rank as u32;
            scope.spawn(move || {
                let mut each = |report| {
                    let told = tell.send((rank, Event::Report(report)));
                    told.ok().and_then(|()| wait_go.recv().ok()).ok_or_else(nobody)
                };
                let ran = catch_unwind(AssertUnwindSafe(|| {
                    rank::run(job, &job.place.group(transport, job.timeout)?, &mut each)
                }));
                let event = match ran {
                    Ok(Ok(())) => Event::Done,
                    Ok(Err(e)) => Event::Failed(e.to_string()),
                    Err(_) => Event::Failed("panicked".into()),
                };
                // Nobody listens any more: the failure that ended the others is being told.
                let _ = tell.send((rank, event));
            });
        }
        drop(tell);
        collect(job, &events, go, &mut |_| String::new(), on_case)
    })
}

fn nobody() -> Error {
    Error::new(Status::Aborted, "the run was ended")
}

/// Child processes that do not outlive this.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Fails only for one that has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the job on processes over shared memory. `command` and the words given make the same job there; `text` goes to their stdin.
pub fn processes(
    job: &Job,
    command: &str,
    given: &Given,
    text: &[u8],
    on_case: &mut OnCase,
) -> Result<(), Failure> {
    let cannot = |what: &str, e: std::io::Error| failed(format!("{what}: {e}"));
    let program = std::env::current_exe().map_err(|e| cannot("finding this program", e))?;
    let (tell, events) = channel();
    let mut children = Children(Vec::new());
    let mut go: Vec<Box<dyn FnMut()>> = Vec::new();
    let me = std::process::id();
    for rank in 0..job.ranks {
        let mut start = Command::new(&program);
        start.args(["rank", command]).args(&given.words);
        for (name, value) in [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", job.ranks.to_string()),
            ("LOCAL_WORLD_SIZE", job.ranks.to_string()),
            ("MASTER_ADDR", "localhost".into()),
            // Only part of the job's name: shared memory needs no port.
            ("MASTER_PORT", "1".into()),
            ("TORCHELASTIC_RUN_ID", format!("context-parallel {me}")),
        ] {
            start.env(name, value);
        }
        start.stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: between fork and exec only two system calls are made.
        unsafe {
            start.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match libc::getppid() as u32 == me {
                    true => Ok(()),
                    false => Err(std::io::ErrorKind::BrokenPipe.into()),
                }
            });
        }
        let mut child = start.spawn().map_err(|e| cannot(&format!("starting rank {rank}"), e))?;
        let (mut stdin, stdout) = (child.stdin.take(), child.stdout.take());
        children.0.push(child);
        if let Some(stdin) = &mut stdin {
            // A child that died already is reported by its reader.
            let _ = stdin
                .write_all(&(text.len() as u64).to_le_bytes())
                .and_then(|()| stdin.write_all(text));
        }
        // Fails for a rank that has ended; its failure is on its way.
        go.push(Box::new(move || stdin.as_mut().map_or((), |s| s.write_all(&[1]).unwrap_or(()))));
        let tell = tell.clone();
        std::thread::spawn(move || {
            let mut stdout = stdout;
            while let Some(event) = stdout.as_mut().and_then(hear) {
                let last = !matches!(event, Event::Report(_));
                if tell.send((rank, event)).is_err() || last {
                    return;
                }
            }
            // Nobody listens any more after the first failure.
            let _ = tell.send((rank, Event::Gone));
        });
    }
    drop(tell);
    let mut gone = |rank: u32| {
        let child = &mut children.0[rank as usize];
        let pid = child.id();
        child.wait().map_or_else(
            |e| format!("(process {pid}) is lost: {e}"),
            |status| how_ended(pid, status),
        )
    };
    collect(job, &events, go, &mut gone, on_case)
}

fn how_ended(pid: u32, status: ExitStatus) -> String {
    let name = |signal: i32| match signal {
        libc::SIGKILL => " (SIGKILL)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGTERM => " (SIGTERM)",
        libc::SIGINT => " (SIGINT)",
        libc::SIGILL => " (SIGILL)",
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGBUS => " (SIGBUS)",
        _ => "",
    };
    match (status.signal(), status.code()) {
        (Some(signal), _) => {
            format!("(process {pid}) was killed by signal {signal}{}", name(signal))
        }
        (_, Some(code)) => format!("(process {pid}) ended with exit status {code}"),
        _ => format!("(process {pid}) ended: {status}"),
    }
}

/// Reads one message: a letter, a length, the bytes. `None` when the pipe has ended.
fn hear(from: &mut impl Read) -> Option<Event> {
    let mut head = [0; 9];
    from.read_exact(&mut head).ok()?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[1..]);
    let mut bytes = Vec::new();
    let length = u64::from_le_bytes(length);
    from.take(length).read_to_end(&mut bytes).ok()?;
    if bytes.len() as u64 != length {
        return None;
    }
    match head[0] {
        b'r' => Report::decode(&bytes).map(Event::Report),
        b'f' => Some(Event::Failed(String::from_utf8_lossy(&bytes).into_owned())),
        b'd' => Some(Event::Done),
        _ => None,
    }
}

fn say(letter: u8, bytes: &[u8]) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&[letter])?;
    stdout.write_all(&(bytes.len() as u64).to_le_bytes())?;
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// The other side of [`processes`]: one rank, its reports on stdout.
pub fn serve(job: impl FnOnce(Vec<u8>) -> Result<Job, Failure>) -> Result<(), Failure> {
    let mut stdin = std::io::stdin().lock();
    let mut length = [0; 8];
    let mut text = Vec::new();
    let heard = stdin
        .read_exact(&mut length)
        .and_then(|()| (&mut stdin).take(u64::from_le_bytes(length)).read_to_end(&mut text));
    if heard.is_err() {
        return Err(failed("rank: is started by demo and perf, not by hand"));
    }
    let job = job(text)?;
    let mut each = |report: Report| {
        say(b'r', &report.encode()).and_then(|()| stdin.read_exact(&mut [0])).map_err(|_| nobody())
    };
    let ran = init_from_env(Kind::Shm, job.timeout)
        .and_then(|transport| job.place.group(transport, job.timeout))
        .and_then(|group| rank::run(&job, &group, &mut each));
    let told = match &ran {
        Ok(()) => say(b'd', &[]),
        Err(e) => say(b'f', e.to_string().as_bytes()),
    };
    if told.is_err() || ran.is_err() {
        std::process::exit(1);
    }
    Ok(())
}
