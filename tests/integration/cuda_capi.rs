//! The C ABI on CUDA: how ranks meet, communicators of the caller's, graphs. Results are compared to the CPU's through the same ABI.

use context_parallel::capi::abi::*;
use context_parallel::capi::about::cp_last_error;
use context_parallel::capi::attention::*;
use context_parallel::capi::group::*;
use context_parallel::driver::{self, CUstream, Device, DeviceBuffer, Stream};
use cudarc::driver::sys;
use half::bf16;
use libc::c_void;
use std::ffi::{CStr, c_int};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

const SEQ: usize = 96;
const HEADS: usize = 2;
const DIM: usize = 64;

fn text() -> String {
    // SAFETY: the thread's own text, ended by 0.
    unsafe { CStr::from_ptr(cp_last_error()) }.to_string_lossy().into_owned()
}

#[track_caller]
fn good(status: cp_status) {
    assert!(status == CP_OK, "{}", text());
}

#[track_caller]
fn bad(status: cp_status, wanted: cp_status, words: &str) {
    assert!(status == wanted && text().contains(words), "got {status}: {}; wanted {words}", text());
}

fn zeroed<T: Copy>() -> T {
    // SAFETY: the ABI's structs are plain data for which all zeros is valid.
    unsafe { std::mem::zeroed() }
}

/// Q, K, V and dO of the whole sequence, or O, dQ, dK, dV: `[seq, heads, dim]` each.
type Tensors = [Vec<bf16>; 4];

fn inputs(seed: u64) -> Tensors {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut number = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bf16::from_f32(((state >> 40) as f32 / (1 << 23) as f32) - 1.0)
    };
    std::array::from_fn(|_| (0..SEQ * HEADS * DIM).map(|_| number()).collect())
}

/// A rank's rows of a contiguous partition.
fn rows(rank: u32, size: u32) -> std::ops::Range<usize> {
    let at = |r: u32| r as usize * SEQ / size as usize * HEADS * DIM;
    at(rank)..at(rank + 1)
}

/// Memory of one tensor, where the layer computes.
enum Memory {
    Host(Vec<u8>),
    Device(DeviceBuffer),
}

impl Memory {
    fn ptr(&self) -> *mut c_void {
        match self {
            Memory::Host(v) => v.as_ptr().cast_mut().cast(),
            Memory::Device(b) => b.address() as *mut c_void,
        }
    }
}

/// One rank's tensors: q, k, v, d_out, out, dq, dk, dv, lse.
struct Rank {
    memory: Vec<Memory>,
    seq: usize,
    device: Option<Arc<Device>>,
}

impl Rank {
    fn new(device: Option<Arc<Device>>, seq: usize) -> Rank {
        let bytes = |i: usize| if i == 8 { HEADS * seq * 4 } else { HEADS * seq * DIM * 2 };
        let make = |i| match &device {
            None => Memory::Host(vec![0xff; bytes(i)]),
            Some(d) => Memory::Device(DeviceBuffer::new(d, bytes(i)).unwrap()),
        };
        Rank { memory: (0..9).map(make).collect(), seq, device }
    }

    fn tensor(&self, i: usize) -> cp_tensor {
        let (seq, heads, dim) = (self.seq as i64, HEADS as i64, DIM as i64);
        let mut t: cp_tensor = zeroed();
        t.data = self.memory[i].ptr();
        t.device_type = if self.device.is_some() { CP_DEVICE_CUDA } else { CP_DEVICE_CPU };
        t.dtype_lanes = 1;
        if i == 8 {
            (t.dtype_code, t.dtype_bits, t.ndim) = (CP_CODE_FLOAT, 32, 3);
            t.shape = [1, heads, seq, 0];
            t.stride = [heads * seq, seq, 1, 0];
        } else {
            (t.dtype_code, t.dtype_bits, t.ndim) = (CP_CODE_BFLOAT, 16, 4);
            t.shape = [1, seq, heads, dim];
            t.stride = [seq * heads * dim, heads * dim, dim, 1];
        }
        t
    }

    fn put(&mut self, i: usize, values: &[bf16], stream: CUstream) {
        let bytes = values.len() * 2;
        match &mut self.memory[i] {
            // SAFETY: as many bytes.
            Memory::Host(v) => unsafe { v.as_mut_ptr().copy_from(values.as_ptr().cast(), bytes) },
            // SAFETY: as many bytes; the copy is done before the values may go.
            Memory::Device(b) => unsafe {
                driver::copy_to_device(b.address(), values.as_ptr().cast(), bytes, stream).unwrap();
                driver::synchronize(stream).unwrap();
            },
        }
    }

