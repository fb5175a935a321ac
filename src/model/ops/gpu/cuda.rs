//! Kernels on a GPU, and what lies between them and candle's tensors.
//!
//! Kernels are compiled to PTX when the program is (`build.rs`); the driver translates a module at its first call and keeps the
//! result. Everything goes through the device's one stream, in order; candle's own operations too.
//!
//! Invariant: of each GPU a process has one [`device`], so one stream.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::{cublasMath_t, cublasSetMathMode};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail,
};

use super::{Argument, Call, Machine, Module, Span, THREADS};

/// The GPU `ordinal`, with a stream of its own: candle's default one is another for each thread that uses it, with no order
/// between them, and steps run on whichever of rayon's threads is free.
pub fn device(ordinal: usize) -> Result<Device> {
    static DEVICES: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = CudaDevice::new_with_stream(ordinal)?;
    // Without it cuBLAS may add up shares of a bf16 product in bf16.
    let exact_sums = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is this device's, and nobody uses it yet.
    unsafe { cublasSetMathMode(*device.cublas_handle().handle(), exact_sums) }.result().w()?;
    // SAFETY: events order streams, and all tensors of this GPU are on this one: the process has no other device of it.
    unsafe { device.disable_event_tracking() };
    let device = Device::Cuda(device);
    devices.insert(ordinal, device.clone());
    Ok(device)
}

impl Module {
    fn ptx(self) -> &'static str {
        macro_rules! compiled {
            ($name:literal) => {
                include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx"))
            };
        }
        match self {
            Module::AdamW => compiled!("adamw"),
            Module::AddBias => compiled!("add_bias"),
            Module::BatchNorm => compiled!("batch_norm"),
            Module::ColumnSums => compiled!("column_sums"),
            Module::Gelu => compiled!("gelu"),
            Module::LayerNorm => compiled!("layer_norm"),
            Module::Softmax => compiled!("softmax"),
            Module::Unfold => compiled!("unfold"),
        }
    }
}

impl Machine for CudaDevice {
    type Memory = CudaSlice<f32>;
    type Table = CudaSlice<u64>;

    fn allocate(&self, elements: usize) -> Result<Self::Memory> {
        // SAFETY: f32 has no invalid bits, and operations read only what a kernel has written.
        unsafe { self.alloc::<f32>(elements) }
    }

    fn span<'a>(&self, memory: &'a Self::Memory) -> Span<'a> {
        span_of(self, memory, 0, memory.len())
    }

    fn upload(&self, words: &[u64]) -> Result<Self::Table> {
        self.clone_htod(words)
    }

    fn table(&self, table: &Self::Table) -> Argument {
        let stream = self.cuda_stream();
        let (address, _) = table.device_ptr(&stream);
        Argument::Address(address)
    }

    unsafe fn launch(&self, call: Call) -> Result<()> {
        let function = self.get_or_load_custom_func(call.kernel, call.module.name(), call.module.ptx())?;
        let mut arguments = function.builder();
        for argument in &call.arguments {
            match argument {
                Argument::Address(value) => arguments.arg(value),
                Argument::Count(value) => arguments.arg(value),
                Argument::Number(value) => arguments.arg(value),
            };
        }
        let grid = LaunchConfig {
            grid_dim: (call.blocks, 1, 1),
            block_dim: (THREADS as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: what the caller of this function promises.
        unsafe { arguments.launch(grid) }.w()?;
        Ok(())
    }
}

/// Elements `[start, start + elements)` of `slice`.
fn span_of<'a>(device: &CudaDevice, slice: &'a CudaSlice<f32>, start: usize, elements: usize) -> Span<'a> {
    let stream = device.cuda_stream();
    // The guard would record an event for other streams: there are none.
    let (address, _) = slice.device_ptr(&stream);
    let offset = (start * size_of::<f32>()) as u64;
    // SAFETY: the memory belongs to `slice`, which is borrowed for `'a`; the caller's layout lies inside it.
    unsafe { Span::new(address + offset, elements) }
}

/// The elements of a contiguous tensor, as an operation's forward pass is given them.
pub(in crate::model::ops) fn span<'a>(storage: &'a CudaStorage, layout: &Layout) -> Result<Span<'a>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!(
            "kernel needs a contiguous tensor, found strides {:?} for shape {:?}",
            layout.stride(),
            layout.shape()
        )
    };
    Ok(span_of(storage.device(), storage.as_cuda_slice::<f32>()?, start, end - start))
}

/// A read lock on a contiguous tensor, as an operation's backward pass needs it.
pub(in crate::model::ops) struct View<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> View<'a> {
    pub(in crate::model::ops) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        View { storage, layout }
    }

    pub(in crate::model::ops) fn span(&self) -> Result<Span<'_>> {
        match &*self.storage {
            Storage::Cuda(storage) => span(storage, self.layout),
            _ => bail!("kernel needs a tensor on the gpu"),
        }
    }
}

/// What a forward pass hands to candle.
pub(in crate::model::ops) fn into_storage(memory: CudaSlice<f32>, device: &CudaDevice) -> CudaStorage {
    CudaStorage::wrap_cuda_slice(memory, device.clone())
}

/// A tensor outside any graph.
pub(in crate::model::ops) fn into_tensor(
    memory: CudaSlice<f32>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    Tensor::from_storage(Storage::Cuda(into_storage(memory, device)), shape, BackpropOp::none(), false)
}
