//! `palimpsest bench` on frames of the sample: who distils forgets less. It dies at every durable step, just before and just after the
//! write, and the same command goes on.

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// What is written durably: a version's files, and the results.
const POINTS: [&str; 6] = [
    "bench.spent.json",
    "bench.checkpoint.safetensors",
    "bench.encoder.safetensors",
    "bench.projector.safetensors",
    "bench.done.json",
    "bench.results",
];

/// Two periods of two labels, twelve frames to train on and four to test on of each.
fn write_stream(folder: &Path) {
    for period in 0..2 {
        for label in 0..2 {
            for (half, count, first) in [("train", 12, 0), ("test", 4, 12)] {
                let target = folder.join(format!("{:02}-part/{half}/label{label}", period + 1));
                std::fs::create_dir_all(&target).unwrap();
                for frame in first..first + count {
                    let png = common::png(&format!("label-{period}-{label}"), frame);
                    std::fs::write(target.join(format!("{frame:02}.png")), png).unwrap();
                }
            }
        }
    }
}

/// The demo's first two periods, every fourth walk tested on.
fn write_sample_stream(folder: &Path) {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples/freedoom");
    let entries = |folder: &Path| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    for period in ["01-bases", "02-inferno"] {
        for map in entries(&samples.join(period)) {
            let label = map.file_name().unwrap();
            for frame in entries(&map) {
                let name = frame.file_name().unwrap().to_str().unwrap();
                let walk: u32 = name["walk".len()..][..2].parse().unwrap();
                let half = if walk % 4 == 3 { "test" } else { "train" };
                let target = folder.join(period).join(half).join(label);
                std::fs::create_dir_all(&target).unwrap();
                symlink(&frame, target.join(name)).unwrap();
            }
        }
    }
}

const SAMPLE_CONFIG: &str = r#"
[model]
architecture = "resnet_small"
image_size = 16
projector_hidden = 64
projector_dim = 32
[train]
batch = 64
first_steps = 120
steps = 120
learning_rate = 0.003
threads = 1
device = "cpu"
[augment]
crop_scale = [0.3, 1.0]
jitter = [0.4, 0.4, 0.4, 0.1]
blur_probability = 0.0
"#;

const CONFIG: &str = r#"
[model]
architecture = "resnet_small"
image_size = 32
projector_hidden = 32
projector_dim = 16
[period]
min_frames = 32
[train]
batch = 8
first_steps = 4
steps = 3
checkpoint_steps = 2
threads = 1
device = "cpu"
[probe]
k = 3
"#;

fn bench(folder: &Path, (out, seeds): (&str, &str), abort_at: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palimpsest"));
    command
        .arg("bench")
        .arg("--config")
        .arg(folder.join("bench.toml"))
        .arg("--stream")
        .arg(folder.join("stream"));
    command
        .args(["--methods", "finetune,lwf", "--jobs", "2", "--seeds", seeds, "--out"])
        .arg(folder.join(out));
    if let Some(point) = abort_at {
        command.env("PALIMPSEST_ABORT_AT", point);
    }
    command.output().unwrap()
}

/// All that the benchmark found out, but for the time it took.
fn results(folder: &Path, out: &str) -> Value {
    let bytes = std::fs::read(folder.join(out).join("results.json")).unwrap();
    let mut results: Value = serde_json::from_slice(&bytes).unwrap();
    for run in results["runs"].as_array_mut().unwrap() {
        run["versions"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .for_each(|version| version["seconds"] = Value::Null);
    }
    results
}

#[test]
fn distillation_forgets_less_than_finetuning() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_sample_stream(&folder.join("stream"));
    std::fs::write(folder.join("bench.toml"), SAMPLE_CONFIG).unwrap();
    let ended = bench(folder, ("out", "2"), None);
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let results = results(folder, "out");
    for probe in ["linear", "knn", "few_shot"] {
        // Of the first period, of both seeds.
        let lost = |method: &str| {
            let runs = results["runs"].as_array().unwrap().iter().filter(|run| run["method"] == method);
            let score =
                |run: &Value, version: usize| run["versions"][version]["scores"][0][probe].as_f64().unwrap();
            runs.map(|run| score(run, 0) - score(run, 1)).collect::<Vec<f64>>()
        };
        let (finetune, lwf) = (lost("finetune"), lost("lwf"));
        assert_eq!((finetune.len(), lwf.len()), (2, 2));
        let mean = |lost: &[f64]| lost.iter().sum::<f64>() / lost.len() as f64;
        assert!(mean(&finetune) > 0.03, "{probe}: {finetune:?}");
        assert!(mean(&lwf) < 0.5 * mean(&finetune), "{probe}: {lwf:?} of {finetune:?}");
        assert!(
            lwf.iter().zip(&finetune).all(|(lwf, finetune)| lwf < finetune),
            "{probe}: {lwf:?} {finetune:?}"
        );
    }
}

#[test]
fn a_benchmark_that_dies_at_any_write_ends_with_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_stream(&folder.join("stream"));
    std::fs::write(folder.join("bench.toml"), CONFIG).unwrap();
    let whole = bench(folder, ("whole", "1"), None);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let expected = results(folder, "whole");
    assert_eq!(expected["runs"].as_array().unwrap().len(), 2);
    for point in POINTS.iter().flat_map(|point| [format!("{point}.before"), format!("{point}.after")]) {
        let died = bench(folder, (&point, "1"), Some(&point));
        let said = String::from_utf8_lossy(&died.stderr);
        assert!(!died.status.success() && said.contains(&format!("aborting at {point}")), "{point}: {said}");
        let again = bench(folder, (&point, "1"), None);
        assert!(again.status.success(), "{point}: {}", String::from_utf8_lossy(&again.stderr));
        assert_eq!(results(folder, &point), expected, "{point}");
    }
}
