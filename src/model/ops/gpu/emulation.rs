//! Runs kernels on the CPU: their own text, compiled by the machine's C++ compiler with `emulation.h` in CUDA's place.
//!
//! It finds what a GPU would not say: elements written outside a span (each allocation stands between guards), or into what was
//! to be read only; elements read outside, or before they were written (guards, fresh allocations and shared memory are NaN);
//! threads that don't meet at a barrier; barriers that are missing (a kernel runs twice, its threads in opposite order, and both
//! must give the same bits); arguments of another number or size than the kernel's.

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candle_core::{Device, Result, Shape, Tensor, bail};

use super::{Argument, Call, Machine, Module, Span, THREADS};

/// f32 before and behind each allocation, which no kernel may touch.
const GUARD: usize = 1024;
/// What guards hold: a NaN that no arithmetic gives, so that a sum over it is seen too.
const UNTOUCHED: u32 = 0x7fc0_dead;

pub(in crate::model::ops) struct Emulation {
    library: &'static Library,
    order: Order,
}

/// In which order a block's threads, and a grid's blocks, get to run.
#[derive(Clone, Copy)]
enum Order {
    Ascending,
    Descending,
}

impl Emulation {
    /// With all kernels of ours.
    pub(in crate::model::ops) fn new() -> Self {
        Emulation { library: Library::ours(), order: Order::Ascending }
    }
}

/// See [`Machine::Memory`]. Checked when it is dropped.
pub(in crate::model::ops) struct Memory {
    /// Guard, elements, guard.
    all: Box<[UnsafeCell<f32>]>,
    /// The bits of what kernels may read and not write.
    read_only: Option<Vec<u32>>,
}

impl Memory {
    /// What kernels read.
    pub(in crate::model::ops) fn of(tensor: &Tensor) -> Self {
        let mut memory = Self::moving(tensor);
        memory.read_only = Some(bits(&memory.values()));
        memory
    }

    /// What kernels change.
    pub(in crate::model::ops) fn moving(tensor: &Tensor) -> Self {
        let values = tensor.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap();
        Self::guarded(&values.to_vec1::<f32>().unwrap())
    }

    fn guarded(values: &[f32]) -> Self {
        let guard = [f32::from_bits(UNTOUCHED); GUARD];
        let all = guard.iter().chain(values).chain(&guard);
        Memory { all: all.map(|&value| UnsafeCell::new(value)).collect(), read_only: None }
    }

    /// # Panics
    /// When a kernel wrote where it may not.
    fn values(&self) -> Vec<f32> {
        // SAFETY: kernels have ended when `launch` returns, and nothing else writes.
        let all: Vec<f32> = self.all.iter().map(|value| unsafe { *value.get() }).collect();
        let inside = GUARD..all.len() - GUARD;
        let outside = all[..inside.start].iter().chain(&all[inside.end..]);
        assert!(
            outside.into_iter().all(|value| value.to_bits() == UNTOUCHED),
            "a kernel wrote outside its memory"
        );
        let values = all[inside].to_vec();
        if let Some(given) = &self.read_only {
            assert!(*given == bits(&values), "a kernel wrote into what it was to read");
        }
        values
    }

    pub(in crate::model::ops) fn tensor(&self, shape: impl Into<Shape>) -> Tensor {
        Tensor::from_vec(self.values(), shape, &Device::Cpu).unwrap()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.values();
        }
    }
}

impl Machine for Emulation {
    type Memory = Memory;
    type Table = Box<[u64]>;

    fn allocate(&self, elements: usize) -> Result<Memory> {
        Ok(Memory::guarded(&vec![f32::NAN; elements]))
    }

