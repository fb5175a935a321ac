//! The images of a request: its body as one encoded image, or JSON with many in base64.

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::super::Limits;
use super::super::error::Problem;

/// What can be decoded.
const IMAGE_TYPES: [&str; 3] = ["image/jpeg", "image/png", "image/webp"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Many {
    images: Vec<String>,
}

/// Encoded images, at least one and at most as many as `limits` say. Nothing of them is decoded yet.
pub async fn images(headers: &HeaderMap, request: Request, limits: &Limits) -> Result<Vec<Bytes>, Problem> {
    let form = form(headers)?;
    let most = limits.max_body_bytes;
    let body = to_bytes(request.into_body(), most).await.map_err(|error| body_error(error, most))?;
    match form {
        Form::Image if body.is_empty() => Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "bad-body",
            "the body is empty: send the image's bytes",
        )),
        Form::Image => Ok(vec![body]),
        Form::Json => many(&body, limits.max_embed_images),
    }
}

enum Form {
    Image,
    Json,
}

fn form(headers: &HeaderMap) -> Result<Form, Problem> {
    let found = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = found.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    match essence.as_str() {
        "application/json" => Ok(Form::Json),
        image if IMAGE_TYPES.contains(&image) => Ok(Form::Image),
        _ => {
            let detail =
                format!("content-type {found:?}: send {} or application/json", IMAGE_TYPES.join(", "));
            Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", detail))
        }
    }
}

/// The reader's error does not say whether the body was too long or the client went away; only the first gets an answer.
fn body_error(error: axum::Error, most: usize) -> Problem {
    tracing::debug!(%error, "a body could not be read");
    Problem::too_large(format!("at most {most} bytes are taken"))
}

fn many(body: &[u8], most: usize) -> Result<Vec<Bytes>, Problem> {
    let bad = |detail: String| Problem::new(StatusCode::BAD_REQUEST, "bad-body", detail);
    let Many { images } = serde_json::from_slice(body)
        .map_err(|error| bad(format!("the body should be {{\"images\": [\"base64\", ...]}}: {error}")))?;
    match images.len() {
        0 => return Err(bad("images is empty".into())),
        count if count > most => {
            return Err(Problem::too_large(format!("{count} images, at most {most} are taken at once")));
        }
        _ => {}
    }
    let decoded = images.iter().enumerate().map(|(index, text)| {
        let bytes = STANDARD.decode(text);
        bytes.map(Bytes::from).map_err(|error| bad(format!("image {index} is not base64: {error}")))
    });
    decoded.collect()
}
