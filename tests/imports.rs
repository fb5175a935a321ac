//! Who may import whom: the table of ARCHITECTURE.md, held against every `crate::` path in `src/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A module (or one file of it), the modules of ours it may name, and the crates it must not name.
/// The most specific row counts. `failpoint` is open to all who write durably.
const TABLE: &[(&str, &[&str], &[&str])] = &[
    ("types", &[], IO),
    ("failpoint", &[], IO),
    ("metrics", &[], NETWORK),
    ("config", &["types"], NETWORK),
    ("logging", &["config"], NETWORK),
    ("supervisor", &[], NETWORK),
    ("widest", &[], IO),
    ("model", &["types", "widest"], IO),
    ("eval", &["types", "widest"], IO),
    ("train", &["types", "model", "eval"], IO),
    ("bench", &["types", "model", "eval", "train", "failpoint"], IO),
    ("registry", &["types", "metrics", "failpoint"], &["rdkafka", "candle_core", "axum"]),
    ("store", &["types", "metrics", "failpoint"], &["rdkafka", "candle_core", "axum", "sqlx"]),
    ("ingest", &["types", "metrics", "failpoint", "registry", "store"], &["candle_core", "axum", "sqlx"]),
    ("produce", &["types", "ingest", "store"], &["candle_core", "axum", "sqlx"]),
    (
        "publish",
        &["types", "metrics", "failpoint", "registry", "store", "model"],
        &["rdkafka", "axum", "sqlx"],
    ),
    ("serve", &["types", "metrics", "registry", "store", "model"], &["rdkafka", "sqlx"]),
    (
        "period",
        &["types", "metrics", "failpoint", "registry", "store", "model", "train", "eval", "publish"],
        &["rdkafka", "axum", "sqlx"],
    ),
    ("period/decide", &["types"], IO),
];

/// What a pure part must not name.
const IO: &[&str] = &["tokio", "sqlx", "rdkafka", "object_store", "axum", "reqwest"];
const NETWORK: &[&str] = &["sqlx", "rdkafka", "object_store", "axum", "reqwest", "candle_core"];

/// These put the parts together and may name all of them.
const OPEN: &[&str] = &["app", "cli", "demo", "lib", "main"];

#[test]
fn every_module_imports_only_what_the_table_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let found: Vec<String> = rust_files(&root)
        .into_iter()
        .flat_map(|file| {
            let module = file.strip_prefix(&root).unwrap().with_extension("").display().to_string();
            violations(&module, &fs::read_to_string(&file).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "against the table of ARCHITECTURE.md:\n{}", found.join("\n"));
}

#[test]
fn a_seeded_violation_is_found_in_every_form() {
    for (module, text) in [
        ("ingest/run", "use crate::period::decide::next_step;"),
        ("ingest/run", "use crate::{types::Version, period::decide};"),
        ("ingest/run", "fn f() { crate::train::job::run() }"),
        ("train/job", "use tokio::sync::mpsc;"),
        ("period/decide", "use crate::registry::Registry;"),
        ("unknown/module", "use crate::types::Version;"),
    ] {
        assert_eq!(violations(module, text).len(), 1, "{module}: {text}");
    }
    assert!(
        violations("ingest/run", "// crate::period is where it goes on\nuse crate::types::Version;")
            .is_empty()
    );
    assert!(violations("period/controller", "use crate::registry::Registry;").is_empty());
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path {
            path if path.is_dir() => rust_files(&path),
            path if path.extension().is_some_and(|extension| extension == "rs") => vec![path],
            _ => vec![],
        })
        .collect()
}

fn violations(module: &str, text: &str) -> Vec<String> {
    let top = module.split('/').next().unwrap_or(module);
    if OPEN.contains(&top) {
        return vec![];
    }
    let rows = TABLE.iter().filter(|(row, ..)| module == *row || module.starts_with(&format!("{row}/")));
    let Some((row, allowed, banned)) = rows.max_by_key(|(row, ..)| row.len()) else {
        return vec![format!("src/{module}.rs belongs to no row of the table")];
    };
    // A file's own tests may make the errors and fakes that they need.
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let code: String =
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let ours = named_after(&code, "crate::")
        .into_iter()
        .filter(|name| name != top && !allowed.contains(&name.as_str()));
    let theirs =
        banned.iter().filter(|name| code.contains(&format!("{name}::"))).map(|name| (*name).to_owned());
    ours.chain(theirs)
        .map(|name| format!("src/{module}.rs names `{name}`, which {row} may not import"))
        .collect()
}

/// The first path segments behind each `crate::`, braces opened.
fn named_after(code: &str, root: &str) -> BTreeSet<String> {
    let modules = code.match_indices(root).flat_map(|(at, _)| {
        let rest = &code[at + root.len()..];
        match rest.strip_prefix('{') {
            Some(list) => top_level_names(list),
            None => vec![first_name(rest)],
        }
    });
    // Macros, constants and functions of the crate's root are not modules.
    modules.filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

fn top_level_names(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut start) = (1, vec![], 0);
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || (depth == 1 && c == ',') {
            names.push(first_name(list[start..at].trim_start()));
            start = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn first_name(path: &str) -> String {
    path.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
}
