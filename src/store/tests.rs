use std::os::unix::fs::MetadataExt;

use object_store::memory::InMemory;

use super::testing::{Fault, FaultyStore};
use super::*;

fn local() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path().join("a/b").to_str().unwrap()).unwrap();
    (directory, store)
}

fn both() -> (tempfile::TempDir, [Store; 2]) {
    let (directory, store) = local();
    (directory, [store, Store::new(Arc::new(InMemory::new()))])
}

#[tokio::test]
async fn what_was_put_is_read_back_whole_in_parts_and_by_name() {
    let (_directory, stores) = both();
    for store in stores {
        store.put("x/one", Bytes::from("0123456789")).await.unwrap();
        store.put("x/one", Bytes::from("0123456789")).await.unwrap();
        store.put("x/two/three", Bytes::from("3")).await.unwrap();
        store.put("xy", Bytes::from("not below x")).await.unwrap();
        assert_eq!(store.get("x/one").await.unwrap(), "0123456789");
        assert_eq!(store.get_range("x/one", 2..5).await.unwrap(), "234");
        assert_eq!(store.list("x").await.unwrap(), ["x/one", "x/two/three"]);
        assert!(store.list("nothing/here").await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn deleting_is_idempotent_and_what_is_gone_is_not_found() {
    let (_directory, stores) = both();
    for store in stores {
        store.put("x", Bytes::from("1")).await.unwrap();
        store.delete("x").await.unwrap();
        store.delete("x").await.unwrap();
        let error = store.get("x").await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { path } if path == "x"));
    }
}

/// Writing twice must not truncate what a reader still holds.
#[tokio::test]
async fn a_put_replaces_the_file_and_does_not_write_into_it() {
    let (directory, store) = local();
    let file = directory.path().join("a/b/x");
    store.put("x", Bytes::from("first")).await.unwrap();
    let before = std::fs::metadata(&file).unwrap().ino();
    store.put("x", Bytes::from("second")).await.unwrap();
    assert_ne!(std::fs::metadata(&file).unwrap().ino(), before);
}

#[tokio::test]
async fn bytes_that_are_not_the_stated_ones_are_a_mismatch() {
    let (_directory, store) = local();
    store.put("x", Bytes::from("bytes")).await.unwrap();
    let right = FileRef { path: "x".into(), sha256: Sha256::of(b"bytes"), bytes: 5 };
    assert_eq!(store.get_verified(&right).await.unwrap(), "bytes");
    let wrong_hash = FileRef { sha256: Sha256::of(b"other"), ..right.clone() };
    let wrong_size = FileRef { bytes: 6, ..right };
    for wrong in [wrong_hash, wrong_size] {
        let error = store.get_verified(&wrong).await.unwrap_err();
        assert!(matches!(error, StoreError::Mismatch { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_store_that_is_down_is_unavailable_and_a_repeat_after_recovery_succeeds() {
    let faulty = FaultyStore::new(Arc::new(InMemory::new()));
    let store = Store::new(faulty.clone());
    faulty.take_down(&Op::ALL);
    let errors = [
        store.put("x", Bytes::from("1")).await.unwrap_err(),
        store.get("x").await.unwrap_err(),
        store.list("x").await.unwrap_err(),
        store.delete("x").await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    }
    faulty.recover();
    assert!(matches!(store.get("x").await, Err(StoreError::NotFound { .. })));
    faulty.fail_next(Op::Put, Fault::AnswerLost, 1);
    store.put("x", Bytes::from("1")).await.unwrap_err();
    assert_eq!(store.get("x").await.unwrap(), "1");
    store.put("x", Bytes::from("1")).await.unwrap();
}

#[tokio::test]
async fn a_url_says_which_store_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let url = Url::from_directory_path(directory.path()).unwrap();
    Store::open(url.as_str()).unwrap().put("x", Bytes::from("1")).await.unwrap();
    assert_eq!(std::fs::read(directory.path().join("x")).unwrap(), b"1");
    assert!(Store::open("s3://bucket/prefix").is_ok());
    let error = Store::open("ftp://host/x").unwrap_err().to_string();
    assert!(error.contains("ftp://host/x"), "{error}");
    let file = directory.path().join("file");
    std::fs::write(&file, b"").unwrap();
    assert!(Store::open(file.to_str().unwrap()).is_err());
}

#[tokio::test]
async fn a_name_that_leaves_the_store_is_refused() {
    let (_directory, store) = local();
    let error = store.get("../x").await.unwrap_err();
    assert!(matches!(error, StoreError::InvalidPath { .. }), "{error}");
}
