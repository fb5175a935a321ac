//! A published version by number or alias, and its manifest.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_LOCATION, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::Shared;
use super::error::Problem;
use crate::registry::{Registry, RegistryError, VersionRecord};
use crate::types::{Sha256, Version};

/// A cache may keep it, and asks each time whether it still holds.
pub const ASK_AGAIN: HeaderValue = HeaderValue::from_static("no-cache");

/// What a name in a URL stands for.
pub struct Resolved {
    pub record: VersionRecord,
    /// It was named by an alias, which may name another version tomorrow.
    pub by_alias: bool,
}

impl Resolved {
    /// Names the numbered address in an answer to an alias. `rest`: what follows the version.
    pub fn locate(&self, rest: &str, response: &mut Response) {
        if !self.by_alias {
            return;
        }
        let address = format!("/v1/versions/{}{rest}", self.record.version);
        if let Ok(address) = HeaderValue::from_str(&address) {
            response.headers_mut().insert(CONTENT_LOCATION, address);
        }
    }
}

/// The visible version that `name` (a number or an alias) stands for.
pub async fn resolve(registry: &dyn Registry, name: &str) -> Result<Resolved, Problem> {
    let (version, by_alias) = number(registry, name).await?;
    Ok(Resolved { record: visible(registry, version, name).await?, by_alias })
}

/// The number that `name` is or stands for, and whether it is an alias. An alias names a visible version; whether there
/// is one of another number is not asked.
pub async fn number(registry: &dyn Registry, name: &str) -> Result<(Version, bool), Problem> {
    if let Ok(version) = name.parse::<Version>() {
        return Ok((version, false));
    }
    let aliases = registry.aliases().await?;
    Ok((*aliases.get(name).ok_or_else(|| Problem::unknown_version(name))?, true))
}

/// The version's record if it is visible; `name` is what the request called it.
pub async fn visible(
    registry: &dyn Registry,
    version: Version,
    name: &str,
) -> Result<VersionRecord, Problem> {
    match registry.version(version).await {
        Ok(record) if record.visible => Ok(record),
        Ok(_) | Err(RegistryError::NotFound { .. }) => Err(Problem::unknown_version(name)),
        Err(error) => Err(error.into()),
    }
}

/// The manifest as it was published. It is asked for again each time: an erasure adds to it.
pub async fn manifest(
    State(parts): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let resolved = resolve(parts.registry.as_ref(), &name).await?;
    let manifest = resolved.record.manifest.clone().ok_or_else(|| Problem::unknown_version(&name))?;
    let tag = strong_tag(&Sha256::of(manifest.as_bytes()));
    let mut response = match names_tag(&headers, &tag) {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => ([(CONTENT_TYPE, "application/json")], Body::from(manifest)).into_response(),
    };
    response.headers_mut().extend([(ETAG, tag), (CACHE_CONTROL, ASK_AGAIN)]);
    resolved.locate("", &mut response);
    Ok(response)
}

/// A file's hash as its entity tag.
pub fn strong_tag(sha256: &Sha256) -> HeaderValue {
    // Hexadecimal digits always make a header.
    HeaderValue::from_str(&format!("\"{sha256}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// Whether `If-None-Match` names `tag`, by weak comparison, or anything at all.
pub fn names_tag(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let lines = headers.get_all(IF_NONE_MATCH).iter().filter_map(|line| line.to_str().ok());
    lines
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .any(|named| named == "*" || named.strip_prefix("W/").unwrap_or(named).as_bytes() == tag.as_bytes())
}
