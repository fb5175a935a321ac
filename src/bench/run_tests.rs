use std::sync::atomic::{AtomicU64, AtomicUsize};

use super::super::method::Defaults;
use super::super::results::{Probe, StreamFacts};
use super::super::stream::Source;
use super::super::stream::tests::write_stream;
use super::*;
use crate::train::fixtures;

const DEFAULTS: Defaults = Defaults { lambda: 4.0, tau_d: 0.2, predictor_hidden: 16, teacher_share: 0.0 };

/// A stream of two small periods and settings that train in moments.
struct Rig {
    folder: tempfile::TempDir,
    stream: Stream,
    settings: Settings,
    methods: Vec<BenchMethod>,
}

#[derive(Default)]
struct Counted {
    steps: AtomicU64,
    runs: AtomicUsize,
    /// Stops after so many steps.
    stop_after: Option<u64>,
    stop: AtomicBool,
}

impl Progress for Counted {
    fn steps(&self, more: u64) {
        let done = self.steps.fetch_add(more, Ordering::Relaxed) + more;
        if self.stop_after.is_some_and(|limit| done >= limit) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn finished(&self, _: &RunResult) {
        self.runs.fetch_add(1, Ordering::Relaxed);
    }
}

impl Rig {
    fn new(methods: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_stream(&folder.path().join("stream"), &[3, 2], (8, 4));
        let stream = Stream::read(&Source::Folder(folder.path().join("stream"))).unwrap();
        let settings = Settings {
            model: fixtures::model(),
            optimisation: Optimisation {
                steps: 3,
                batch: 6,
                max_epochs: u64::MAX,
                ..fixtures::optimisation()
            },
            first_steps: 4,
            augmentation: fixtures::augmentation(),
            composition: Composition::AS_THEY_COME,
            k: 3,
            defaults: DEFAULTS,
            device: "cpu".into(),
            precision: PrecisionChoice::F32,
            micro_batch: None,
        };
        let methods = methods.iter().map(|text| BenchMethod::parse(text, &DEFAULTS).unwrap()).collect();
        Self { folder, stream, settings, methods }
    }

    fn execution(&self, work: &str, jobs: usize) -> Execution {
        Execution {
            threads: 1,
            jobs,
            checkpoint_steps: 2,
            work: self.folder.path().join(work),
            results: self.folder.path().join(format!("{work}.json")),
        }
    }

    fn empty(&self) -> Results {
        let facts = StreamFacts::of(&self.stream, "stream".into());
        Results::new(facts, serde_json::to_value(&self.settings).unwrap())
    }

