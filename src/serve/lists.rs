//! All versions and all periods, as JSON for programs.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::CACHE_CONTROL;
use axum::response::IntoResponse;
use serde::Serialize;

use super::Shared;
use super::error::Problem;
use crate::registry::{PeriodRecord, PeriodState, VersionRecord};
use crate::types::{EventTime, PeriodId, Version};

const FRESH: [(HeaderName, &str); 1] = [(CACHE_CONTROL, "no-cache")];

#[derive(Serialize)]
struct Versions {
    /// By number; only published ones.
    versions: Vec<VersionSummary>,
    aliases: BTreeMap<String, Version>,
}

#[derive(Serialize)]
struct VersionSummary {
    version: Version,
    parent: Option<Version>,
    period: PeriodId,
    published_at: Option<String>,
    bytes: u64,
    /// Aliases that name it.
    aliases: Vec<String>,
    /// Address of its manifest.
    manifest: String,
}

pub async fn versions(State(parts): State<Shared>) -> Result<impl IntoResponse, Problem> {
    let aliases = parts.registry.aliases().await?;
    let records = parts.registry.versions().await?;
    let visible = records.iter().filter(|record| record.visible);
    let versions = visible.map(|record| summary(record, &aliases)).collect();
    Ok((FRESH, Json(Versions { versions, aliases })))
}

fn summary(record: &VersionRecord, aliases: &BTreeMap<String, Version>) -> VersionSummary {
    let names = aliases.iter().filter(|(_, version)| **version == record.version);
    VersionSummary {
        version: record.version,
        parent: record.parent,
        period: record.period,
        published_at: record.published_at.map(|at| at.to_string()),
        bytes: record.files.iter().map(|file| file.bytes).sum(),
        aliases: names.map(|(name, _)| name.clone()).collect(),
        manifest: format!("/v1/versions/{}", record.version),
    }
}

#[derive(Serialize)]
struct Periods {
    /// By start.
    periods: Vec<PeriodSummary>,
    /// Event time up to which the stream is complete.
    watermark: Option<String>,
}

#[derive(Serialize)]
struct PeriodSummary {
    period: PeriodId,
    start: String,
    end: String,
    state: PeriodState,
    frames: u64,
    bytes: u64,
    attempt: u32,
    sealed_at: Option<String>,
    settled_at: Option<String>,
    merged_into: Option<PeriodId>,
    version: Option<Version>,
    reason: Option<String>,
}

pub async fn periods(State(parts): State<Shared>) -> Result<impl IntoResponse, Problem> {
    let records = parts.registry.periods().await?;
    let watermark = parts.registry.watermark().await?.map(|at| at.to_string());
    let periods = records.into_iter().map(period).collect();
    Ok((FRESH, Json(Periods { periods, watermark })))
}

fn period(record: PeriodRecord) -> PeriodSummary {
    let text = |at: Option<EventTime>| at.map(|at| at.to_string());
    PeriodSummary {
        period: record.id,
        start: record.id.start().to_string(),
        end: record.end.to_string(),
        state: record.state,
        frames: record.frames,
        bytes: record.bytes,
        attempt: record.attempt,
        sealed_at: text(record.sealed_at),
        settled_at: text(record.settled_at),
        merged_into: record.merged_into,
        version: record.version,
        reason: record.reason,
    }
}
