//! `POST /v1/embed`: images in, one row of numbers for each out.
//!
//! A request is bounded four times before it costs anything: how many are worked on at once, how large its body is, how
//! many images it has, how many pixels each claims. Decoding runs on the blocking pool, one image of a request at a
//! time, so a request holds one decoded image and its views; the encoder runs on its own thread (`worker`).

mod encoder;
mod request;
mod worker;

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use encoder::PublishedEncoder;
pub use worker::{EmbedError, Embedder};

use super::error::Problem;
use super::versions::{number, visible};
use super::{Limits, Parts, Shared};
use crate::model::preprocess::{PreprocessError, Preprocessing, decode_rgb};
use crate::registry::LATEST;
use crate::types::Version;

#[derive(Deserialize)]
pub struct Choice {
    /// A number or an alias; without it `latest`.
    version: Option<String>,
}

#[derive(Serialize)]
pub struct Embedded {
    version: Version,
    dimension: usize,
    /// One row an image, in the order of the request.
    embeddings: Vec<Vec<f32>>,
}

pub async fn post(
    State(parts): State<Shared>,
    choice: Result<Query<Choice>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<Embedded>, Problem> {
    let Query(Choice { version }) =
        choice.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, "bad-query", error))?;
    let _admission = parts.embedder.admit()?;
    let images = request::images(&headers, request, &parts.limits).await?;
    let encoder = encoder(&parts, version.as_deref().unwrap_or(LATEST)).await?;
    let (preprocessing, limits) = (encoder.preprocessing, parts.limits);
    let views = tokio::task::spawn_blocking(move || views(&images, &preprocessing, &limits));
    let views = views.await.map_err(|error| Problem::internal(&error))??;
    let (version, dimension) = (encoder.version, encoder.dimension());
    let values = parts.embedder.embed(encoder, views).await?;
    let embeddings = values.chunks(dimension).map(<[f32]>::to_vec).collect();
    Ok(Json(Embedded { version, dimension, embeddings }))
}

/// The encoder of the version that `name` stands for. A published version stays what it is, so one at hand is not asked
/// for again; what an alias names is, each time.
async fn encoder(parts: &Parts, name: &str) -> Result<Arc<PublishedEncoder>, Problem> {
    let (version, _) = number(parts.registry.as_ref(), name).await?;
    if let Some(encoder) = parts.embedder.at_hand(version).await {
        return Ok(encoder);
    }
    let record = visible(parts.registry.as_ref(), version, name).await?;
    Ok(parts.embedder.encoder(&record, &parts.store, &parts.paths).await?)
}

/// What the encoder sees of each image, one after the other: `[images, 3, size, size]`.
fn views(images: &[Bytes], preprocessing: &Preprocessing, limits: &Limits) -> Result<Vec<f32>, Problem> {
    let length = preprocessing.view_len();
    let mut views = vec![0.0; images.len() * length];
    for (index, (bytes, view)) in images.iter().zip(views.chunks_exact_mut(length)).enumerate() {
        let made = decode_rgb(bytes, limits.max_pixels)
            .and_then(|frame| preprocessing.evaluation_view(&frame, view));
        made.map_err(|error| refused(index, error))?;
    }
    Ok(views)
}

fn refused(index: usize, error: PreprocessError) -> Problem {
    let status = StatusCode::UNPROCESSABLE_ENTITY;
    let kind = match error {
        PreprocessError::TooLarge { .. } => "image-too-large",
        PreprocessError::Undecodable(_) | PreprocessError::Empty { .. } => "bad-image",
        other => return Problem::internal(&other),
    };
    Problem::new(status, kind, format!("image {index}: {error}")).with("image", index)
}