    fn run(&self, execution: &Execution, seeds: &[u64], counted: &Counted) -> Result<Results, BenchError> {
        let bench = Bench {
            stream: &self.stream,
            settings: &self.settings,
            methods: &self.methods,
            seeds,
            execution,
        };
        let results = self.empty().resume(&execution.results)?;
        let ended = bench.run(results, counted, &counted.stop);
        if ended.is_ok() {
            assert_eq!(counted.steps.load(Ordering::Relaxed), bench.total_steps());
        }
        ended
    }
}

/// Everything but the times.
fn without_seconds(mut results: Results) -> Vec<RunResult> {
    let versions = results.runs.iter_mut().flat_map(|run| &mut run.versions);
    versions.for_each(|version| version.seconds = 0.0);
    results.runs
}

#[test]
fn every_method_learns_the_first_period_alike_and_the_second_one_differently() {
    let names =
        ["random", "finetune", "finetune:lr=1e-4", "lwf", "cassle", "cosine", "replay:frames=6", "joint"];
    let rig = Rig::new(&names);
    let results = rig.run(&rig.execution("work", 2), &[1, 2], &Counted::default()).unwrap();
    assert_eq!(results.methods(), names);
    for run in &results.runs {
        let counts: Vec<usize> = run.versions.iter().map(|version| version.scores.len()).collect();
        let steps: Vec<u64> = run.versions.iter().map(|version| version.steps).collect();
        match run.method.as_str() {
            "random" => assert_eq!((counts, steps), (vec![2], vec![0])),
            "joint" => assert_eq!((counts, steps), (vec![1, 2], vec![4, 7])),
            _ => assert_eq!((counts, steps), (vec![1, 2], vec![4, 3])),
        }
        if run.method != "random" {
            let finetuned = results.find("finetune", run.seed).unwrap();
            assert_eq!(run.versions[0].scores, finetuned.versions[0].scores, "{}", run.method);
            if run.method != "finetune" {
                assert_ne!(run.versions[1].scores, finetuned.versions[1].scores, "{}", run.method);
            }
            let lost = run.versions[0].scores[0].knn - run.versions[1].scores[0].knn;
            assert_eq!(run.forgetting(Probe::Knn), Some(lost));
            assert!(run.versions[1].scores[0].drift.is_some() && run.versions[1].scores[1].drift.is_none());
        }
    }
    assert_ne!(
        results.find("lwf", 1).unwrap().versions[0].scores,
        results.find("lwf", 2).unwrap().versions[0].scores
    );
}

#[test]
fn shares_and_the_composition_of_batches_are_trained_by() {
    // Two frames of each walk within a second: none of one walk meet in a batch unless the spacing is off.
    let rename = |folder: &std::path::Path| {
        for half in std::fs::read_dir(folder).unwrap().flat_map(|period| {
            std::fs::read_dir(period.unwrap().path().join("train"))
                .unwrap()
                .map(|label| label.unwrap().path())
        }) {
            for frame in 0..8 {
                let old = half.join(format!("f{frame:02}.png"));
                std::fs::rename(old, half.join(format!("walk{}@{}.png", frame / 2, frame % 2 * 500)))
                    .unwrap();
            }
        }
    };
    let mut rig =
        Rig::new(&["lwf", "lwf:share=0.5", "finetune", "finetune:spacing=0", "finetune:distance=1"]);
    rename(&rig.folder.path().join("stream"));
    rig.stream = Stream::read(&Source::Folder(rig.folder.path().join("stream"))).unwrap();
    rig.settings.composition = Composition { spacing_ms: 30_000, ..Composition::AS_THEY_COME };
    let results = rig.run(&rig.execution("work", 1), &[1], &Counted::default()).unwrap();
    let scores =
        |method: &str, version: usize| results.find(method, 1).unwrap().versions[version].scores.clone();
    assert_eq!(scores("lwf", 0), scores("lwf:share=0.5", 0));
    assert_ne!(scores("lwf", 1), scores("lwf:share=0.5", 1));
    assert_ne!(scores("finetune", 0), scores("finetune:spacing=0", 0));
    assert_ne!(scores("finetune", 0), scores("finetune:distance=1", 0));
}

#[test]
fn a_benchmark_that_was_stopped_at_any_step_ends_with_the_same_numbers() {
    let rig = Rig::new(&["lwf", "replay:frames=6"]);
    let whole = without_seconds(rig.run(&rig.execution("whole", 1), &[1], &Counted::default()).unwrap());
    // In both periods of both methods, before and after a checkpoint, and between two runs.
    for stop_after in [1, 3, 4, 5, 8, 13] {
        let execution = rig.execution(&format!("stopped-{stop_after}"), 1);
        let counted = Counted { stop_after: Some(stop_after), ..Counted::default() };
        let stopped = rig.run(&execution, &[1], &counted);
        assert!(matches!(stopped, Err(BenchError::Stopped)), "{stop_after}");
        let resumed = rig.run(&execution, &[1], &Counted::default()).unwrap();
        assert_eq!(without_seconds(resumed), whole, "stopped after {stop_after}");
    }
}

#[test]
fn what_is_done_is_not_done_again_and_more_can_be_asked_for() {
    let mut rig = Rig::new(&["finetune"]);
    let execution = rig.execution("work", 1);
    let first = rig.run(&execution, &[1], &Counted::default()).unwrap();
    rig.methods.push(BenchMethod::parse("lwf", &DEFAULTS).unwrap());
    let counted = Counted::default();
    let second = rig.run(&execution, &[1, 2], &counted).unwrap();
    assert_eq!(counted.runs.load(Ordering::Relaxed), 3);
    // Its times too: it was not run again.
    assert_eq!(second.find("finetune", 1), first.find("finetune", 1));
}

#[test]
fn results_of_other_settings_are_refused() {
    let mut rig = Rig::new(&["random"]);
    let execution = rig.execution("work", 1);
    rig.run(&execution, &[1], &Counted::default()).unwrap();
    rig.settings.first_steps += 1;
    let error = rig.run(&execution, &[1], &Counted::default()).unwrap_err();
    assert!(matches!(error, BenchError::OtherResults { what: "configuration or budget", .. }), "{error}");
}

#[test]
fn a_frame_that_is_no_image_is_named_with_its_path() {
    let mut rig = Rig::new(&["lwf"]);
    let broken = "02-part/train/label1/f03.png";
    std::fs::write(rig.folder.path().join("stream").join(broken), "no image").unwrap();
    rig.stream = Stream::read(&Source::Folder(rig.folder.path().join("stream"))).unwrap();
    let error = rig.run(&rig.execution("work", 1), &[1], &Counted::default()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("lwf, seed 1, 02-part: {broken}: ")), "{error}");
}

#[test]
fn drift_is_told_from_the_version_that_learned_a_period_and_from_the_one_before() {
    let rig = Rig::new(&["finetune"]);
    let (execution, counted) = (rig.execution("work", 1), Counted::default());
    let versions = Versions::open(execution.work.clone()).unwrap();
    let bench = Bench {
        stream: &rig.stream,
        settings: &rig.settings,
        methods: &rig.methods,
        seeds: &[1],
        execution: &execution,
    };
    let run = OneRun {
        bench: &bench,
        method: &rig.methods[0],
        seed: 1,
        versions: &versions,
        progress: &counted,
        stop: &counted.stop,
    };
    // Networks in the order in which they are measured: the first learned period 0, the second one period 1.
    let measured = |seeds: &[u64]| {
        let mut seen = Seen::new();
        let of = |(index, seed): (usize, &u64)| {
            let network = Network::initialise(&rig.settings.model, *seed, None, COMPUTE).unwrap();
            let trained = Trained { network: network.to_bytes().unwrap(), steps: 0, seconds: 0.0 };
            run.measured(&trained, (index + 1).min(2), &mut seen).unwrap().scores
        };
        seeds.iter().enumerate().map(of).last().unwrap()
    };
    let found = measured(&[1, 2, 3]);
    let against = |seed| measured(&[seed, 3])[0].drift;
    assert_eq!((found[0].drift, found[0].parent_drift), (against(1), against(2)));
    assert_ne!(against(1), against(2));
    assert!(found[1].drift.is_some() && found[1].parent_drift.is_none(), "{:?}", found[1]);
}
