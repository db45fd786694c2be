//! A device with a stream, and tensors that are on both sides.

use crate::backend::View;
use crate::backend::cuda::{Cuda, Staging};
use crate::driver::{
    self, CUdeviceptr, CUstream, Device, DeviceBuffer, Guard, PinnedBuffer, Stream,
};
use crate::dtype::DType;
use half::{bf16, f16};
use std::sync::Arc;

/// Numbers for tests; xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// In [−1, 1), not far from normal.
    pub fn value(&mut self) -> f32 {
        let bits = self.next();
        let sum: i64 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i64).sum();
        (sum - 131_070) as f32 / 131_072.0
    }
}

/// Device 0, current as long as this lives.
pub struct Bench {
    pub device: Arc<Device>,
    pub stream: Stream,
    pub staging: Staging,
    pub cuda: Cuda,
    _current: Guard,
}

impl Bench {
    pub fn new() -> Bench {
        let hint = "a CUDA device, or the software GPU on LD_LIBRARY_PATH";
        let device = Device::get(0).expect(hint);
        Bench {
            stream: Stream::new(&device, false).unwrap(),
            staging: Staging::new(device.clone()),
            cuda: Cuda::new(device.clone()).expect("build with CP_CUDA=require"),
            _current: device.enter().unwrap(),
            device,
        }
    }

    pub fn stream(&self) -> CUstream {
        self.stream.raw()
    }

    pub fn wait(&self) {
        // SAFETY: the device is current.
        unsafe { driver::synchronize(self.stream()).unwrap() };
    }

    /// Uploads a blob, aligned, into memory of its own.
    pub fn upload(&mut self, blob: &[u8]) -> DeviceBuffer {
        let buffer = DeviceBuffer::new(&self.device, blob.len().max(1)).unwrap();
        // SAFETY: the buffer is large enough, and outlives the copy: freeing waits, or the caller does.
        unsafe {
            self.staging
                .upload(blob, (0, &[]), buffer.address(), self.stream.raw(), false)
                .unwrap();
        }
        buffer
    }

    /// A tensor of NaN.
    pub fn tensor(&self, dtype: DType, shape: [usize; 3], layout: Layout) -> Tensor {
        Tensor::new(&self.device, dtype, shape, layout)
    }

    /// A tensor with random values in some of its rows, on the device too; NaN in all others.
    pub fn filled(
        &self,
        dtype: DType,
        shape: [usize; 3],
        layout: Layout,
        seed: u64,
        used: impl Fn(usize) -> bool,
    ) -> Tensor {
        let mut tensor = self.tensor(dtype, shape, layout);
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        tensor.each(|row, _, _| used(row).then(|| random.value()));
        tensor.push(self.stream());
        tensor
    }
}

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Dense,
    /// Gaps between rows.
    Gaps,
    /// Batch entries of so many rows, as [batch, head, row].
    Bhsd(usize),
    /// The same as [row, batch, head].
    Sbhd(usize),
}

pub struct Tensor {
    /// Of the host.
    pub view: View,
    bytes: PinnedBuffer,
    device: DeviceBuffer,
}

impl Tensor {
    fn new(device: &Arc<Device>, dtype: DType, shape: [usize; 3], layout: Layout) -> Tensor {
        let [rows, heads, dim] = shape;
        let mut view = View::dense(std::ptr::null_mut(), dtype, rows, heads, dim);
        let gap = if dim == 1 { 1 } else { 16 };
        match layout {
            Layout::Dense => {}
            Layout::Gaps => {
                view.stride_head = dim + if dim == 1 { 0 } else { gap };
                view.stride_row = heads * view.stride_head + gap;
            }
            Layout::Bhsd(length) => {
                view.rows_per_batch = length;
                view.stride_row = dim;
                view.stride_head = length * dim;
                view.stride_batch = heads * length * dim;
            }
            Layout::Sbhd(length) => {
                view.rows_per_batch = length;
                view.stride_batch = heads * dim;
                view.stride_row = rows.div_ceil(length) * heads * dim;
            }
        }
        let corners = |row: usize| view.offset(row, heads.max(1) - 1) + dim;
        let elements = (0..rows).map(corners).max().unwrap_or(0) + gap;
        let size = elements * dtype.size();
        let bytes = PinnedBuffer::new(device, size).unwrap();
        // SAFETY: of this size; all bytes 0xff are NaN in every type.
        unsafe { bytes.ptr().write_bytes(0xff, size) };
        view.ptr = bytes.ptr();
        Tensor { view, bytes, device: DeviceBuffer::new(device, size).unwrap() }
    }

    /// The view of the device's copy.
    pub fn on_device(&self) -> View {
        View { ptr: self.device.address() as *mut u8, ..self.view }
    }

