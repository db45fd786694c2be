//! NCCL: the real library as far as it goes without a GPU (`real_nccl`), and ranks as threads on a GPU or the software one (`cuda`).

use super::*;
use std::ffi::OsString;

mod real_nccl {
    use super::*;

    /// The library that the environment variable names; not `find`, whose choice is this process's.
    fn real() -> &'static Api {
        let path = std::env::var_os("NCCL_LIBRARY").expect("NCCL_LIBRARY names a libnccl.so.2");
        let flags = libloading::os::unix::RTLD_NOW;
        Box::leak(Box::new(Api::open(&path, flags).expect("a library that can be opened")))
    }

    #[test]
    #[ignore = "needs NCCL itself, named by NCCL_LIBRARY: tests/run"]
    fn says_its_version_and_makes_unique_ids() {
        let api = real();
        assert_eq!(api.version(), 22707);
        let path = std::env::var("NCCL_LIBRARY").unwrap_or_default();
        assert_eq!(OsString::from(api.path()), OsString::from(&path));
        assert_eq!(api.description(), format!("2.27.7 ({path})"));
        let (one, two) = (new_id(api).expect("an id"), new_id(api).expect("an id"));
        assert_ne!(one, [0; 128]);
        assert_ne!(one, two);
    }

    /// As in a process that torch has brought its own copy into: that one is taken, wherever it lies.
    #[test]
    #[ignore = "needs NCCL itself, named by NCCL_LIBRARY: tests/run"]
    fn a_copy_in_the_process_is_taken() {
        if std::env::var_os("CP_TEST_ALONE").is_none() {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "transport::device::nccl::tests::real_nccl::a_copy_in_the_process_is_taken",
                ])
                .args(["--include-ignored"])
                .env("CP_TEST_ALONE", "1")
                .env_remove(api::VARIABLE)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
            return;
        }
        let there = real();
        let found = api::find().expect("the copy that is there");
        assert_eq!((found.path(), found.version()), (there.path(), there.version()));
    }

    #[test]
    #[ignore = "needs NCCL itself, named by NCCL_LIBRARY: tests/run"]
    fn without_a_gpu_init_fails_in_its_own_words() {
        let api = real();
        let id = new_id(api).expect("an id");
        let error = init(api, &id, 0, 1, Duration::from_secs(20), Options::default());
        let error = error.expect_err("there is no GPU");
        assert_eq!(error.status, Status::Nccl);
        assert!(
            error.text.starts_with("rank 0: ncclCommInitRankConfig: NCCL error 1, "),
            "{error}"
        );
        // From ncclGetLastError.
        assert!(error.text.contains("Cuda failure"), "{error}");
    }
}

mod cuda {
    use super::*;
    use crate::driver::{self, check, copy_on_device, device_count};
    use cudarc::driver::sys;
    use std::ffi::{CString, c_char};
    use std::process::{Child, Command, Stdio};
    use std::sync::atomic::{AtomicU32, Ordering};

    const LONG: Duration = Duration::from_secs(30);
    const SHORT: Duration = Duration::from_millis(400);
    const STEP: Step = Step { index: 5, stage: 1, call: 7 };

    /// Joins `size` ranks, each a thread with the device of its number (modulo those that there are), and runs `f` on each.
    fn ranks<T: Send>(
        size: u32,
        timeout: Duration,
        f: impl Fn(Nccl, &Arc<Device>, &Stream) -> T + Sync,
    ) -> Vec<T> {
        let id = unique_id().expect("a unique id");
        driver::open().expect("a driver");
        let devices = device_count().expect("devices");
        let one = |rank: u32| {
            let device = Device::get(rank % devices).expect("a device");
            let _current = device.enter().expect("its context");
            let nccl = join(&device, &id, rank, size, timeout).expect("all ranks come");
            assert_eq!((nccl.rank(), nccl.size()), (rank, size));
            f(nccl, &device, &Stream::new(&device, false).expect("a stream"))
        };
        thread::scope(|scope| {
            let all: Vec<_> = (0..size)
                .map(|r| {
                    scope.spawn({
                        let one = &one;
                        move || one(r)
                    })
                })
                .collect();
            all.into_iter().map(|t| t.join().expect("no panic")).collect()
        })
    }

    /// A barrier that fails where a rank does not come, because it panicked.
    struct Meeting(u32, AtomicU32);

