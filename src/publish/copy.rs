//! Brings a candidate's files to where its version is served from.
//!
//! Order: every file, each read back and compared with its hash, then the manifest. So a prefix that has a manifest
//! has all its files, and an interrupted copy is begun again: what is already there and right stays. Until the
//! registry says that the version is visible nobody reads any of it.

use bytes::Bytes;

use crate::failpoint;
use crate::store::{Store, StoreError};
use crate::types::FileRef;

use super::file;

/// Copies `files` (names relative to both prefixes) from `from` to `to` and writes `manifest` last. Idempotent; a source
/// that is gone is no error where the target is there already.
///
/// # Errors
/// `Mismatch` where a file's bytes are not those that its hash states, on either side; `NotFound` where it is on
/// neither.
pub async fn copy_version(
    store: &Store,
    from: &str,
    to: &str,
    files: &[FileRef],
    manifest: Bytes,
) -> Result<(), StoreError> {
    for file in files {
        copy_file(store, from, to, file).await?;
    }
    let path = format!("{to}/{}", file::MANIFEST);
    failpoint::reach("publish.manifest.before");
    store.put(&path, manifest).await?;
    failpoint::reach("publish.manifest.after");
    Ok(())
}

async fn copy_file(store: &Store, from: &str, to: &str, file: &FileRef) -> Result<(), StoreError> {
    let target = FileRef { path: format!("{to}/{}", file.path), ..file.clone() };
    match store.get_verified(&target).await {
        Ok(_) => return Ok(()),
        Err(StoreError::NotFound { .. } | StoreError::Mismatch { .. }) => {}
        Err(error) => return Err(error),
    }
    let source = FileRef { path: format!("{from}/{}", file.path), ..file.clone() };
    let bytes = store.get_verified(&source).await?;
    failpoint::reach("publish.copy.before");
    store.put(&target.path, bytes).await?;
    failpoint::reach("publish.copy.after");
    store.get_verified(&target).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Sha256;

    const FROM: &str = "main/attempts/p/a0001/s000001";
    const TO: &str = "main/versions/v000001";

    /// A local store with a candidate of two files.
    async fn candidate() -> (tempfile::TempDir, Store, Vec<FileRef>) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        let mut files = Vec::new();
        for (path, content) in [("encoder.safetensors", "weights"), ("embeddings/00000.parquet", "rows")] {
            store.put(&format!("{FROM}/{path}"), content.into()).await.unwrap();
            let (sha256, bytes) = (Sha256::of(content.as_bytes()), content.len() as u64);
            files.push(FileRef { path: path.into(), sha256, bytes });
        }
        (folder, store, files)
    }

    async fn copied(store: &Store, files: &[FileRef]) -> Result<(), StoreError> {
        copy_version(store, FROM, TO, files, Bytes::from_static(b"manifest")).await
    }

    async fn text(store: &Store, name: &str) -> String {
        String::from_utf8(store.get(&format!("{TO}/{name}")).await.unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn files_and_manifest_arrive_and_a_repeat_needs_no_source() {
        let (_folder, store, files) = candidate().await;
        copied(&store, &files).await.unwrap();
        assert_eq!(text(&store, "encoder.safetensors").await, "weights");
        assert_eq!(text(&store, "manifest.json").await, "manifest");
        for file in &files {
            store.delete(&format!("{FROM}/{}", file.path)).await.unwrap();
        }
        copied(&store, &files).await.unwrap();
        assert_eq!(text(&store, "embeddings/00000.parquet").await, "rows");
    }

    #[tokio::test]
    async fn a_damaged_target_is_written_anew() {
        let (_folder, store, files) = candidate().await;
        store.put(&format!("{TO}/encoder.safetensors"), "half".into()).await.unwrap();
        copied(&store, &files).await.unwrap();
        assert_eq!(text(&store, "encoder.safetensors").await, "weights");
    }

    #[tokio::test]
    async fn a_damaged_source_is_refused_and_leaves_no_manifest() {
        let (_folder, store, files) = candidate().await;
        store.put(&format!("{FROM}/embeddings/00000.parquet"), "rot".into()).await.unwrap();
        assert!(matches!(copied(&store, &files).await, Err(StoreError::Mismatch { .. })));
        let manifest = store.get(&format!("{TO}/manifest.json")).await;
        assert!(matches!(manifest, Err(StoreError::NotFound { .. })));
    }

    #[tokio::test]
    async fn a_file_that_is_nowhere_is_an_error() {
        let (_folder, store, mut files) = candidate().await;
        files[0].path = "missing.safetensors".into();
        assert!(matches!(copied(&store, &files).await, Err(StoreError::NotFound { .. })));
    }
}