    pub fn get(&self, row: usize, head: usize, d: usize) -> f32 {
        let at = self.view.at(row, head);
        // SAFETY: inside the tensor.
        unsafe {
            match self.view.dtype {
                DType::F32 => at.cast::<f32>().add(d).read(),
                DType::Bf16 => bf16::from_bits(at.cast::<u16>().add(d).read()).to_f32(),
                DType::F16 => f16::from_bits(at.cast::<u16>().add(d).read()).to_f32(),
                DType::Fp8(_) => unreachable!("no tensor is stored so"),
            }
        }
    }

    pub fn set(&mut self, row: usize, head: usize, d: usize, value: f32) {
        let at = self.view.at(row, head);
        // SAFETY: inside the tensor.
        unsafe {
            match self.view.dtype {
                DType::F32 => at.cast::<f32>().add(d).write(value),
                DType::Bf16 => at.cast::<u16>().add(d).write(bf16::from_f32(value).to_bits()),
                DType::F16 => at.cast::<u16>().add(d).write(f16::from_f32(value).to_bits()),
                DType::Fp8(_) => unreachable!("no tensor is stored so"),
            }
        }
    }

    /// Sets elements for which there is a value.
    pub fn each(&mut self, mut value: impl FnMut(usize, usize, usize) -> Option<f32>) {
        for row in 0..self.view.rows {
            for head in 0..self.view.heads {
                for d in 0..self.view.dim {
                    if let Some(value) = value(row, head, d) {
                        self.set(row, head, d, value);
                    }
                }
            }
        }
    }

    /// The host's bytes to the device; waits.
    pub fn push(&self, stream: CUstream) {
        // SAFETY: both are as large.
        unsafe {
            let to = self.device.address();
            driver::copy_to_device(to, self.bytes.ptr(), self.bytes.bytes(), stream).unwrap();
            driver::synchronize(stream).unwrap();
        }
    }

    /// The device's bytes to the host; bytes that are in no element must be as they were.
    pub fn pull(&mut self, stream: CUstream) {
        let before = self.all_bytes().to_vec();
        // SAFETY: both are as large.
        unsafe {
            let from: CUdeviceptr = self.device.address();
            driver::copy_to_host(self.bytes.ptr(), from, self.bytes.bytes(), stream).unwrap();
            driver::synchronize(stream).unwrap();
        }
        let mut outside = vec![true; before.len()];
        let (view, size) = (self.view, self.view.dtype.size());
        for (row, head) in (0..view.rows).flat_map(|r| (0..view.heads).map(move |h| (r, h))) {
            outside[view.offset(row, head) * size..][..view.dim * size].fill(false);
        }
        let changed = |i: &usize| outside[*i] && before[*i] != self.all_bytes()[*i];
        let first = (0..before.len()).find(changed);
        assert_eq!(first, None, "a byte outside the rows was written: {view:?}");
    }

    pub fn all_bytes(&self) -> &[u8] {
        // SAFETY: owned and initialised.
        unsafe { std::slice::from_raw_parts(self.bytes.ptr(), self.bytes.bytes()) }
    }

    /// The same numbers in a dense fp32 tensor of the host.
    pub fn plain(&self) -> Plain {
        let [rows, heads, dim] = [self.view.rows, self.view.heads, self.view.dim];
        let mut plain = Plain::new([rows, heads, dim]);
        let mut at = plain.values.iter_mut();
        for (row, head) in (0..rows).flat_map(|r| (0..heads).map(move |h| (r, h))) {
            (0..dim).for_each(|d| *at.next().unwrap() = self.get(row, head, d));
        }
        plain
    }
}

/// A dense fp32 tensor of the host.
#[derive(Clone)]
pub struct Plain {
    shape: [usize; 3],
    pub values: Vec<f32>,
}

impl Plain {
    pub fn new(shape: [usize; 3]) -> Plain {
        Plain { shape, values: vec![0.0; shape.iter().product()] }
    }

    pub fn view(&mut self) -> View {
        let [rows, heads, dim] = self.shape;
        View::dense(self.values.as_mut_ptr().cast(), DType::F32, rows, heads, dim)
    }

    pub fn get(&self, row: usize, head: usize, d: usize) -> f32 {
        self.values[(row * self.shape[1] + head) * self.shape[2] + d]
    }
}

/// Relative error in the L2 norm; exact where `want` is 0 or infinite.
pub fn compare(name: &str, got: &Tensor, want: &Plain, most: f64) {
    let (mut error, mut norm) = (0.0, 0.0);
    let view = got.view;
    for (row, head) in (0..view.rows).flat_map(|r| (0..view.heads).map(move |h| (r, h))) {
        for d in 0..view.dim {
            let (x, y) = (got.get(row, head, d), want.get(row, head, d));
            assert!(!x.is_nan(), "{name}[{row}, {head}, {d}]: NaN, expected {y}");
            if y == 0.0 || y.is_infinite() {
                assert_eq!(x, y, "{name}[{row}, {head}, {d}]");
            } else {
                error += f64::from(x - y).powi(2);
                norm += f64::from(y).powi(2);
            }
        }
    }
    let relative = (error / norm.max(1e-30)).sqrt();
    assert!(relative <= most, "{name}: relative error {relative:.3e}, allowed {most:.3e}");
}
