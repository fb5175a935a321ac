//! Objects: segments, probe sets, candidates, versions. A thin layer over `object_store`.
//!
//! Owns: which store a URL names, that a local write is durable (file and directory fsynced), that a write is
//! idempotent, that every request is timed. Leaves to others: what an object means (the registry says that).
//!
//! A write replaces the object as a whole, so repeating one with the same bytes changes nothing; no conditional
//! write is ever used. [`Store::put`] passes the failpoints `store.put.before` and `store.put.after`.

pub mod paths;
pub mod segment;
pub mod sweep;
#[cfg(test)]
pub mod testing;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, ObjectStoreScheme};
use reqwest::Url;

use crate::failpoint;
use crate::types::{FileRef, Sha256};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("object {path} does not exist")]
    NotFound { path: String },
    /// The store did not answer or refused: try again; a write may have happened.
    #[error("{op} {path} failed: {source}")]
    Unavailable { op: Op, path: String, source: object_store::Error },
    /// The object's bytes are not those that its [`FileRef`] states: somebody must act.
    #[error("object {path} holds {found}, not {expected}")]
    Mismatch { path: String, expected: String, found: String },
    #[error("{path:?} can't be the name of an object: {source}")]
    InvalidPath { path: String, source: object_store::path::Error },
    /// The URL names no store that can be opened: wrong configuration.
    #[error("store {url:?} can't be opened: {reason}")]
    Open { url: String, reason: String },
}

pub type Result<T> = std::result::Result<T, StoreError>;

/// What a request does: the label `op` of its metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    Put,
    Get,
    List,
    Delete,
}

impl Op {
    pub const ALL: [Self; 4] = [Self::Put, Self::Get, Self::List, Self::Delete];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::List => "list",
            Self::Delete => "delete",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A handle on one store; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
}

impl Store {
    /// Opens what `url` names: `file:///dir` or a plain path (the directory is made where it is missing),
    /// `s3://bucket/prefix`, `gs://...`, `az://...`. Those take their options (keys, region, endpoint, ...) from the
    /// environment: every `AWS_*`, `GOOGLE_*` or `AZURE_*` variable that `object_store` knows. Sends no request.
    pub fn open(url: &str) -> Result<Self> {
        let fail = |reason: String| StoreError::Open { url: url.to_owned(), reason };
        if !url.contains("://") {
            return Self::open_directory(FilePath::new(url)).map_err(|e| fail(e.to_string()));
        }
        let parsed = Url::parse(url).map_err(|e| fail(e.to_string()))?;
        if parsed.scheme() == "file" {
            let directory = parsed
                .to_file_path()
                .map_err(|()| fail("it is not an absolute path on this machine".into()))?;
            return Self::open_directory(&directory).map_err(|e| fail(e.to_string()));
        }
        let (scheme, _) = ObjectStoreScheme::parse(&parsed).map_err(|e| fail(e.to_string()))?;
        let (store, prefix) = object_store::parse_url_opts(&parsed, options_from_env(&scheme))
            .map_err(|e| fail(e.to_string()))?;
        Ok(Self::new(Arc::new(PrefixStore::new(store, prefix))))
    }

    /// Any `object_store` implementation: one in memory, or a wrapper.
    pub fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects }
    }

    /// `object_store` writes a local object to a staged file, fsyncs it, renames it and fsyncs its directory and
    /// every directory that it made, once `with_fsync` is set.
    fn open_directory(directory: &FilePath) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        make_directory(directory)?;
        let local = LocalFileSystem::new_with_prefix(directory)?.with_fsync(true);
        Ok(Self::new(Arc::new(local)))
    }

    /// Writes the object as a whole; durable when it returns. Idempotent.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        let location = parse(path)?;
        failpoint::reach("store.put.before");
        timed(Op::Put, path, self.objects.put(&location, bytes.into())).await?;
        failpoint::reach("store.put.after");
        Ok(())
    }

    pub async fn get(&self, path: &str) -> Result<Bytes> {
        let location = parse(path)?;
        let request = async { self.objects.get(&location).await?.bytes().await };
        timed(Op::Get, path, request).await
    }

    /// The bytes of `range`, half open and inside the object.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        let location = parse(path)?;
        timed(Op::Get, path, self.objects.get_range(&location, range)).await
    }

    /// The object's bytes, if they are the ones that `file` states; otherwise [`StoreError::Mismatch`].
    pub async fn get_verified(&self, file: &FileRef) -> Result<Bytes> {
        let bytes = self.get(&file.path).await?;
        let found =
            FileRef { path: file.path.clone(), sha256: Sha256::of(&bytes), bytes: bytes.len() as u64 };
        if found == *file {
            return Ok(bytes);
        }
        let describe = |f: &FileRef| format!("{} bytes with sha256 {}", f.bytes, f.sha256);
        Err(StoreError::Mismatch {
            path: file.path.clone(),
            expected: describe(file),
            found: describe(&found),
        })
    }

    /// Names of all objects below `prefix`, sorted. A prefix ends at a `/`: `a/b` lists `a/b/c`, not `a/bc`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let location = parse(prefix)?;
        let request = self.objects.list(Some(&location)).try_collect::<Vec<_>>();
        let objects = timed(Op::List, prefix, request).await?;
        let mut paths: Vec<String> = objects.iter().map(|object| object.location.to_string()).collect();
        paths.sort();
        Ok(paths)
    }

    /// Deletes the object; one that is not there is fine.
    pub async fn delete(&self, path: &str) -> Result<()> {
        let location = parse(path)?;
        match timed(Op::Delete, path, self.objects.delete(&location)).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            result => result,
        }
    }
}

fn parse(path: &str) -> Result<Path> {
    Path::parse(path).map_err(|source| StoreError::InvalidPath { path: path.to_owned(), source })
}

/// Carries a request out, times it and names its error. An object that is not there is an answer, not an error.
async fn timed<T>(op: Op, path: &str, request: impl Future<Output = object_store::Result<T>>) -> Result<T> {
    let begin = Instant::now();
    let result = request.await.map_err(|source| match source {
        object_store::Error::NotFound { .. } => StoreError::NotFound { path: path.to_owned() },
        source => StoreError::Unavailable { op, path: path.to_owned(), source },
    });
    let outcome = match &result {
        Err(StoreError::Unavailable { .. }) => "error",
        _ => "ok",
    };
    ::metrics::histogram!(crate::metrics::STORE_REQUESTS, "op" => op.as_str(), "outcome" => outcome)
        .record(begin.elapsed().as_secs_f64());
    result
}

/// The variables that configure a scheme's client; an unknown one is `object_store`'s to ignore.
fn options_from_env(scheme: &ObjectStoreScheme) -> Vec<(String, String)> {
    let prefix = match scheme {
        ObjectStoreScheme::AmazonS3 => "AWS_",
        ObjectStoreScheme::GoogleCloudStorage => "GOOGLE_",
        ObjectStoreScheme::MicrosoftAzure => "AZURE_",
        _ => return Vec::new(),
    };
    std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(key, _)| key.starts_with(prefix))
        .collect()
}

/// Makes the directory and its parents, each durable before what goes into it.
fn make_directory(directory: &FilePath) -> std::io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(FilePath::new("."));
    make_directory(parent)?;
    match std::fs::create_dir(directory) {
        // Another process was faster.
        Err(_) if directory.is_dir() => {}
        result => result?,
    }
    std::fs::File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests;