    fn get(&self, i: usize, stream: CUstream) -> Vec<f32> {
        let mut values = vec![bf16::ZERO; self.seq * HEADS * DIM];
        let (to, bytes) = (values.as_mut_ptr().cast::<u8>(), values.len() * 2);
        match &self.memory[i] {
            // SAFETY: as many bytes.
            Memory::Host(v) => unsafe { to.copy_from(v.as_ptr(), bytes) },
            // SAFETY: as many bytes; the copy is done before they are read.
            Memory::Device(b) => unsafe {
                driver::copy_to_host(to, b.address(), bytes, stream).unwrap();
                driver::synchronize(stream).unwrap();
            },
        }
        values.into_iter().map(bf16::to_f32).collect()
    }

    fn fill(&mut self, all: &Tensors, rank: u32, size: u32, stream: CUstream) {
        for (i, values) in all.iter().enumerate() {
            self.put(i, &values[rows(rank, size)], stream);
        }
    }
}

fn layer(device: bool) -> *mut cp_attention {
    let mut c: cp_attention_config = zeroed();
    c.struct_size = size_of::<cp_attention_config>() as u32;
    (c.heads, c.head_dim_qk, c.dtype) = (HEADS as u32, DIM as u32, CP_DTYPE_BF16);
    (c.flags, c.partition) = (CP_ATTENTION_CAUSAL, CP_PARTITION_CONTIGUOUS);
    c.device_type = if device { CP_DEVICE_CUDA } else { CP_DEVICE_CPU };
    let mut made = null_mut();
    // SAFETY: a good configuration.
    good(unsafe { cp_attention_create(&c, &mut made) });
    made
}

fn sequences() -> cp_sequences {
    let mut s: cp_sequences = zeroed();
    s.struct_size = size_of::<cp_sequences>() as u32;
    (s.count, s.seq_q) = (1, SEQ as u32);
    s
}

fn forward(
    layer: *mut cp_attention,
    r: &Rank,
    context: &mut cp_context,
    workspace: Option<&DeviceBuffer>,
    stream: CUstream,
) -> cp_status {
    let s = sequences();
    let mut a: cp_forward_args = zeroed();
    a.struct_size = size_of::<cp_forward_args>() as u32;
    (a.sequences, a.context) = (&s, context);
    (a.q, a.k, a.v, a.out, a.lse) =
        (r.tensor(0), r.tensor(1), r.tensor(2), r.tensor(4), r.tensor(8));
    if let Some(w) = workspace {
        (a.workspace, a.workspace_bytes) = (w.address() as *mut c_void, w.bytes());
    }
    // SAFETY: a live layer, tensors as they say.
    unsafe { cp_attention_forward(layer, &a, stream.cast()) }
}

fn backward(layer: *mut cp_attention, r: &Rank, context: &cp_context, stream: CUstream) {
    let s = sequences();
    let mut a: cp_backward_args = zeroed();
    a.struct_size = size_of::<cp_backward_args>() as u32;
    (a.sequences, a.context) = (&s, context);
    (a.q, a.k, a.v, a.d_out) = (r.tensor(0), r.tensor(1), r.tensor(2), r.tensor(3));
    (a.out, a.lse) = (r.tensor(4), r.tensor(8));
    (a.dq, a.dk, a.dv) = (r.tensor(5), r.tensor(6), r.tensor(7));
    // SAFETY: as in `forward`.
    good(unsafe { cp_attention_backward(layer, &a, stream.cast()) });
}

/// O, dQ, dK, dV of one rank alone on the CPU.
fn expected(all: &Tensors) -> [Vec<f32>; 4] {
    let layer = layer(false);
    let mut r = Rank::new(None, SEQ);
    r.fill(all, 0, 1, null_mut());
    let mut context = zeroed();
    good(forward(layer, &r, &mut context, None, null_mut()));
    backward(layer, &r, &context, null_mut());
    // SAFETY: used by nobody.
    good(unsafe { cp_attention_destroy(layer) });
    [4, 5, 6, 7].map(|i| r.get(i, null_mut()))
}

#[track_caller]
fn close(got: &[f32], wanted: &[f32], what: &str) {
    let square = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
    let error = square(&mut got.iter().zip(wanted).map(|(a, b)| a - b));
    let size = square(&mut wanted.iter().copied());
    assert!(error < 0.02 * size, "{what}: error {error} of {size}");
}

