//! What the demo shows at its end: the table of versions, the picture, one request, where everything lies.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::{Chapter, DemoArguments};
use crate::app::{Daemon, versions};
use crate::registry::{PeriodRecord, PeriodState};

/// Numbers of an embedding that are printed.
const SHOWN_NUMBERS: usize = 4;

pub async fn show(
    daemon: &Daemon,
    arguments: &DemoArguments,
    chapters: &[Chapter],
    periods: &[PeriodRecord],
) -> Result<()> {
    let registry = daemon.deployment.registry.as_ref();
    println!("\n{}\n", versions::versions_table(registry).await?);
    println!("kNN: share of a period's held-out frames whose map is told by their 20 nearest neighbours.");
    println!("Forgetting: best ancestor's accuracy minus this version's, the mean over earlier periods.\n");
    let picture = arguments.dir.join("forgetting.svg");
    tokio::fs::write(&picture, versions::picture(registry).await?).await?;
    embed(daemon, chapters).await?;
    let dir = arguments.dir.display();
    println!("\nPicture of forgetting   {}", picture.display());
    println!("Published versions      {dir}/objects/demo/versions/");
    println!("Registry                {dir}/registry.db");
    println!("Log                     {dir}/daemon.log");
    println!("Configuration           {dir}/palimpsest.toml");
    println!("\nServe these versions again: palimpsest run --role serve --config {dir}/palimpsest.toml");
    let refused = periods.iter().filter(|period| period.version.is_none());
    for period in refused.clone().filter(|period| period.state != PeriodState::Merged) {
        println!("{} was not published: {}", period.id, period.reason.as_deref().unwrap_or("see the log"));
    }
    if refused.count() > 0 {
        bail!("not every period brought a version");
    }
    Ok(())
}

/// Asks the running daemon for the embedding of one frame of the last period.
async fn embed(daemon: &Daemon, chapters: &[Chapter]) -> Result<()> {
    let frame = chapters.iter().rev().find_map(|chapter| first_image(&chapter.folder));
    let frame = frame.context("there is no frame to embed")?;
    let url = format!("http://{}/v1/embed?version=latest", daemon.address);
    let bytes = tokio::fs::read(&frame).await?;
    let request = reqwest::Client::new().post(&url).header("content-type", "image/jpeg").body(bytes);
    let response = request.send().await?;
    let status = response.status();
    let text = response.text().await?;
    if !status.is_success() {
        bail!("POST /v1/embed answered {status}: {text}");
    }
    let answer: serde_json::Value = serde_json::from_str(&text)?;
    let numbers = answer["embeddings"][0].as_array().context("the answer holds no embedding")?;
    let shown: Vec<String> = numbers.iter().take(SHOWN_NUMBERS).map(ToString::to_string).collect();
    println!("This request was just answered by the daemon:");
    println!("  curl -X POST --data-binary @{} -H 'content-type: image/jpeg' '{url}'", frame.display());
    println!(
        "  {{\"version\":{},\"dimension\":{},\"embeddings\":[[{}, ...]]}}",
        answer["version"],
        answer["dimension"],
        shown.join(", ")
    );
    Ok(())
}

fn first_image(folder: &std::path::Path) -> Option<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().find_map(|path| match path.is_dir() {
        true => first_image(&path),
        false => path.extension().is_some_and(|extension| extension == "jpg").then_some(path),
    })
}