    impl Meeting {
        fn of(size: u32) -> Meeting {
            Meeting(size, AtomicU32::new(0))
        }

        /// How many had come before, this time.
        fn wait(&self) -> u32 {
            let (ticket, start) = (self.1.fetch_add(1, Ordering::SeqCst), Instant::now());
            while self.1.load(Ordering::SeqCst) / self.0 == ticket / self.0 {
                assert!(start.elapsed() < LONG, "a rank did not come");
                thread::sleep(Duration::from_millis(1));
            }
            ticket % self.0
        }
    }

    fn others(nccl: &Nccl) -> Vec<u32> {
        (0..nccl.size()).filter(|r| *r != nccl.rank()).collect()
    }

    /// One piece to or from every peer, in a row.
    fn row(memory: &DeviceBuffer, at: usize, peers: &[u32], bytes: usize) -> Vec<Message> {
        let piece = |i: usize| Piece {
            ptr: (memory.address() as usize + at + i * bytes) as *mut u8,
            len: bytes,
        };
        peers
            .iter()
            .enumerate()
            .map(|(i, &peer)| Message { peer, pieces: vec![piece(i)] })
            .collect()
    }

    /// An exchange of `bytes` with every peer, out of and into memory that outlives it.
    fn swap(
        nccl: &mut Nccl,
        memory: &DeviceBuffer,
        peers: &[u32],
        bytes: usize,
        stream: &Stream,
    ) -> Result<()> {
        let (sends, recvs) =
            (row(memory, 0, peers, bytes), row(memory, bytes * peers.len(), peers, bytes));
        // SAFETY: the memory outlives the test's last look at the stream.
        unsafe { nccl.exchange(&sends, &recvs, stream.raw(), STEP) }
    }