/// Compares this rank's O and gradients.
fn compare(r: &Rank, wanted: &[Vec<f32>; 4], rank: u32, size: u32, stream: CUstream) {
    for (i, name) in [(4, "out"), (5, "dq"), (6, "dk"), (7, "dv")] {
        let what = format!("{name} of rank {rank} of {size}");
        close(&r.get(i, stream), &wanted[i - 4][rows(rank, size)], &what);
    }
}

fn config(rank: u32, size: u32, id: Option<&cp_unique_id>) -> cp_group_config {
    let mut c: cp_group_config = zeroed();
    c.struct_size = size_of::<cp_group_config>() as u32;
    (c.rank, c.size, c.timeout_ms) = (rank, size, 60_000);
    c.id = id.map_or(null(), |id| id);
    c.device_type = CP_DEVICE_CUDA;
    c
}

fn init(c: &cp_group_config) -> *mut cp_group {
    let mut group = null_mut();
    // SAFETY: a good configuration.
    good(unsafe { cp_group_init(c, &mut group) });
    group
}

fn unique_id() -> cp_unique_id {
    let mut id = cp_unique_id { bytes: [0; 128] };
    // SAFETY: room for one.
    good(unsafe { cp_get_unique_id(&mut id) });
    id
}

/// Runs `f` for every rank in a thread, with the device current.
fn on_all(size: u32, f: impl Fn(u32, &Arc<Device>, CUstream) + Sync) {
    thread::scope(|scope| {
        for rank in 0..size {
            let f = &f;
            scope.spawn(move || {
                let device = Device::get(0).unwrap();
                let _current = device.enter().unwrap();
                let stream = Stream::new(&device, false).unwrap();
                f(rank, &device, stream.raw());
                // SAFETY: a stream of the current device.
                unsafe { driver::synchronize(stream.raw()) }.unwrap();
            });
        }
    });
}

/// Two rounds of forward and backward on `group`, which end with it.
fn use_group(
    group: *mut cp_group,
    (rank, size): (u32, u32),
    device: &Arc<Device>,
    all: &Tensors,
    wanted: &[Vec<f32>; 4],
    stream: CUstream,
) {
    let layer = layer(true);
    let mut r = Rank::new(Some(device.clone()), rows(rank, size).len() / HEADS / DIM);
    r.fill(all, rank, size, stream);
    // SAFETY: live handles, used by this thread alone.
    unsafe {
        good(cp_set_group(layer, group, null()));
        for _ in 0..2 {
            let mut context = zeroed();
            good(forward(layer, &r, &mut context, None, stream));
            backward(layer, &r, &context, stream);
            compare(&r, wanted, rank, size, stream);
        }
        good(cp_attention_destroy(layer));
        good(cp_group_destroy(group));
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn every_transport_kind() {
    let all = inputs(1);
    let wanted = expected(&all);
    let kinds = [CP_TRANSPORT_AUTO, CP_TRANSPORT_LOCAL, CP_TRANSPORT_NCCL, CP_TRANSPORT_STAGED];
    for (kind, size) in kinds.into_iter().zip([3, 2, 2, 4]) {
        for flags in [0, CP_GROUP_AGREE] {
            let id = unique_id();
            on_all(size, |rank, device, stream| {
                let mut c = config(rank, size, Some(&id));
                (c.transport_kind, c.flags) = (kind, flags);
                use_group(init(&c), (rank, size), device, &all, &wanted, stream);
            });
        }
    }
    on_all(1, |_, device, stream| {
        use_group(init(&config(0, 1, None)), (0, 1), device, &all, &wanted, stream);
    });
}

/// What is missing on one rank is an error of all.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn one_rank_without_its_device() {
    let id = unique_id();
    on_all(2, |rank, _, _| {
        let mut c = config(rank, 2, Some(&id));
        c.device_id = if rank == 1 { 4095 } else { 0 };
        let mut group = null_mut();
        // SAFETY: a good configuration but for the device.
        let status = unsafe { cp_group_init(&c, &mut group) };
        let wanted = if rank == 1 { CP_ERR_INVALID_ARGUMENT } else { CP_ERR_MISMATCH };
        bad(status, wanted, "device_id: got 4095");
    });
}

type GetUniqueId = unsafe extern "C" fn(*mut cp_unique_id) -> c_int;
type InitRank = unsafe extern "C" fn(*mut *mut c_void, c_int, cp_unique_id, c_int) -> c_int;
type Destroy = unsafe extern "C" fn(*mut c_void) -> c_int;

/// The functions of NCCL that a caller with a communicator of its own has called.
struct Nccl {
    get_unique_id: GetUniqueId,
    init_rank: InitRank,
    destroy: Destroy,
}

impl Nccl {
    fn open() -> Nccl {
        // SAFETY: opens a library of a fixed name, whose functions have these types.
        unsafe {
            let library = libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW);
            assert!(!library.is_null(), "libnccl.so.2");
            let symbol = |name: &CStr| libc::dlsym(library, name.as_ptr());
            Nccl {
                get_unique_id: std::mem::transmute::<*mut c_void, GetUniqueId>(symbol(
                    c"ncclGetUniqueId",
                )),
                init_rank: std::mem::transmute::<*mut c_void, InitRank>(symbol(
                    c"ncclCommInitRank",
                )),
                destroy: std::mem::transmute::<*mut c_void, Destroy>(symbol(c"ncclCommDestroy")),
            }
        }
    }
}

