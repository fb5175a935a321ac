//! A version's files: strong ETags, conditional and partial requests, streamed from the store.

use std::ops::Range;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};

use super::Shared;
use super::error::Problem;
use super::versions::{ASK_AGAIN, names_tag, resolve, strong_tag};
use crate::store::{Store, StoreError};
use crate::types::FileRef;

/// A number's files never change.
const FOR_EVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// Bytes of one request to the store. Larger: fewer requests and more memory for each download; smaller: the store's
/// latency counts more often.
const CHUNK_BYTES: u64 = 4 << 20;

pub async fn file(
    State(parts): State<Shared>,
    Path((name, path)): Path<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let resolved = resolve(parts.registry.as_ref(), &name).await?;
    let version = resolved.record.version;
    let file = resolved.record.files.iter().find(|file| file.path == path).ok_or_else(|| {
        let detail = format!("{version} has no file {path:?}; its manifest lists those it has");
        Problem::new(StatusCode::NOT_FOUND, "unknown-file", detail)
    })?;
    let tag = strong_tag(&file.sha256);
    let mut response = match names_tag(&headers, &tag) {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => {
            let object = FileRef { path: format!("{}/{path}", parts.paths.version(version)), ..file.clone() };
            content(&parts.store, object, method == Method::HEAD, &headers, &tag).await?
        }
    };
    let caching = if resolved.by_alias { ASK_AGAIN } else { FOR_EVER };
    response.headers_mut().extend([(ETAG, tag), (CACHE_CONTROL, caching)]);
    resolved.locate(&format!("/files/{path}"), &mut response);
    Ok(response)
}

/// The file, or the part of it that was asked for.
async fn content(
    store: &Arc<Store>,
    object: FileRef,
    head_only: bool,
    headers: &HeaderMap,
    tag: &HeaderValue,
) -> Result<Response, Problem> {
    let length = object.bytes;
    let asked =
        headers.get(RANGE).filter(|_| range_counts(headers, tag)).and_then(|range| range.to_str().ok());
    let (status, range) = match asked.map_or(Asked::Whole, |range| parse_range(range, length)) {
        Asked::Whole => (StatusCode::OK, 0..length),
        Asked::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Asked::Nothing => return Ok(unsatisfiable(length)),
    };
    let mut response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, content_type(&object.path))
        .header(CONTENT_LENGTH, range.end - range.start)
        .header(ACCEPT_RANGES, "bytes")
        .header(X_CONTENT_TYPE_OPTIONS, "nosniff");
    if status == StatusCode::PARTIAL_CONTENT {
        response =
            response.header(CONTENT_RANGE, format!("bytes {}-{}/{length}", range.start, range.end - 1));
    }
    let body = match head_only {
        true => Body::empty(),
        false => stream_of(store.clone(), object.path, range).await?,
    };
    response.body(body).map_err(|error| Problem::internal(&error))
}

fn unsatisfiable(length: u64) -> Response {
    let detail = format!("the file has {length} bytes");
    let problem = Problem::new(StatusCode::RANGE_NOT_SATISFIABLE, "range-not-satisfiable", detail);
    let mut response = problem.into_response();
    if let Ok(range) = HeaderValue::from_str(&format!("bytes */{length}")) {
        response.headers_mut().insert(CONTENT_RANGE, range);
    }
    response
}

/// The first chunk is read before the answer begins, so that a store that is down is told by the status.
async fn stream_of(store: Arc<Store>, path: String, range: Range<u64>) -> Result<Body, StoreError> {
    if range.is_empty() {
        return Ok(Body::empty());
    }
    let first_end = range.end.min(range.start + CHUNK_BYTES);
    let first = store.get_range(&path, range.start..first_end).await?;
    let rest = stream::try_unfold(first_end, move |at| {
        let (store, path) = (store.clone(), path.clone());
        async move {
            if at >= range.end {
                return Ok(None);
            }
            let next = range.end.min(at + CHUNK_BYTES);
            let chunk = store.get_range(&path, at..next).await.inspect_err(|error| {
                tracing::warn!(%error, "a download broke off");
            })?;
            Ok::<_, StoreError>(Some((chunk, next)))
        }
    });
    Ok(Body::from_stream(stream::once(async move { Ok::<Bytes, StoreError>(first) }).chain(rest)))
}

/// `If-Range` with anything but the present tag asks for the whole file.
fn range_counts(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    headers.get(IF_RANGE).is_none_or(|condition| condition == tag)
}

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// Also where it can't be understood, or asks for several parts: RFC 9110 lets a server ignore it.
    Whole,
    Part(Range<u64>),
    /// It lies behind the end.
    Nothing,
}

fn parse_range(header: &str, length: u64) -> Asked {
    let Some((first, last)) = header.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-'))
    else {
        return Asked::Whole;
    };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..length.min(last.saturating_add(1)),
        (Ok(first), Err(_)) if last.is_empty() => first..length,
        (Err(_), Ok(count)) if first.is_empty() => length.saturating_sub(count)..length,
        _ => return Asked::Whole,
    };
    if range.is_empty() { Asked::Nothing } else { Asked::Part(range) }
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "json" => "application/json",
        "md" => "text/markdown; charset=utf-8",
        "parquet" => "application/vnd.apache.parquet",
        "svg" => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        for (header, expected) in [
            ("bytes=0-3", Asked::Part(0..4)),
            ("bytes=4-", Asked::Part(4..10)),
            ("bytes=-3", Asked::Part(7..10)),
            ("bytes=-30", Asked::Part(0..10)),
            ("bytes=8-300", Asked::Part(8..10)),
            ("bytes=10-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=5-4", Asked::Whole),
            ("bytes=0-1,4-5", Asked::Whole),
            ("lines=0-1", Asked::Whole),
            ("bytes=0-18446744073709551615", Asked::Part(0..10)),
        ] {
            assert_eq!(parse_range(header, 10), expected, "{header}");
        }
    }
}
