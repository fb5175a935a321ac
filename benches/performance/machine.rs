//! What a reader must know of the machine that the figures are of.

use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// Instructions that decide which kernels run, on our side or the peers'.
const FLAGS: [&str; 8] =
    ["avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "asimddp"];

#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub date: String,
    pub cpu: String,
    pub flags: Vec<String>,
    pub cores: usize,
    pub memory_bytes: u64,
    pub system: String,
    pub rustc: String,
}

impl Machine {
    pub fn inspect() -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.split(':').next().map(str::trim) == Some(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        // x86-64's names, then aarch64's.
        let cpu = field("model name").or_else(|| field("CPU part")).unwrap_or_else(|| "unknown".to_owned());
        let present = field("flags").or_else(|| field("Features")).unwrap_or_default();
        let flags = FLAGS.into_iter().filter(|flag| present.split_whitespace().any(|word| word == *flag));
        Ok(Self {
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            cpu,
            flags: flags.map(str::to_owned).collect(),
            cores: std::thread::available_parallelism()?.get(),
            memory_bytes: memory_bytes()?,
            system: system()?,
            rustc: output("rustc", &["--version"])?,
        })
    }
}

fn memory_bytes() -> Result<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("no MemTotal")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

/// The distribution's name and the kernel's release.
fn system() -> Result<String> {
    let release = std::fs::read_to_string("/etc/os-release")?;
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux");
    Ok(format!("{}, {}", name.trim_matches('"'), output("uname", &["-sr"])?))
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