/// The caller's own communicator: alone, where hosts have no way to agree, and with an id beside it.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn communicator_of_the_callers() {
    let (all, size) = (inputs(2), 2);
    let wanted = expected(&all);
    let nccl = Nccl::open();
    for with_id in [false, true] {
        let mut nccl_id = cp_unique_id { bytes: [0; 128] };
        // SAFETY: room for one.
        assert_eq!(unsafe { (nccl.get_unique_id)(&mut nccl_id) }, 0);
        let id = unique_id();
        on_all(size, |rank, device, stream| {
            let mut comm = null_mut();
            // SAFETY: the device is current.
            let made =
                unsafe { (nccl.init_rank)(&mut comm, size as c_int, nccl_id, rank as c_int) };
            assert_eq!(made, 0);
            let mut c = config(0, 0, with_id.then_some(&id));
            c.nccl_comm = comm;
            let mut group = null_mut();
            // SAFETY: good configurations but for what is said; live handles.
            unsafe {
                c.rank = 1 - rank;
                c.size = size;
                let words = format!("nccl_comm is rank {rank} of 2");
                bad(cp_group_init(&c, &mut group), CP_ERR_INVALID_ARGUMENT, &words);
                (c.rank, c.size) = (0, 0);
                if !with_id {
                    c.flags = CP_GROUP_AGREE;
                    bad(cp_group_init(&c, &mut group), CP_ERR_UNSUPPORTED, "CP_GROUP_AGREE");
                    c.flags = 0;
                }
                group = init(&c);
                match with_id {
                    true => good(cp_group_barrier(group)),
                    false => bad(cp_group_barrier(group), CP_ERR_UNSUPPORTED, "barrier"),
                }
            }
            use_group(group, (rank, size), device, &all, &wanted, stream);
            // SAFETY: the group has ended; the communicator is still the caller's.
            assert_eq!(unsafe { (nccl.destroy)(comm) }, 0);
        });
    }
}

/// An allgather among threads. It makes the last rank look as if it were on another host, where the library asks for that.
struct Gather {
    size: usize,
    turn: Barrier,
    blobs: Mutex<Vec<Vec<u8>>>,
    calls: AtomicUsize,
}

struct Gatherer<'a>(&'a Gather, usize);

unsafe extern "C" fn gather(
    ctx: *mut c_void,
    mine: *const c_void,
    all: *mut c_void,
    bytes: usize,
) -> i32 {
    // SAFETY: what `several_hosts` gave, and memory as the callback's contract says.
    let (Gatherer(shared, rank), mine) =
        unsafe { (&*ctx.cast::<Gatherer>(), std::slice::from_raw_parts(mine.cast::<u8>(), bytes)) };
    let mut blob = mine.to_vec();
    if bytes == 136 && *rank == shared.size - 1 {
        blob[128] ^= 1;
    }
    shared.calls.fetch_add(1, Ordering::SeqCst);
    shared.blobs.lock().unwrap()[*rank] = blob;
    shared.turn.wait();
    let joined = shared.blobs.lock().unwrap().concat();
    // SAFETY: room for everybody's bytes.
    unsafe { all.cast::<u8>().copy_from(joined.as_ptr(), joined.len()) };
    shared.turn.wait();
    0
}

