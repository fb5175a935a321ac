use serde_json::json;

use super::*;

/// A version that forgot a little; the other files' tests describe it too.
pub(in crate::publish) fn example() -> Manifest {
    let period = |day: i64| PeriodId(EventTime(1_769_817_600_000 + day * 86_400_000));
    let by = |knn| ByProbe { knn: Some(knn), linear: Some(knn + 0.02), few_shot: None };
    let file =
        |path: &str| FileRef { path: path.into(), sha256: Sha256::of(path.as_bytes()), bytes: 1_234_567 };
    Manifest {
        schema: SCHEMA,
        pipeline: "main".into(),
        version: Version(2),
        parent: Some(Version(1)),
        published_at: EventTime(1_770_000_000_000),
        program_version: "0.1.0".into(),
        device: "cpu".into(),
        periods: vec![Period {
            id: period(1),
            start: period(1).start(),
            end: period(2).start(),
            frames: 1200,
        }],
        segments: vec![Segment {
            topic: "frames".into(),
            topic_id: TopicId("g000001".into()),
            partition: 0,
            offsets: OffsetRange { start: 0, end: 1200 },
            frames: 1200,
            sha256: Sha256::of(b"segment"),
        }],
        training: Training {
            frames: 1000,
            probe_frames: 200,
            left_out: LeftOut { copies: 3, near_probe: 17 },
            steps: 300,
            seconds: 42.5,
        },
        hyper_parameters: json!({"method": {"name": "lwf", "tau_d": 0.2, "lambda": 4.0}, "batch": 128}),
        seeds: [("attempt".to_owned(), 17_u64)].into(),
        metrics: Metrics {
            average_accuracy: by(0.88),
            average_forgetting: by(0.03),
            backward_transfer: by(-0.03),
            contrastive_loss: Some(2.1),
            reference_contrastive_loss: Some(2.6),
            probes: vec![
                Probe {
                    period: period(0),
                    frames: 200,
                    accuracy: by(0.87),
                    forgetting: by(0.03),
                    alignment: None,
                    uniformity: Some(-2.5),
                    effective_rank: Some(31.4),
                    drift: Some(Drift {
                        against: Version(1),
                        cka: 0.921,
                        neighbour_overlap: 0.64,
                        neighbour_retention: Some(0.97),
                        recoverability: Some(0.8),
                    }),
                    parent_retention: Some(Retention {
                        against: Version(1),
                        estimate: 0.97,
                        lower: 0.95,
                        upper: 0.98,
                    }),
                },
                Probe {
                    period: period(1),
                    frames: 200,
                    accuracy: by(0.89),
                    forgetting: ByProbe::default(),
                    alignment: Some(0.2),
                    uniformity: Some(-2.7),
                    effective_rank: Some(33.0),
                    drift: None,
                    parent_retention: None,
                },
            ],
        },
        gate: Gate {
            verdict: "accepted".into(),
            limits: json!({"max_parent_loss": 0.05, "max_cumulative_loss": 0.1}),
            reason: None,
        },
        files: vec![file("config.json"), file("encoder.safetensors")],
    }
}

#[test]
fn a_manifest_reads_back_and_its_bytes_repeat() {
    let manifest = example();
    let bytes = manifest.to_bytes().unwrap();
    assert_eq!(Manifest::from_bytes(&bytes).unwrap(), manifest);
    assert_eq!(Manifest::from_bytes(&bytes).unwrap().to_bytes().unwrap(), bytes);
}

#[test]
fn the_order_of_free_form_keys_changes_no_byte() {
    let mut turned = example();
    turned.hyper_parameters =
        serde_json::from_str(r#"{"batch": 128, "method": {"tau_d": 0.2, "lambda": 4.0, "name": "lwf"}}"#)
            .unwrap();
    assert_eq!(turned.to_bytes().unwrap(), example().to_bytes().unwrap());
}

#[test]
fn unknown_fields_are_ignored_and_a_newer_schema_is_refused() {
    let mut value = serde_json::to_value(example()).unwrap();
    value["redactions"] = json!([{"stream": "x"}]);
    value["gate"]["judge"] = json!("someone");
    assert_eq!(Manifest::from_bytes(value.to_string().as_bytes()).unwrap(), example());

    let error = Manifest::from_bytes(br#"{"schema": 2, "everything": "else"}"#).unwrap_err();
    assert_eq!(error.to_string(), "the manifest has schema 2, this program reads up to 1");
    assert!(matches!(Manifest::from_bytes(b"{}"), Err(ManifestError::Malformed(_))));
}

#[test]
fn a_manifest_of_before_retention_was_measured_is_read() {
    let mut value = serde_json::to_value(example()).unwrap();
    let probe = value["metrics"]["probes"][0].as_object_mut().unwrap();
    assert!(probe.remove("parent_retention").is_some());
    assert!(probe["drift"].as_object_mut().unwrap().remove("neighbour_retention").is_some());
    let read = Manifest::from_bytes(value.to_string().as_bytes()).unwrap();
    let probe = &read.metrics.probes[0];
    assert_eq!((probe.parent_retention, probe.drift.unwrap().neighbour_retention), (None, None));
}

#[test]
fn instants_are_written_for_people() {
    let text = String::from_utf8(example().to_bytes().unwrap()).unwrap();
    assert!(text.contains(r#""start": "2026-02-01T00:00:00.000Z""#), "{text}");
    assert!(text.contains(r#""version": "v000002""#));
}
