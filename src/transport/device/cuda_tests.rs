//! `local` and `staged` on devices: ranks are threads, dealt out to the devices that there are. On the software GPU copies, events and streams
//! run in an order of its own, drawn from SOFTGPU_SEED, so a missing event shows as wrong bytes.

use super::{DeviceTransport, Step, local, staged};
use crate::driver::{self, CUdeviceptr, Device, DeviceBuffer, PinnedBuffer, Stream};
use crate::error::{Error, Result, Status};
use crate::transport::local::local_group;
use crate::transport::tests::{Cut, Random, Ranks, content};
use crate::transport::{Message, Piece, shm};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

/// One rank: its transport and its stream.
struct Rank {
    rank: u32,
    size: u32,
    device: Arc<Device>,
    stream: Stream,
    /// None once it was dropped.
    transport: Option<Box<dyn DeviceTransport>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Local,
    StagedLocal,
    StagedShm,
}

const WAYS: [Way; 3] = [Way::Local, Way::StagedLocal, Way::StagedShm];

fn host(way: Way, size: u32) -> Ranks {
    if way != Way::StagedShm {
        return local_group(size);
    }
    let fd = shm::create(size).unwrap();
    let own = |rank| shm::attach(fd.try_clone().unwrap(), rank, size).unwrap();
    (0..size).map(own).collect()
}