/// With nothing but the caller's allgather NCCL connects ranks of several hosts; other ways say that they cannot.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn several_hosts() {
    let (all, size) = (inputs(5), 2);
    let wanted = expected(&all);
    for (kind, calls) in [(CP_TRANSPORT_AUTO, 2), (CP_TRANSPORT_NCCL, 2), (CP_TRANSPORT_STAGED, 1)]
    {
        let shared = Gather {
            size: size as usize,
            turn: Barrier::new(size as usize),
            blobs: Mutex::new(vec![Vec::new(); size as usize]),
            calls: AtomicUsize::new(0),
        };
        on_all(size, |rank, device, stream| {
            let gatherer = Gatherer(&shared, rank as usize);
            let mut c = config(rank, size, None);
            c.transport_kind = kind;
            c.allgather = Some(gather);
            c.allgather_ctx = (&raw const gatherer).cast_mut().cast();
            if kind == CP_TRANSPORT_STAGED {
                let mut group = null_mut();
                // SAFETY: a configuration that is refused.
                let status = unsafe { cp_group_init(&c, &mut group) };
                assert!(status != CP_OK && group.is_null(), "{}", text());
                return;
            }
            use_group(init(&c), (rank, size), device, &all, &wanted, stream);
        });
        assert_eq!(shared.calls.into_inner(), calls * size as usize, "kind {kind}");
    }
}

/// Begins a capture, for this thread.
fn begin(stream: CUstream) {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: an own stream.
    driver::check("begin", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }).unwrap();
}

/// Ends it; the graph can be launched.
fn end(stream: CUstream) -> sys::CUgraphExec {
    let (mut graph, mut made) = (null_mut(), null_mut());
    // SAFETY: an own stream; the graph is the one that was captured.
    unsafe {
        driver::check("end", sys::cuStreamEndCapture(stream, &mut graph)).unwrap();
        driver::check("make", sys::cuGraphInstantiateWithFlags(&mut made, graph, 0)).unwrap();
        driver::check("destroy", sys::cuGraphDestroy(graph)).unwrap();
    }
    made
}

/// A captured forward replays on what the inputs hold then. Where hosts meet it is refused, and nothing is lost by that.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn captured_in_a_graph() {
    let (first, second) = (inputs(3), inputs(4));
    let wanted = [expected(&first), expected(&second)];
    for (kind, size, captured) in [
        (CP_TRANSPORT_NCCL, 1, true),
        (CP_TRANSPORT_NCCL, 2, true),
        (CP_TRANSPORT_LOCAL, 2, false),
        (CP_TRANSPORT_STAGED, 2, false),
    ] {
        let id = unique_id();
        on_all(size, |rank, device, stream| {
            let mut c = config(rank, size, (size > 1).then_some(&id));
            c.transport_kind = kind;
            let (group, layer) = (init(&c), layer(true));
            let local = rows(rank, size);
            let mut r = Rank::new(Some(device.clone()), local.len() / HEADS / DIM);
            let mut bytes = 0;
            // SAFETY: live handles, used by this thread alone.
            unsafe {
                good(cp_set_group(layer, group, null()));
                good(cp_attention_workspace_size(layer, SEQ as u32, &mut bytes));
            }
            let workspace = DeviceBuffer::new(device, bytes).unwrap();
            let mut context = zeroed();
            r.fill(&first, rank, size, stream);
            good(forward(layer, &r, &mut context, Some(&workspace), stream));
            close(&r.get(4, stream), &wanted[0][0][local.clone()], "before the capture");
            begin(stream);
            if captured {
                // The layer's own workspace may move before the graph is launched.
                bad(forward(layer, &r, &mut context, None, stream), CP_ERR_NOT_CAPTURABLE, "NULL");
                good(forward(layer, &r, &mut context, Some(&workspace), stream));
            } else {
                let status = forward(layer, &r, &mut context, Some(&workspace), stream);
                assert!(status == CP_ERR_NOT_CAPTURABLE || status == CP_ERR_MISMATCH, "{}", text());
                assert!(text().contains("cannot be captured"), "{}", text());
            }
            let graph = end(stream);
            if captured {
                for (all, wanted) in [(&second, &wanted[1]), (&first, &wanted[0])] {
                    r.fill(all, rank, size, stream);
                    r.put(4, &vec![bf16::NAN; local.len()], stream);
                    // SAFETY: an own graph and stream.
                    driver::check("launch", unsafe { sys::cuGraphLaunch(graph, stream) }).unwrap();
                    close(&r.get(4, stream), &wanted[0][local.clone()], "replayed");
                }
            }
            // SAFETY: an own graph, not running any more.
            driver::check("destroy", unsafe { sys::cuGraphExecDestroy(graph) }).unwrap();
            r.fill(&second, rank, size, stream);
            good(forward(layer, &r, &mut context, Some(&workspace), stream));
            close(&r.get(4, stream), &wanted[1][0][local], "after the capture");
            // SAFETY: used by nobody any more.
            unsafe {
                good(cp_attention_destroy(layer));
                good(cp_group_destroy(group));
            }
        });
    }
}