    fn span<'a>(&self, memory: &'a Memory) -> Span<'a> {
        let elements = &memory.all[GUARD..memory.all.len() - GUARD];
        // SAFETY: the elements are borrowed for as long as the span, and cells may be written through an address.
        unsafe { Span::new(elements.as_ptr() as u64, elements.len()) }
    }

    fn upload(&self, words: &[u64]) -> Result<Box<[u64]>> {
        Ok(words.into())
    }

    fn table(&self, table: &Box<[u64]>) -> Argument {
        Argument::Address(table.as_ptr() as u64)
    }

    unsafe fn launch(&self, call: Call) -> Result<()> {
        let Some(kernel) = self.library.kernel(call.kernel) else {
            bail!("{} has no kernel {}", call.module.name(), call.kernel)
        };
        let pointer = |argument: &Argument| match argument {
            Argument::Address(value) => ((value as *const u64).cast(), size_of_val(value)),
            Argument::Count(value) => ((value as *const u32).cast(), size_of_val(value)),
            Argument::Number(value) => ((value as *const f32).cast(), size_of_val(value)),
        };
        let (mut pointers, sizes): (Vec<*const c_void>, Vec<usize>) =
            call.arguments.iter().map(pointer).unzip();
        let expected = self.library.sizes(call.kernel);
        if sizes != expected {
            bail!("{}: arguments of {sizes:?} bytes for parameters of {expected:?}", call.kernel);
        }
        // SAFETY: what the caller of this function promises; the text that comes back is a constant of the library.
        let descending = matches!(self.order, Order::Descending);
        let error = unsafe { kernel(call.blocks, THREADS as u32, descending, pointers.as_mut_ptr()) };
        if error.is_null() {
            return Ok(());
        }
        let text = unsafe { CStr::from_ptr(error) };
        bail!("{}: {}", call.kernel, text.to_string_lossy())
    }
}

/// What `operation` gives on the emulated machine, once it gave the same bits with its threads in either order.
pub(in crate::model::ops) fn emulate(operation: impl Fn(&Emulation) -> Result<Vec<Memory>>) -> Vec<Memory> {
    emulate_with(Library::ours(), operation)
}

fn emulate_with(
    library: &'static Library,
    operation: impl Fn(&Emulation) -> Result<Vec<Memory>>,
) -> Vec<Memory> {
    let run = |order| operation(&Emulation { library, order }).unwrap();
    let (first, second) = (run(Order::Ascending), run(Order::Descending));
    let same = first.iter().map(|memory| bits(&memory.values()));
    let same = same.eq(second.iter().map(|memory| bits(&memory.values())));
    assert!(same, "the order of threads changes the result: a barrier is missing");
    first
}

/// Compiled kernels. Never closed.
struct Library {
    handle: *mut c_void,
}

// SAFETY: dlsym may be called by any thread, and the emulation runs one kernel at a time.
unsafe impl Send for Library {}
unsafe impl Sync for Library {}

/// EMULATED in `emulation.h`: blocks, threads, whether they run in descending order, pointers to the arguments; null or an
/// error's text.
type Emulated = unsafe extern "C" fn(u32, u32, bool, *mut *const c_void) -> *const c_char;

impl Library {
    fn ours() -> &'static Library {
        static OURS: OnceLock<Library> = OnceLock::new();
        OURS.get_or_init(|| Library::compile(&Module::ALL.map(source)))
    }

    /// # Panics
    /// With what the compiler says, where it finds an error or a warning.
    fn compile(sources: &[String]) -> Self {
        let mut text = String::new();
        for source in sources {
            text.push_str(source);
            kernels(source).into_iter().for_each(|kernel| text.push_str(&format!("EMULATED({kernel})\n")));
        }
        let folder = tempfile::tempdir().unwrap();
        let (file, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
        std::fs::write(&file, text).unwrap();
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let mut command = Command::new(compiler);
        command.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I"]);
        let output = command.arg(operations()).arg("-o").arg(&library).arg(&file).output();
        let output = output.expect("a C++ compiler runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = CString::new(library.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the library is ours, and its constructors start nothing.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "{} does not load", library.display());
        Library { handle }
    }

    fn kernel(&self, name: &str) -> Option<Emulated> {
        // SAFETY: the symbol, where there is one, is a function of this type.
        unsafe { std::mem::transmute(self.symbol(&format!("emulate_{name}"))) }
    }

    /// Of a kernel's parameters, in bytes.
    fn sizes(&self, name: &str) -> Vec<usize> {
        // SAFETY: as above.
        let size: Option<unsafe extern "C" fn(u32) -> u32> =
            unsafe { std::mem::transmute(self.symbol(&format!("size_in_{name}"))) };
        let Some(size) = size else { return Vec::new() };
        // SAFETY: it reads an array of its own.
        (0..).map(|index| unsafe { size(index) } as usize).take_while(|&size| size > 0).collect()
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: the library is never closed.
        unsafe { libc::dlsym(self.handle, name.as_ptr()) }
    }
}

fn operations() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/model/ops")
}