/// Runs `f` on every rank in a thread of its own, with the device current; the results in rank order.
fn on_all<R: Send>(
    way: Way,
    size: u32,
    timeout: Duration,
    f: impl Fn(&mut Rank) -> R + Sync,
) -> Vec<R> {
    let hint = "a CUDA device, or the software GPU on LD_LIBRARY_PATH";
    driver::open().expect(hint);
    let count = driver::device_count().expect(hint);
    thread::scope(|scope| {
        let f = &f;
        let start = |(rank, mut control): (usize, Box<dyn crate::transport::Transport>)| {
            scope.spawn(move || {
                let device = &Device::get(rank as u32 % count).unwrap();
                let _current = device.enter().unwrap();
                // A host transport that is dropped would be a rank that left: it lives until `f` is done.
                let mut keep = None;
                let transport = match way {
                    Way::Local => local::make(device, &mut *control, timeout).unwrap(),
                    _ => {
                        let shared = Arc::new(Mutex::new(control));
                        let made = staged::make(device, &shared, timeout).unwrap();
                        keep = Some(shared);
                        made
                    }
                };
                let stream = Stream::new(device, false).unwrap();
                let rank = rank as u32;
                let transport = Some(transport);
                let result = f(&mut Rank { rank, size, device: device.clone(), stream, transport });
                drop(keep);
                result
            })
        };
        let all: Vec<_> = host(way, size).into_iter().enumerate().map(start).collect();
        all.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

const STEP: Step = Step { index: 3, stage: 1, call: 7 };

impl Rank {
    fn transport(&mut self) -> &mut dyn DeviceTransport {
        &mut **self.transport.as_mut().expect("not dropped")
    }

    fn exchange(&mut self, sends: &[Message], recvs: &[Message]) -> Result<()> {
        let stream = self.stream.raw();
        // SAFETY: every test keeps its memory until the stream is done.
        unsafe { self.transport().exchange(sends, recvs, stream, STEP) }
    }

    fn finish(&self) {
        // SAFETY: a stream of the current device.
        unsafe { driver::synchronize(self.stream.raw()) }.unwrap();
    }

    /// Sends `send` bytes to each of `peers` and receives `recv` from each.
    fn swap(&mut self, peers: &[u32], send: usize, recv: usize) -> Result<()> {
        let memory = DeviceBuffer::new(&self.device, (send + recv).max(1) * peers.len()).unwrap();
        let at = |offset: usize| memory.address() as usize + offset;
        // SAFETY: own memory; the stream is of the current device.
        unsafe { driver::clear(memory.address(), memory.bytes(), self.stream.raw()) }.unwrap();
        let all = |bytes: usize, base: usize| -> Vec<Message> {
            let piece = |i: usize| Piece { ptr: at(base + i * bytes) as *mut u8, len: bytes };
            let message = |(i, p): (usize, &u32)| Message { peer: *p, pieces: vec![piece(i)] };
            peers.iter().enumerate().map(message).collect()
        };
        let result = self.exchange(&all(send, 0), &all(recv, send * peers.len()));
        self.finish();
        result
    }
}

/// Random exchanges through the same device memory, one after another without a word from the host: produce, exchange, overwrite what was
/// sent, look at what came, overwrite that.
fn random_exchanges(r: &mut Rank, seed: u64, groups: u64) {
    const LARGEST: usize = 3000;
    let (rank, size, stream) = (r.rank, r.size, r.stream.raw());
    let mut random = Random::new(seed ^ (u64::from(rank) << 50));
    let memory = DeviceBuffer::new(&r.device, 2 * LARGEST * size as usize).unwrap();
    let place = |peer: u32, slot: u32| {
        memory.address() + CUdeviceptr::from(2 * peer + slot) * LARGEST as CUdeviceptr
    };
    // Everything that copies run from and to, apart for every group, kept until the end.
    let mut pinned: Vec<(PinnedBuffer, Vec<u8>, String)> = Vec::new();
    let mut written = Vec::new();
    for group in 0..groups {
        let seed = seed + (group << 8);
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        let (mut sent, mut came) = (Vec::new(), Vec::new());
        for peer in (0..size).filter(|p| *p != rank) {
            if let Some(bytes) = content(seed, rank, peer, LARGEST) {
                let at = place(peer, 0);
                let from = PinnedBuffer::new(&r.device, bytes.len()).unwrap();
                if !bytes.is_empty() {
                    // SAFETY: the buffers live until `finish`; the ranges are within them.
                    unsafe {
                        from.ptr().copy_from(bytes.as_ptr(), bytes.len());
                        driver::copy_to_device(at, from.ptr(), bytes.len(), stream).unwrap();
                    }
                }
                written.push(from);
                sent.push((at, bytes.len()));
                sends.extend(Cut::new(bytes, &mut random).messages_at(peer, at as *mut u8));
            }
            if let Some(bytes) = content(seed, peer, rank, LARGEST) {
                let at = place(peer, 1);
                let cut = Cut::new(bytes.clone(), &mut random);
                recvs.extend(cut.messages_at(peer, at as *mut u8));
                came.push((at, bytes, format!("rank {rank}, group {group}, from rank {peer}")));
            }
        }
        r.exchange(&sends, &recvs).unwrap();
        for (at, bytes) in sent.into_iter().filter(|(_, bytes)| *bytes > 0) {
            // SAFETY: as above.
            unsafe { driver::clear(at, bytes, stream) }.unwrap();
        }
        for (at, bytes, what) in came {
            let to = PinnedBuffer::new(&r.device, bytes.len()).unwrap();
            if !bytes.is_empty() {
                // SAFETY: as above.
                unsafe {
                    driver::copy_to_host(to.ptr(), at, bytes.len(), stream).unwrap();
                    driver::clear(at, bytes.len(), stream).unwrap();
                }
            }
            pinned.push((to, bytes, what));
        }
    }
    r.finish();
    for (got, wanted, what) in pinned.iter().filter(|(got, ..)| got.bytes() > 0) {
        // SAFETY: the copies are done.
        let got = unsafe { std::slice::from_raw_parts(got.ptr(), got.bytes()) };
        assert!(got == wanted, "{what}: wrong bytes (SOFTGPU_SEED tells the order)");
    }
}

fn has(result: &Result<()>, status: Status, words: &[&str]) {
    let e = result.as_ref().expect_err("an error");
    assert_eq!(e.status, status, "{e}");
    words.iter().for_each(|w| assert!(e.text.contains(w), "{e}: {w} is missing"));
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn local_random_exchanges() {
    for size in 2..=8 {
        for seed in 0..4 {
            on_all(Way::Local, size, LONG, |r| random_exchanges(r, 100 * seed, 8));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn staged_random_exchanges() {
    for way in [Way::StagedLocal, Way::StagedShm] {
        for size in [2, 3, 5, 8] {
            on_all(way, size, LONG, |r| random_exchanges(r, 77, 6));
        }
    }
}

/// A rank that comes late to every exchange only delays the others.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn slow_rank() {
    for way in WAYS {
        on_all(way, 3, LONG, |r| {
            for round in 0..5 {
                if r.rank == 1 {
                    thread::sleep(Duration::from_millis(15));
                }
                random_exchanges(r, round, 1);
            }
        });
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn different_sizes_are_an_error_on_both() {
    for way in WAYS {
        let results = on_all(way, 2, LONG, |r| {
            if r.rank == 0 { r.swap(&[1], 100, 50) } else { r.swap(&[0], 50, 101) }
        });
        for r in &results {
            has(r, Status::Mismatch, &["rank 0 sends 100 bytes to rank 1", "101"]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn missing_rank_is_named() {
    let timeout = Duration::from_millis(300);
    for way in WAYS {
        let results = on_all(way, 3, timeout, |r| {
            let began = Instant::now();
            let result = if r.rank == 2 {
                thread::sleep(3 * timeout);
                Ok(())
            } else {
                r.swap(&[2], 8, 8)
            };
            assert!(began.elapsed() < 6 * timeout, "{:?}", began.elapsed());
            result
        });
        for (rank, r) in results[..2].iter().enumerate() {
            let me = format!("rank {rank}: rank 2 did not");
            has(r, Status::Timeout, &[&me, "300 ms", "step 3 of call 7, stage 1"]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn giving_up_abort_and_loss() {
    for way in WAYS {
        let results = on_all(way, 2, LONG, |r| {
            r.swap(&[1 - r.rank], 5, 6 - 1).unwrap();
            if r.rank == 0 {
                r.transport().give_up(Error::new(Status::Cuda, "rank 0: a kernel failed"));
                assert!(r.transport().failed().is_some());
            }
            r.swap(&[1 - r.rank], 5, 5)
        });
        results.iter().for_each(|r| has(r, Status::Cuda, &["a kernel failed"]));

        let results = on_all(way, 3, LONG, |r| {
            if r.rank == 1 {
                let abort = r.transport().aborter();
                thread::spawn(move || abort()).join().unwrap();
            }
            let peer = if r.rank == 2 { 1 } else { 2 };
            r.swap(&[peer], 5, 5)
        });
        results.iter().for_each(|r| has(r, Status::Aborted, &["rank 1 aborted"]));

        let results = on_all(way, 2, LONG, |r| {
            if r.rank == 1 {
                let panics = AssertUnwindSafe(|| {
                    let _dropped = r.transport.take();
                    panic!("rank 1 ends here");
                });
                assert!(catch_unwind(panics).is_err());
                return Ok(());
            }
            if way == Way::Local { r.swap(&[1], 5, 5) } else { Ok(()) }
        });
        if way == Way::Local {
            has(&results[0], Status::PeerLost, &["rank 1 left"]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn names_and_limits() {
    for (way, name) in WAYS.into_iter().zip(["cuda local", "staged over local", "staged over shm"])
    {
        on_all(way, 2, LONG, |r| {
            assert_eq!(r.transport().name(), name);
            assert!(r.transport().meets() && !r.transport().same_pieces());
            has(&r.transport().capturable(), Status::NotCapturable, &[name, "nccl"]);
            has(&r.swap(&[r.rank], 1, 1), Status::InvalidArgument, &["0..2"]);
        });
    }
}
