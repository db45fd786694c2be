//! Times the CPU kernels alone, without plans or ranks: `cargo run --release --example kernel_bench [-- seq heads dim kv_heads threads document]`.
//!
//! GFLOP/s count 4·H·D per pair of a query and a key it sees forward, and 2.5 times that backward, whatever the kernel really
//! does. `document` is the length of the documents the sequence is made of, the whole sequence by default.
//! Every figure is the best of five runs, because other load only ever makes them slower, and with one thread it is CPU time. The
//! instruction set is the widest one, or `CP_SIMD`.

use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::backend::{Backward, Delta, Forward, HeadMap, Output, View};
use context_parallel::dtype::DType;
use context_parallel::error::Result;
use context_parallel::mask::Slice;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a whole number"));
    let mut next = |default| args.next().unwrap_or(default);
    let (seq, heads, dim) = (next(4096), next(8), next(128));
    let (kv_heads, threads, document) = (next(heads), next(1), next(seq));
    let mut cpu = Cpu::new(threads, Simd::from_env()?)?;
    println!(
        "{}, {threads} thread(s), S={seq}/{document} H={heads}/{kv_heads} D={dim}",
        cpu.simd().name()
    );
    println!("{:5} {:7} {:>12} {:>12}   GFLOP/s", "type", "mask", "forward", "backward");
    for dtype in DType::ALL {
        for mask in ["full", "causal"] {
            let slices = documents(seq, document, mask == "causal");
            let (forward, backward) = measure(&mut cpu, &slices, seq, heads, dim, kv_heads, dtype)?;
            println!("{:5} {mask:7} {forward:>12.1} {backward:>12.1}", dtype.name());
        }
    }
    println!("scratch: {} KiB", cpu.scratch_bytes() / 1024);
    Ok(())
}

/// Documents of one length, one after another; the last may be shorter.
fn documents(seq: usize, document: usize, causal: bool) -> Vec<Slice> {
    let slice = |start: usize| {
        let n = document.min(seq - start) as u32;
        let hi = if causal { 0 } else { n as i32 };
        Slice { q: start as u32, q_len: n, k: start as u32, k_len: n, lo: -(n as i32), hi }
    };
    (0..seq).step_by(document).map(slice).collect()
}

/// Seconds of this process on a CPU, for one thread; of the clock on the wall otherwise.
fn seconds(threads: usize) -> f64 {
    let clock = if threads == 1 { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for the call.
    let result = unsafe { libc::clock_gettime(clock, &mut now) };
    assert_eq!(result, 0, "clock_gettime");
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// Memory for a dense tensor, filled with small numbers that are valid in every type.
fn tensor(dtype: DType, rows: usize, heads: usize, dim: usize) -> (Vec<u32>, View) {
    let count = (rows * heads * dim * dtype.size()).div_ceil(4);
    let mut state = 1u32;
    let mut number = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let x = (state >> 16) as f32 / 32768.0 - 1.0;
        match dtype {
            DType::F32 => x.to_bits(),
            DType::Bf16 => u32::from(half::bf16::from_f32(x).to_bits()) * 0x1_0001,
            DType::F16 => u32::from(half::f16::from_f32(x).to_bits()) * 0x1_0001,
            DType::Fp8(_) => unreachable!("no tensor is stored so"),
        }
    };
    let mut memory: Vec<u32> = (0..count).map(|_| number()).collect();
    let view = View::dense(memory.as_mut_ptr().cast(), dtype, rows, heads, dim);
    (memory, view)
}

fn measure(
    cpu: &mut Cpu,
    slices: &[Slice],
    seq: usize,
    heads: usize,
    dim: usize,
    kv_heads: usize,
    dtype: DType,
) -> Result<(f64, f64)> {
    let threads = cpu.threads();
    let (_q, q) = tensor(dtype, seq, heads, dim);
    let (_k, k) = tensor(dtype, seq, kv_heads, dim);
    let (_v, v) = tensor(dtype, seq, kv_heads, dim);
    let (_o, out) = tensor(dtype, seq, heads, dim);
    let (_d, d_out) = tensor(dtype, seq, heads, dim);
    let (_l, lse) = tensor(DType::F32, seq, heads, 1);
    let (_e, delta) = tensor(DType::F32, seq, heads, 1);
    let (_dq, dq) = tensor(DType::F32, seq, heads, dim);
    let (_dk, dk) = tensor(DType::F32, seq, kv_heads, dim);
    let (_dv, dv) = tensor(DType::F32, seq, kv_heads, dim);
    let map = HeadMap { q_first: 0, group: (heads / kv_heads) as u32, kv_first: 0 };
    let scale = 1.0 / (dim as f32).sqrt();
    let forward = Forward {
        effects: None,
        q,
        k,
        v,
        slices,
        heads: map,
        scale,
        state: None,
        first: true,
        last: Some(Output { out, lse, top: None }),
    };
    let backward = Backward {
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        slices,
        heads: map,
        scale,
        effects: None,
        dq,
        dk,
        dv,
    };
    let mut progress = || Ok(());
    let (mut times_forward, mut times_backward) = ([0f64; 5], [0f64; 5]);
    for run in 0..5 {
        let start = seconds(threads);
        // SAFETY: all tensors are dense, of the shapes named, and alive.
        unsafe { cpu.forward(&forward, &mut progress)? };
        times_forward[run] = seconds(threads) - start;
        // SAFETY: as above.
        unsafe { cpu.delta(&Delta { out, d_out, delta }) };
        let start = seconds(threads);
        // SAFETY: as above.
        unsafe { cpu.backward(&backward, &mut progress)? };
        times_backward[run] = seconds(threads) - start;
    }
    times_forward.sort_by(f64::total_cmp);
    times_backward.sort_by(f64::total_cmp);
    let pairs: u64 = slices.iter().map(Slice::pairs).sum();
    let work = 4.0 * pairs as f64 * (heads * dim) as f64 / 1e9;
    Ok((work / times_forward[0], 2.5 * work / times_backward[0]))
}
