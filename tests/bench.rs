//! `palimpsest bench` dies at every durable step, just before and just after the write, and the same command goes on.

mod common;

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

fn bench(folder: &Path, out: &str, abort_at: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palimpsest"));
    command
        .arg("bench")
        .arg("--config")
        .arg(folder.join("bench.toml"))
        .arg("--stream")
        .arg(folder.join("stream"));
    command.args(["--methods", "finetune,lwf", "--seeds", "1", "--out"]).arg(folder.join(out));
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
fn a_benchmark_that_dies_at_any_write_ends_with_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_stream(&folder.join("stream"));
    std::fs::write(folder.join("bench.toml"), CONFIG).unwrap();
    let whole = bench(folder, "whole", None);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let expected = results(folder, "whole");
    assert_eq!(expected["runs"].as_array().unwrap().len(), 2);
    for point in POINTS.iter().flat_map(|point| [format!("{point}.before"), format!("{point}.after")]) {
        let died = bench(folder, &point, Some(&point));
        let said = String::from_utf8_lossy(&died.stderr);
        assert!(!died.status.success() && said.contains(&format!("aborting at {point}")), "{point}: {said}");
        let again = bench(folder, &point, None);
        assert!(again.status.success(), "{point}: {}", String::from_utf8_lossy(&again.stderr));
        assert_eq!(results(folder, &point), expected, "{point}");
    }
}
