//! What tells incarnations of a Kafka cluster's topics apart: the cluster's id.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use tokio_util::sync::CancellationToken;

/// One request's patience; the wait for a cluster that is down is made of many.
const ASK_FOR: Duration = Duration::from_secs(5);

/// Asks until the cluster answers; `None` if `cancel` comes first.
pub async fn id(properties: &BTreeMap<String, String>, cancel: &CancellationToken) -> Result<Option<String>> {
    let mut client = ClientConfig::new();
    client.extend(properties.clone());
    while !cancel.is_cancelled() {
        let client = client.clone();
        let asked = tokio::task::spawn_blocking(move || ask(&client));
        if let Some(id) = asked.await?? {
            return Ok(Some(id));
        }
        tracing::warn!("the Kafka cluster does not answer; asking again");
    }
    Ok(None)
}

fn ask(client: &ClientConfig) -> Result<Option<String>> {
    let consumer: BaseConsumer = client.create()?;
    let Some(id) = consumer.client().fetch_cluster_id(ASK_FOR) else { return Ok(None) };
    if id.is_empty() {
        bail!("the Kafka cluster has no id: set kafka.identity");
    }
    Ok(Some(id))
}