    /// Waits until the watchdog has found something.
    fn failure(nccl: &Nccl, longest: Duration) -> Error {
        let start = Instant::now();
        loop {
            match nccl.failed() {
                Some(why) => return why,
                None => assert!(start.elapsed() < longest, "nothing was found"),
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The stream is free: nothing of an aborted exchange holds it.
    fn drained(stream: &Stream) {
        // SAFETY: a stream of the current device.
        unsafe { driver::synchronize(stream.raw()) }.expect("an empty stream");
    }

    fn random(seed: u64) -> u64 {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
        for _ in 0..3 {
            x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        }
        x ^ (x >> 29)
    }

    /// Lengths of the pieces that rank `from` sends rank `to` in a round: both know them.
    fn pieces(round: u64, from: u32, to: u32) -> Vec<usize> {
        let key = round << 16 | u64::from(from) << 8 | u64::from(to);
        let length =
            |i: u64| random(key << 4 | i) as usize % [1, 100, 3000][random(key + i) as usize % 3];
        (0..random(key) % 4).map(length).collect()
    }

    fn content(round: u64, from: u32, to: u32, at: usize) -> u8 {
        random(round << 32 | u64::from(from) << 24 | u64::from(to) << 16 | (at as u64 >> 3)) as u8
            ^ at as u8
    }

    /// All rounds are enqueued through the same device memory, without a word from the host in between: what is sent is overwritten by the next
    /// round's upload, what came is copied out and then poisoned.
    fn exchange_much(mut nccl: Nccl, device: &Arc<Device>, stream: &Stream) {
        const ROUNDS: u64 = 25;
        let (me, peers) = (nccl.rank(), others(&nccl));
        nccl.warm_up(&peers).expect("a warm-up");
        let side = |round: u64, sends: bool| -> Vec<(u32, Vec<usize>)> {
            let of =
                |&p: &u32| (p, if sends { pieces(round, me, p) } else { pieces(round, p, me) });
            peers.iter().map(of).collect()
        };
        let total = |side: &[(u32, Vec<usize>)]| side.iter().flat_map(|(_, p)| p).sum::<usize>();
        let largest =
            (0..ROUNDS).flat_map(|r| [total(&side(r, true)), total(&side(r, false))]).max();
        let room = largest.unwrap_or(0).max(1);
        let (out, arrived) =
            (DeviceBuffer::new(device, room).unwrap(), DeviceBuffer::new(device, room).unwrap());
        let messages = |memory: &DeviceBuffer, side: &[(u32, Vec<usize>)]| -> Vec<Message> {
            let mut at = memory.address() as usize;
            let mut cut = |len: usize| {
                at += len;
                Piece { ptr: (at - len) as *mut u8, len }
            };
            let of = |(p, lengths): &(u32, Vec<usize>)| Message {
                peer: *p,
                pieces: lengths.iter().map(|n| cut(*n)).collect(),
            };
            side.iter().map(of).collect()
        };
        let mut mirrors = Vec::new();
        for round in 0..ROUNDS {
            let (sends, recvs) = (side(round, true), side(round, false));
            let (up, down) = (
                PinnedBuffer::new(device, room).unwrap(),
                PinnedBuffer::new(device, room).unwrap(),
            );
            // SAFETY: owned, and nothing else knows it.
            let bytes = unsafe { std::slice::from_raw_parts_mut(up.ptr(), room) };
            let mut at = 0;
            for (peer, lengths) in &sends {
                for i in 0..lengths.iter().sum() {
                    bytes[at] = content(round, me, *peer, i);
                    at += 1;
                }
            }
            // SAFETY: everything lives until the stream is drained.
            unsafe {
                copy_to_device(out.address(), up.ptr(), room, stream.raw()).unwrap();
                let step = Step { call: round, ..STEP };
                nccl.exchange(
                    &messages(&out, &sends),
                    &messages(&arrived, &recvs),
                    stream.raw(),
                    step,
                )
                .unwrap();
                copy_to_host(down.ptr(), arrived.address(), room, stream.raw()).unwrap();
                driver::clear(arrived.address(), room, stream.raw()).unwrap();
            }
            mirrors.push((up, down, recvs));
        }
        drained(stream);
        assert_eq!(nccl.failed(), None);
        for (round, (_, down, recvs)) in mirrors.iter().enumerate() {
            // SAFETY: owned, and the stream is drained.
            let bytes = unsafe { std::slice::from_raw_parts(down.ptr(), room) };
            let mut at = 0;
            for (peer, lengths) in recvs {
                for i in 0..lengths.iter().sum() {
                    let want = content(round as u64, *peer, me, i);
                    assert_eq!(
                        bytes[at], want,
                        "round {round}, rank {me}, byte {i} of rank {peer}'s"
                    );
                    at += 1;
                }
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn many_exchanges_among_two() {
        ranks(2, LONG, exchange_much);
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn many_exchanges_among_three() {
        ranks(3, LONG, exchange_much);
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn many_exchanges_among_four() {
        ranks(4, LONG, exchange_much);
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn a_peer_that_never_comes_is_a_timeout_and_named() {
        let done = Meeting::of(3);
        ranks(3, SHORT, |mut nccl, device, stream| {
            let memory = DeviceBuffer::new(device, 4096).unwrap();
            if nccl.rank() == 2 {
                done.wait();
                return;
            }
            let (me, start) = (nccl.rank(), Instant::now());
            let peers = others(&nccl);
            swap(&mut nccl, &memory, &peers, 512, stream).expect("it is enqueued");
            let why = failure(&nccl, LONG);
            let waited = start.elapsed();
            assert!(waited >= SHORT && waited < 10 * SHORT, "{waited:?}");
            assert_eq!(why.status, Status::Timeout, "{why}");
            let place = format!(
                "rank {me}, call 7, step 5, stage 1, exchange with ranks {} and 2: ",
                1 - me
            );
            assert!(why.text.starts_with(&place), "{why}");
            drained(stream);
            assert_eq!(swap(&mut nccl, &memory, &peers, 512, stream), Err(why));
            done.wait();
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn a_peer_that_leaves_is_a_timeout() {
        ranks(2, SHORT, |mut nccl, device, stream| {
            nccl.warm_up(&others(&nccl)).expect("a warm-up");
            if nccl.rank() == 1 {
                let start = Instant::now();
                drop(nccl);
                assert!(start.elapsed() < FAREWELL + SHORT, "{:?}", start.elapsed());
                return;
            }
            let memory = DeviceBuffer::new(device, 4096).unwrap();
            swap(&mut nccl, &memory, &[1], 512, stream).expect("it is enqueued");
            assert_eq!(failure(&nccl, LONG).status, Status::Timeout);
            drained(stream);
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn work_before_an_exchange_does_not_count() {
        unsafe extern "C" fn sleep(_: *mut c_void) {
            thread::sleep(3 * SHORT);
        }
        // Both ranks wait for the same: a rank that comes later than the other is what the deadline is for.
        let device = Device::get(0).unwrap();
        let _current = device.enter().unwrap();
        let (gate, open) = (Stream::new(&device, false).unwrap(), Event::new(&device).unwrap());
        let both = Meeting::of(2);
        ranks(2, SHORT, |mut nccl, device, stream| {
            let memory = DeviceBuffer::new(device, 4096).unwrap();
            let peers = others(&nccl);
            nccl.warm_up(&peers).expect("a warm-up");
            if both.wait() == 0 {
                // SAFETY: the function lives, and takes nothing; the stream is of device 0, whichever is current.
                unsafe {
                    let code = sys::cuLaunchHostFunc(gate.raw(), Some(sleep), std::ptr::null_mut());
                    check("cuLaunchHostFunc", code).unwrap();
                    open.record(gate.raw()).unwrap();
                }
            }
            both.wait();
            // SAFETY: a stream of the current device.
            unsafe { driver::wait(stream.raw(), open.raw()) }.unwrap();
            let start = Instant::now();
            swap(&mut nccl, &memory, &peers, 512, stream).expect("it is enqueued");
            drained(stream);
            assert!(start.elapsed() > 2 * SHORT, "{:?}", start.elapsed());
            assert_eq!(nccl.failed(), None);
        });
    }

    #[test]
    #[ignore = "needs the software GPU: tests/run"]
    fn late_errors_say_where() {
        type Inject = unsafe extern "C" fn(Comm, c_int, *const c_char);
        ranks(2, LONG, |mut nccl, device, stream| {
            let memory = DeviceBuffer::new(device, 4096).unwrap();
            if nccl.rank() == 1 {
                failure_of_the_other(&nccl);
                return;
            }
            swap(&mut nccl, &memory, &[1], 512, stream).expect("it is enqueued");
            let name = CString::new("softnccl_inject").unwrap();
            let path = OsString::from(api::find().unwrap().path());
            // SAFETY: open already.
            let library = unsafe { libloading::Library::new(&path) }.unwrap();
            // SAFETY: as it is declared there.
            let inject: Inject = *unsafe { library.get(name) }.expect("the stand-in's");
            let text = CString::new("a link went down").unwrap();
            let late = |_: &Api, comm| {
                // SAFETY: the communicator lives during the call.
                unsafe { inject(comm, 2, text.as_ptr()) };
                Ok(())
            };
            nccl.watched.with(late).unwrap();
            let why = failure(&nccl, LONG);
            assert_eq!(why.status, Status::Nccl, "{why}");
            let start = "rank 0, call 7, step 5, stage 1, exchange with rank 1: NCCL error 2, ";
            assert!(
                why.text.starts_with(start) && why.text.ends_with(": a link went down"),
                "{why}"
            );
            drained(stream);
        });
    }

    /// Stays until the other rank is likely to be through; the communicator then ends without it.
    fn failure_of_the_other(nccl: &Nccl) {
        thread::sleep(SHORT);
        assert_eq!(nccl.failed(), None);
    }

    #[test]
    #[ignore = "needs the software GPU: tests/run"]
    fn sizes_that_differ_are_an_error_on_both() {
        ranks(2, LONG, |mut nccl, device, stream| {
            let memory = DeviceBuffer::new(device, 4096).unwrap();
            let bytes = [512, 528][nccl.rank() as usize];
            let peers = others(&nccl);
            swap(&mut nccl, &memory, &peers, bytes, stream).expect("it is enqueued");
            let why = failure(&nccl, LONG);
            assert_eq!(why.status, Status::Nccl, "{why}");
            assert!(why.text.contains("512 bytes") && why.text.contains("528 bytes"), "{why}");
            drained(stream);
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn any_thread_can_abort() {
        ranks(2, LONG, |mut nccl, device, stream| {
            let memory = DeviceBuffer::new(device, 4096).unwrap();
            let aborter = nccl.aborter();
            if nccl.rank() == 0 {
                swap(&mut nccl, &memory, &[1], 512, stream).expect("it is enqueued");
            }
            thread::scope(|s| s.spawn(move || aborter()).join().expect("no panic"));
            let why = nccl.failed().expect("aborted");
            assert_eq!(why.status, Status::Aborted);
            assert_eq!(why.text, format!("rank {}: the group was aborted", nccl.rank()));
            drained(stream);
            let peers = others(&nccl);
            assert_eq!(swap(&mut nccl, &memory, &peers, 512, stream), Err(why));
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn who_gives_up_keeps_the_first_cause() {
        ranks(2, LONG, |mut nccl, _, _| {
            let why = Error::new(Status::Mismatch, "rank 0: another problem");
            nccl.give_up(why.clone());
            nccl.aborter()();
            assert_eq!(nccl.failed(), Some(why.clone()));
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn the_callers_communicator_is_used_and_left() {
        ranks(2, LONG, |own, device, stream| {
            // The caller's: made here, ended here.
            let comm = own.watched.with(|_, comm| Ok(comm)).unwrap();
            let rank = own.rank();
            for _ in 0..2 {
                // SAFETY: it lives longer.
                let mut nccl = unsafe { adopt(device, comm, LONG) }.expect("a communicator");
                assert_eq!((nccl.rank(), nccl.size()), (rank, 2));
                let memory = DeviceBuffer::new(device, 4096).unwrap();
                swap(&mut nccl, &memory, &[1 - rank], 512, stream).expect("it is enqueued");
                drained(stream);
                assert_eq!(nccl.failed(), None);
            }
            // SAFETY: null is refused.
            let error = unsafe { adopt(device, std::ptr::null_mut(), LONG) }.err().expect("null");
            assert_eq!(error.text, "nccl_comm: got NULL");
            if let Ok(other) = Device::get(device.ordinal + 1) {
                // SAFETY: as above.
                let error = unsafe { adopt(&other, comm, LONG) }.err().expect("another device");
                assert!(
                    error.text.contains(&format!("is of device {}", device.ordinal)),
                    "{error}"
                );
            }
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn a_blocking_communicator_is_adopted_too() {
        let id = UniqueId(unique_id().unwrap());
        let device = Device::get(0).unwrap();
        let one = |rank: c_int| {
            let device = Device::get(rank as u32 % device_count().unwrap()).unwrap();
            let _current = device.enter().unwrap();
            let (api, mut comm, mut config) =
                (api::find().unwrap(), std::ptr::null_mut(), Config::default());
            config.blocking = 1;
            // SAFETY: writes one handle.
            let code = unsafe { (api.comm_init_rank_config)(&mut comm, 2, id, rank, &mut config) };
            assert_eq!(code, SUCCESS);
            let stream = Stream::new(&device, false).unwrap();
            // SAFETY: it lives until the end of this function.
            exchange_much(unsafe { adopt(&device, comm, LONG) }.unwrap(), &device, &stream);
            // SAFETY: nobody uses it any more.
            assert_eq!(unsafe { (api.comm_destroy)(comm) }, SUCCESS);
        };
        drop(device);
        thread::scope(|s| {
            [0, 1]
                .map(|r| {
                    s.spawn({
                        let one = &one;
                        move || one(r)
                    })
                })
                .map(|t| t.join().unwrap())
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn a_warm_up_connects_and_says_what_it_costs() {
        ranks(3, LONG, |mut nccl, _, _| {
            let peers = others(&nccl);
            nccl.warm_up(&[]).expect("nothing to do");
            let before = nccl.memory_bytes();
            nccl.warm_up(&peers).expect("a warm-up");
            let after = nccl.memory_bytes();
            // Older libraries do not say.
            assert!(after > before || api::find().unwrap().version() < 22907, "{before} {after}");
            nccl.warm_up(&peers).expect("another");
            assert_eq!(nccl.memory_bytes(), after);
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn a_warm_up_without_the_peer_has_a_deadline() {
        let done = Meeting::of(2);
        ranks(2, SHORT, |mut nccl, _, _| {
            if nccl.rank() == 0 {
                let error = nccl.warm_up(&[1]).expect_err("nobody is there");
                assert_eq!(error.status, Status::Timeout);
                assert!(
                    error.text.starts_with("rank 0, warm-up, exchange with rank 1: "),
                    "{error}"
                );
            }
            done.wait();
        });
    }

    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn a_rank_that_does_not_join_is_a_timeout() {
        let device = Device::get(0).unwrap();
        let start = Instant::now();
        let error = join(&device, &unique_id().unwrap(), 1, 2, SHORT).err().expect("nobody else");
        assert!(start.elapsed() < 5 * SHORT, "{:?}", start.elapsed());
        assert_eq!(error.status, Status::Timeout, "{error}");
        assert!(
            error.text.starts_with("rank 1: ") && error.text.contains("not all of 2 ranks"),
            "{error}"
        );
        let error = join(&device, &unique_id().unwrap(), 2, 2, SHORT).err().expect("no such rank");
        assert_eq!(error.status, Status::InvalidArgument, "{error}");
    }

    /// In a process of its own: the strictest mode of capture forbids calls to all threads, other tests' included.
    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn exchanges_are_captured_and_replayed() {
        if std::env::var_os("CP_TEST_ALONE").is_none() {
            let (fine, text) =
                child("exchanges_are_captured_and_replayed", &[("CP_TEST_ALONE", "1")]);
            assert!(fine, "{text}");
            return;
        }
        let both = Meeting::of(2);
        ranks(2, LONG, |mut nccl, device, stream| {
            nccl.capturable().expect("since 2.9");
            let peers = others(&nccl);
            nccl.warm_up(&peers).expect("a warm-up");
            let (memory, mirror) = (
                DeviceBuffer::new(device, 1024).unwrap(),
                PinnedBuffer::new(device, 1024).unwrap(),
            );
            // SAFETY: owned, and nothing else knows it while the stream is empty.
            let host = unsafe { std::slice::from_raw_parts_mut(mirror.ptr(), 1024) };
            let (mut graph, mut run) = (std::ptr::null_mut(), std::ptr::null_mut());
            // The strictest mode: until the end of both captures no thread may ask about an event, but the watchdogs have to.
            swap(&mut nccl, &memory, &peers, 512, stream).expect("it is enqueued");
            both.wait();
            // SAFETY: handles are written before they are used; all memory lives until the stream is drained.
            unsafe {
                let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
                check("begin", sys::cuStreamBeginCapture_v2(stream.raw(), mode)).unwrap();
                both.wait();
                for _ in 0..3 {
                    swap(&mut nccl, &memory, &peers, 512, stream).expect("it is captured");
                    // What came goes out again, with the next exchange.
                    copy_on_device(memory.address(), memory.address() + 512, 512, stream.raw())
                        .unwrap();
                }
                thread::sleep(SHORT);
                both.wait();
                check("end", sys::cuStreamEndCapture(stream.raw(), &mut graph)).unwrap();
                both.wait();
                check("make", sys::cuGraphInstantiateWithFlags(&mut run, graph, 0)).unwrap();
            }
            for round in 0..4 {
                host.fill(10 * nccl.rank() as u8 + round);
                // SAFETY: as above.
                unsafe {
                    copy_to_device(memory.address(), mirror.ptr(), 1024, stream.raw()).unwrap();
                    check("launch", sys::cuGraphLaunch(run, stream.raw())).unwrap();
                    copy_to_host(mirror.ptr(), memory.address(), 1024, stream.raw()).unwrap();
                }
                drained(stream);
                // After an odd number of exchanges each has the other's.
                let want = 10 * (1 - nccl.rank()) as u8 + round;
                assert!(host.iter().all(|b| *b == want), "round {round}: {want} {host:?}");
            }
            // SAFETY: made above.
            unsafe {
                check("destroy", sys::cuGraphExecDestroy(run)).unwrap();
                check("destroy", sys::cuGraphDestroy(graph)).unwrap();
            }
            assert_eq!(nccl.failed(), None);
        });
    }

    /// One of these tests in a process of its own, with more environment.
    fn process(test: &str, environment: &[(&str, &str)]) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("transport::device::nccl::tests::cuda::{test}")])
            .args(["--include-ignored", "--nocapture", "--test-threads", "1"])
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Whether it passed, and what it said.
    fn outcome(process: Child) -> (bool, String) {
        let output = process.wait_with_output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("running 1 test"), "{text}");
        (output.status.success(), text.into_owned())
    }

    fn child(test: &str, environment: &[(&str, &str)]) -> (bool, String) {
        outcome(process(test, environment))
    }

    /// Starts three processes of a test, which find their rank and the unique id in their environment.
    fn three(test: &str, environment: &[(&str, &str)]) -> Vec<Child> {
        let id: String = unique_id().unwrap().iter().map(|b| format!("{b:02x}")).collect();
        let start = |rank: &str| {
            let mut all = vec![("CP_TEST_RANK", rank), ("CP_TEST_ID", &id)];
            all.extend(environment);
            process(test, &all)
        };
        ["0", "1", "2"].map(start).into()
    }

    /// The communicator of such a process, if it is one.
    fn of_three(timeout: Duration) -> Option<(Nccl, Arc<Device>)> {
        let rank: u32 = std::env::var("CP_TEST_RANK").ok()?.parse().ok()?;
        let hex = std::env::var("CP_TEST_ID").ok()?;
        let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
        let id: [u8; 128] = std::array::from_fn(byte);
        driver::open().unwrap();
        let device = Device::get(rank % device_count().unwrap()).unwrap();
        Some((join(&device, &id, rank, 3, timeout).expect("all ranks come"), device))
    }

    /// Alone it starts three processes of itself.
    #[test]
    #[ignore = "needs a CUDA device or the software GPU: tests/run"]
    fn many_exchanges_among_processes() {
        let Some((nccl, device)) = of_three(LONG) else {
            for (fine, text) in
                three("many_exchanges_among_processes", &[]).into_iter().map(outcome)
            {
                assert!(fine, "{text}");
            }
            return;
        };
        let _current = device.enter().unwrap();
        exchange_much(nccl, &device, &Stream::new(&device, false).unwrap());
    }

    /// Alone it starts three processes of itself: rank 2's ends without a word; what the others find is in their output.
    #[test]
    #[ignore = "needs the software GPU: tests/run"]
    fn a_process_that_dies_is_found() {
        let Some((mut nccl, device)) = of_three(SHORT) else {
            // NCCL may hang, or may notice: both end with an error.
            for (remote, status) in [("0", "timeout: "), ("1", "NCCL error: ")] {
                let all = three("a_process_that_dies_is_found", &[("SOFTNCCL_REMOTE", remote)]);
                // The dead one first, so that it is not a zombie, which looks alive.
                let mut texts: Vec<_> = all.into_iter().rev().map(|c| outcome(c).1).collect();
                texts.reverse();
                for (rank, text) in texts[..2].iter().enumerate() {
                    let place =
                        format!("rank {rank}, call 7, step 5, stage 1, exchange with ranks ");
                    assert!(text.contains(&format!("found {status}{place}")), "{text}");
                }
                assert_eq!(texts[0].contains("error 6"), remote == "1", "{}", texts[0]);
            }
            return;
        };
        let _current = device.enter().unwrap();
        let peers = others(&nccl);
        nccl.warm_up(&peers).expect("a warm-up");
        if nccl.rank() == 2 {
            std::process::exit(1);
        }
        let (memory, stream) =
            (DeviceBuffer::new(&device, 4096).unwrap(), Stream::new(&device, false).unwrap());
        swap(&mut nccl, &memory, &peers, 512, &stream).expect("it is enqueued");
        println!("found {}", failure(&nccl, LONG));
        drained(&stream);
    }

    /// For `planted_faults_are_found`: deadlines are short, so that a fault that hangs does not hang for long.
    #[test]
    #[ignore = "needs the software GPU: tests/run"]
    fn exchanges_for_faults() {
        ranks(3, Duration::from_secs(2), exchange_much);
    }

    #[test]
    #[ignore = "needs the software GPU: tests/run"]
    fn planted_faults_are_found() {
        let (fine, text) = child("exchanges_for_faults", &[("SOFTGPU_FAULT", "count")]);
        assert!(fine, "{text}");
        for kind in
            ["drop_group_end", "swap_groups", "size", "drop_send", "second_stream", "async_error"]
        {
            let plan = format!("nccl_{kind}:5");
            let (fine, text) = child("exchanges_for_faults", &[("SOFTGPU_FAULT", &plan)]);
            assert!(text.contains(&format!("fault {plan}")), "never planted\n{text}");
            assert!(!fine, "{plan} was not found\n{text}");
        }
    }

    #[test]
    #[ignore = "needs the software GPU: tests/run"]
    fn two_ranks_on_a_device_are_refused_in_nccls_words() {
        let environment = [("SOFTNCCL_DUPLICATE", "1"), ("SOFTGPU_DEVICES", "1")];
        let (fine, text) = child("many_exchanges_among_two", &environment);
        assert!(
            !fine
                && text
                    .contains("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 0"),
            "{text}"
        );
    }
}
