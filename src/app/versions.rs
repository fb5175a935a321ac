//! The versions as people see them: a table, and a picture of what was learned and forgotten.

use anyhow::Result;

use crate::period::history;
use crate::publish::plot::{self, Series};
use crate::publish::table::{self, VersionRow};
use crate::registry::{LATEST, PeriodRecord, PeriodState, Registry};
use crate::types::{PeriodId, Version};

/// Every settled period's candidate: its scores on each probe set, what it forgot, the gate's verdict.
pub async fn versions_table(registry: &dyn Registry) -> Result<String> {
    let periods = registry.periods().await?;
    let versions = registry.versions().await?;
    let latest = registry.aliases().await?.get(LATEST).copied();
    let knn = history::of(&versions, &registry.scores().await?, history::KNN)?;
    let probes: Vec<PeriodId> = registry.probe_sets().await?.iter().map(|set| set.period).collect();
    let settled = periods.iter().filter(|period| period.settled_at.is_some());
    let rows = settled.map(|period| {
        let accuracy = |version: Version| probes.iter().map(|probe| knn.score(version, *probe)).collect();
        VersionRow {
            version: period.version,
            is_latest: latest.is_some() && period.version == latest,
            period: period.id,
            frames: period.frames,
            accuracy: period.version.map(accuracy).unwrap_or_default(),
            average_forgetting: period.version.and_then(|version| knn.average_forgetting(version)),
            backward_transfer: period.version.and_then(|version| knn.backward_transfer(version)),
            verdict: verdict(period),
        }
    });
    Ok(table::versions_table(&probes, &rows.collect::<Vec<_>>()))
}

fn verdict(period: &PeriodRecord) -> String {
    match (period.state, &period.reason) {
        (PeriodState::Published | PeriodState::Expired, None) => "accepted".to_owned(),
        (_, Some(reason)) => reason.clone(),
        (state, None) => state.as_str().to_owned(),
    }
}

/// An SVG of kNN accuracy and forgetting by version, a line for each period's probe set.
pub async fn picture(registry: &dyn Registry) -> Result<String> {
    let versions = registry.versions().await?;
    let knn = history::of(&versions, &registry.scores().await?, history::KNN)?;
    let visible: Vec<Version> = versions.iter().filter(|v| v.visible).map(|v| v.version).collect();
    let by_version = |ask: &dyn Fn(Version) -> Option<f64>| {
        visible.iter().filter_map(|&version| Some((version, ask(version)?))).collect()
    };
    let series: Vec<Series> = registry
        .probe_sets()
        .await?
        .iter()
        .map(|set| Series {
            period: set.period,
            accuracy: by_version(&|version| knn.score(version, set.period)),
            forgetting: by_version(&|version| knn.forgetting(version, set.period)),
        })
        .collect();
    Ok(plot::forgetting_by_version("kNN", &visible, &series)?)
}
