//! What a reader must know of the machine that the figures are of.

use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Instructions that decide which kernels run, on our side or the peers'.
const FLAGS: [&str; 8] =
    ["asimddp", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"];

/// Those of them that say what products run at, the widest last.
const WIDEST: [&str; 5] = ["asimddp", "avx2", "avx512f", "avx512_bf16", "amx_bf16"];

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// The GPU and its driver, where rows ran on it.
    pub gpu: Option<String>,
    pub flags: Vec<String>,
    pub cores: usize,
    pub memory_bytes: u64,
    pub system: String,
    pub rustc: String,
}

impl Machine {
    /// `on_gpu`: also of the first GPU.
    pub fn inspect(on_gpu: bool) -> Result<Self> {
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
            cpu,
            gpu: on_gpu.then(gpu).transpose()?,
            flags: flags.map(str::to_owned).collect(),
            cores: std::thread::available_parallelism()?.get(),
            memory_bytes: memory_bytes()?,
            system: system()?,
            rustc: env!("RUSTC_VERSION").to_owned(),
        })
    }

    /// One line: the processor with the widest of the instructions, or the GPU.
    pub fn name(&self) -> String {
        match (&self.gpu, self.flags.iter().rev().find(|flag| WIDEST.contains(&flag.as_str()))) {
            (Some(gpu), _) => gpu.split(',').next().unwrap_or(gpu).to_owned(),
            (None, Some(flag)) => format!("{} with {flag}", self.cpu),
            (None, None) => self.cpu.clone(),
        }
    }

    /// The name in letters, digits and underscores.
    pub fn file_name(&self) -> String {
        let letters = self.name().to_lowercase();
        let words: Vec<&str> =
            letters.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
        words.join("_")
    }
}

/// Whether the processor has instructions for products in bf16.
pub fn has_bf16() -> Result<bool> {
    let flags = Machine::inspect(false)?.flags;
    Ok(flags.iter().any(|flag| flag == "avx512_bf16" || flag == "amx_bf16"))
}

/// As 2026-11-28.
pub fn today() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}

fn gpu() -> Result<String> {
    output("nvidia-smi", &["--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"])
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
