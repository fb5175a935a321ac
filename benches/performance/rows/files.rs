//! The files of a row's folder.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use palimpsest::train::rng::{Domain, Draws, Place};
use serde::Serialize;
use serde::de::DeserializeOwned;

const PLAN: &str = "plan.json";

/// config/default.toml, whose sizes are measured.
pub fn defaults() -> Result<toml::Table> {
    Ok(include_str!("../../../config/default.toml").parse()?)
}

/// `key` of table `section` of the defaults.
pub fn default<T: DeserializeOwned>(defaults: &toml::Table, section: &str, key: &str) -> Result<T> {
    let value = defaults.get(section).and_then(|table| table.get(key));
    let value = value.with_context(|| format!("config/default.toml has no {section}.{key}"))?;
    Ok(value.clone().try_into()?)
}

pub fn write_plan(folder: &Path, plan: &impl Serialize) -> Result<()> {
    Ok(std::fs::write(folder.join(PLAN), serde_json::to_vec(plan)?)?)
}

pub fn read_plan<T: DeserializeOwned>(folder: &Path) -> Result<T> {
    Ok(serde_json::from_slice(&read(folder, PLAN)?)?)
}

pub fn read(folder: &Path, name: &str) -> Result<Vec<u8>> {
    std::fs::read(folder.join(name)).with_context(|| format!("{name} of the row's folder"))
}

pub fn write_tensors(folder: &Path, name: &str, tensors: HashMap<&str, Tensor>) -> Result<()> {
    Ok(candle_core::safetensors::save(&tensors, folder.join(name))?)
}

pub fn read_tensor(folder: &Path, file: &str, name: &str) -> Result<Tensor> {
    let mut tensors = candle_core::safetensors::load(folder.join(file), &Device::Cpu)?;
    tensors.remove(name).with_context(|| format!("{file} has no tensor {name:?}"))
}

/// Uniform numbers with mean 0 and deviation 1; equal for equal seeds.
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let place = Place { domain: Domain::Augmentation, step: 0, frame: 0, view: 0 };
    let mut draws = Draws::new(seed, place);
    let half_width = 3f64.sqrt();
    (0..count).map(|_| draws.between(-half_width, half_width) as f32).collect()
}
