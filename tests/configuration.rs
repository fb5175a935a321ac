//! What a wrong configuration gets: every mistake at once, with its place and with what would be right.

use std::process::{Command, Output};

fn check(text: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broken.toml");
    std::fs::write(&file, text).unwrap();
    Command::new(env!("CARGO_BIN_EXE_palimpsest"))
        .args(["config", "check", "--config"])
        .arg(&file)
        .output()
        .unwrap()
}

#[test]
fn five_mistakes_in_one_file_give_five_messages_and_exit_code_2() {
    let output = check(
        r#"
        [period]
        length = "soon"
        min_frames = 9
        [train]
        metod = "lwf"
        tau = -1.0
        [kafka]
        start = "middle"
        "#,
    );
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8(output.stderr).unwrap();
    for (key, value) in [
        ("period.length", "soon"),
        ("period.min_frames", "9"),
        ("train.metod", "method"),
        ("train.tau", "-1"),
        ("kafka.start", "middle"),
    ] {
        let line = told.lines().find(|line| line.contains(key)).unwrap_or_else(|| panic!("{key} in {told}"));
        assert!(line.contains(value), "{line}");
    }
    assert!(told.contains("broken.toml"), "{told}");
}

/// An image that ingest took and training refuses would fail its period.
#[test]
fn ingest_takes_no_image_that_training_does_not_decode() {
    use palimpsest::model::preprocess::MAX_PIXELS;
    assert!(check(&format!("[ingest]\nmax_pixels = {MAX_PIXELS}\n")).status.success());
    let output = check(&format!("[ingest]\nmax_pixels = {}\n", MAX_PIXELS + 1));
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_right_file_passes() {
    let output = check("[train]\nmethod = \"cassle\"\n");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_unknown_command_is_wrong_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_palimpsest")).arg("fly").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn the_compose_files_configuration_is_right() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(env!("CARGO_BIN_EXE_palimpsest"))
        .args(["config", "check", "--config"])
        .arg(root.join("deploy/compose/palimpsest.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
