//! Migrations are compiled in: a new file among them must rebuild the crate. And benchmarks say which compiler made them.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=migrations");
    let compiler = std::env::var("RUSTC").expect("cargo names the compiler");
    let version = Command::new(compiler).arg("--version").output().expect("the compiler runs").stdout;
    println!("cargo:rustc-env=RUSTC_VERSION={}", String::from_utf8_lossy(&version).trim());
}
