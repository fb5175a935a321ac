//! Migrations are compiled in: a new file among them must rebuild the crate. Benchmarks say which compiler made them. With the
//! feature `cuda` our kernels become PTX, which the program carries.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    let compiler = std::env::var("RUSTC").expect("cargo names the compiler");
    let version = Command::new(compiler).arg("--version").output().expect("the compiler runs").stdout;
    println!("cargo:rustc-env=RUSTC_VERSION={}", String::from_utf8_lossy(&version).trim());
    #[cfg(feature = "cuda")]
    compile_kernels();
}

/// Every `.cu` below `src/model/ops` becomes a `.ptx` of its name in `OUT_DIR`.
#[cfg(feature = "cuda")]
fn compile_kernels() {
    println!("cargo:rerun-if-changed=src/model/ops");
    println!("cargo:rerun-if-env-changed=NVCC");
    let kernels = cudaforge::KernelBuilder::new().source_dir("src/model/ops").watch(["src/model/ops/gpu"]);
    let kernels = kernels.arg("-std=c++17").arg("-O3");
    if let Err(error) = kernels.build_ptx() {
        panic!("the kernels of src/model/ops do not compile: {error}");
    }
}