fn source(module: Module) -> String {
    let path = operations().join(module.name()).with_extension("cu");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Names of a source's kernels.
fn kernels(source: &str) -> Vec<&str> {
    let rest = source.split("__global__ void ").skip(1);
    rest.map(|rest| rest.split('(').next().unwrap()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::model::ops::gradient_check::random;

    /// What is wrong with each is what its name says.
    const FAULTY: &str = r#"
        #include "gpu/common.cuh"
        extern "C" __global__ void writes_outside(float* x) { x[blockDim.x] = 1.0f; }
        extern "C" __global__ void misses_a_barrier(float* x) {
          __shared__ float shared[256];
          shared[threadIdx.x] = x[threadIdx.x];
          x[threadIdx.x] = shared[255 - threadIdx.x];
        }
        extern "C" __global__ void meets_nobody(float* x) {
          if (threadIdx.x == 0) return;
          __syncthreads();
          x[threadIdx.x] = 1.0f;
        }
        extern "C" __global__ void reads_outside(float* x) { x[threadIdx.x] = x[threadIdx.x + 1] + 1.0f; }
        extern "C" __global__ void reads_what_nobody_wrote(float* x) { x[threadIdx.x] += 1.0f; }
    "#;

    fn faulty(order: Order) -> Emulation {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        let library = LIBRARY.get_or_init(|| Library::compile(&[FAULTY.to_owned()]));
        Emulation { library, order }
    }

    fn run(kernel: &'static str, order: Order, memory: Option<&Memory>) -> Result<Vec<f32>> {
        let machine = faulty(order);
        let fresh = machine.allocate(THREADS)?;
        let memory = memory.unwrap_or(&fresh);
        let arguments = vec![machine.span(memory).into()];
        let call = Call { module: Module::ColumnSums, kernel, blocks: 1, arguments };
        // SAFETY: each takes one address; what it does beyond is inside the guards.
        unsafe { machine.launch(call) }?;
        Ok(memory.values())
    }

    #[test]
    fn every_kernel_of_a_source_is_found() {
        assert_eq!(kernels("__global__ void a(int x) {}\nextern \"C\" __global__ void b() {}"), ["a", "b"]);
        for module in Module::ALL {
            assert!(!kernels(&source(module)).is_empty(), "{}", module.name());
        }
        let files = std::fs::read_dir(operations()).unwrap().map(|entry| entry.unwrap().path());
        let sources = files.filter(|path| path.extension().is_some_and(|end| end == "cu"));
        let names: BTreeSet<String> =
            sources.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
        assert_eq!(names, BTreeSet::from(Module::ALL.map(|module| module.name().to_owned())));
    }

    #[test]
    #[should_panic(expected = "wrote outside")]
    fn a_kernel_that_writes_outside_its_memory_is_found() {
        let _ = run("writes_outside", Order::Ascending, None);
    }

    #[test]
    #[should_panic(expected = "wrote into what it was to read")]
    fn a_kernel_that_writes_into_what_it_was_to_read_is_found() {
        let _ = run("misses_a_barrier", Order::Ascending, Some(&Memory::of(&random(THREADS, 1))));
    }

    #[test]
    fn what_lies_outside_is_no_number() {
        let memory = Memory::moving(&random(THREADS, 1));
        let values = run("reads_outside", Order::Ascending, Some(&memory)).unwrap();
        assert!(values[THREADS - 1].is_nan());
    }

    #[test]
    fn arguments_that_are_not_the_kernels_are_refused() {
        let machine = faulty(Order::Ascending);
        for arguments in [vec![], vec![Argument::Count(1)], vec![Argument::Address(0), Argument::Count(1)]] {
            let call = Call { module: Module::ColumnSums, kernel: "writes_outside", blocks: 1, arguments };
            // SAFETY: it is refused before anything runs.
            assert!(unsafe { machine.launch(call) }.unwrap_err().to_string().contains("arguments of"));
        }
    }

    #[test]
    fn a_missing_barrier_changes_the_result_with_the_order() {
        let given = || Memory::moving(&random(THREADS, 1));
        let results = [Order::Ascending, Order::Descending]
            .map(|order| bits(&run("misses_a_barrier", order, Some(&given())).unwrap()));
        assert_ne!(results[0], results[1]);
    }

    #[test]
    fn a_barrier_that_not_all_threads_reach_is_an_error() {
        let error = run("meets_nobody", Order::Ascending, None).unwrap_err().to_string();
        assert!(error.contains("meets_nobody: threads wait for others that have ended"), "{error}");
    }

    #[test]
    fn what_nobody_wrote_is_no_number() {
        let values = run("reads_what_nobody_wrote", Order::Ascending, None).unwrap();
        assert!(values.iter().all(|value| value.is_nan()));
    }

    #[test]
    fn a_kernel_that_is_not_there_is_an_error() {
        assert!(run("forgotten", Order::Ascending, None).is_err());
    }
}
