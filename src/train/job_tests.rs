use std::num::NonZeroUsize;

use super::*;
use crate::model::{Architecture, EncoderSpec};
use crate::train::checkpoint::CheckpointError;
use crate::train::fixtures;
use crate::train::spec::{Method, Teacher};
use crate::types::{FileRef, Sha256, Version};

const LWF: Method = Method::Lwf { lambda: 4.0, tau_d: 0.2 };
const CASSLE: Method = Method::Cassle { lambda: 4.0, tau_d: 0.2, predictor_hidden: 32 };

/// Keeps what it is told; asks to stop before step `stop_at`.
#[derive(Default)]
struct Recorder {
    progress: Vec<Progress>,
    checkpoints: Vec<(u64, Vec<u8>)>,
    stop_at: Option<u64>,
}

impl JobIo for Recorder {
    fn progress(&mut self, progress: Progress) {
        self.progress.push(progress);
    }

    fn save_checkpoint(
        &mut self,
        step: u64,
        bytes: Vec<u8>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.checkpoints.push((step, bytes));
        Ok(())
    }

    fn should_stop(&self) -> bool {
        self.stop_at.is_some_and(|at| self.steps().last().is_some_and(|(step, _)| *step == at))
    }
}

impl Recorder {
    /// Step and total loss of each step.
    fn steps(&self) -> Vec<(u64, f64)> {
        let step = |progress: &Progress| match progress {
            Progress::Step { step, total, .. } => Some((*step, *total)),
            _ => None,
        };
        self.progress.iter().filter_map(step).collect()
    }

    fn newest(&self) -> Option<Vec<u8>> {
        self.checkpoints.last().map(|(_, bytes)| bytes.clone())
    }
}

fn file(path: &str) -> FileRef {
    FileRef { path: path.into(), sha256: Sha256::of(b""), bytes: 0 }
}

/// Six steps, distilled from the teacher of [`inputs`].
fn job(method: Method) -> TrainJob {
    let mut job = fixtures::job();
    job.recipe.method = method;
    job.recipe.teacher =
        Some(Teacher { version: Version(1), encoder: file("encoder"), projector: file("projector") });
    job
}

fn first_job(steps: u64) -> TrainJob {
    let mut job = fixtures::job();
    job.recipe.optimisation.steps = steps;
    job
}

fn first_inputs() -> Inputs {
    Inputs {
        frames: Arc::new(fixtures::frames(64)),
        split: Split { train: (0..60).collect(), probe: (60..64).collect() },
        teacher: None,
        init: None,
        checkpoint: None,
        data_threads: 1,
    }
}

/// A teacher that was trained for two steps: its running statistics are no longer the initial ones.
fn teacher() -> NetworkBytes {
    run(&first_job(2), first_inputs(), &mut Recorder::default()).unwrap().network
}

fn inputs(teacher: &NetworkBytes) -> Inputs {
    Inputs { teacher: Some(teacher.clone()), ..first_inputs() }
}

#[test]
fn a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one() {
    let teacher = teacher();
    for method in [Method::Finetune, LWF, CASSLE] {
        let job = job(method);
        let whole = run(&job, inputs(&teacher), &mut Recorder::default()).unwrap();
        let mut stopped = Recorder { stop_at: Some(3), ..Recorder::default() };
        let error = run(&job, inputs(&teacher), &mut stopped).unwrap_err();
        assert!(matches!(error, TrainError::Interrupted { step: 3 }), "{error}");
        let mut resumed = Recorder::default();
        let rest = Inputs { checkpoint: stopped.newest(), data_threads: 3, ..inputs(&teacher) };
        let ended = run(&job, rest, &mut resumed).unwrap();
        assert_eq!(ended, whole, "{method:?}");
        assert!(resumed.progress.contains(&Progress::Resumed { step: 3 }));
        assert_eq!(resumed.steps().len(), 3);
        assert_ne!(whole.network, whole.initial);
    }
}

#[test]
fn a_first_run_resumes_bit_for_bit_too_and_reports_its_initial_weights() {
    let whole = run(&first_job(4), first_inputs(), &mut Recorder::default()).unwrap();
    let mut stopped = Recorder { stop_at: Some(1), ..Recorder::default() };
    run(&first_job(4), first_inputs(), &mut stopped).unwrap_err();
    let rest = Inputs { checkpoint: stopped.newest(), ..first_inputs() };
    assert_eq!(run(&first_job(4), rest, &mut Recorder::default()).unwrap(), whole);
}

#[test]
fn a_run_that_had_ended_ends_again_from_its_last_checkpoint() {
    let mut recorder = Recorder::default();
    let whole = run(&first_job(3), first_inputs(), &mut recorder).unwrap();
    let steps: Vec<u64> = recorder.checkpoints.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [2, 3]);
    let rest = Inputs { checkpoint: recorder.newest(), ..first_inputs() };
    let mut again = Recorder::default();
    assert_eq!(run(&first_job(3), rest, &mut again).unwrap(), whole);
    assert!(again.steps().is_empty());
}

#[test]
fn the_student_starts_as_the_teacher() {
    let teacher = teacher();
    let trained = run(&job(LWF), inputs(&teacher), &mut Recorder::default()).unwrap();
    assert_eq!(trained.initial, teacher);
}

#[test]
fn methods_and_seeds_give_different_students() {
    let teacher = teacher();
    let student = |job: &TrainJob| run(job, inputs(&teacher), &mut Recorder::default()).unwrap().network;
    let lwf = student(&job(LWF));
    assert_ne!(lwf, student(&job(Method::Finetune)));
    assert_ne!(lwf, student(&job(CASSLE)));
    let mut other = job(LWF);
    other.recipe.seed += 1;
    assert_ne!(lwf, student(&other));
}

#[test]
fn distillation_with_weight_0_is_finetuning() {
    let teacher = teacher();
    let student = |method| run(&job(method), inputs(&teacher), &mut Recorder::default()).unwrap().network;
    let finetuned = student(Method::Finetune);
    assert_eq!(finetuned, student(Method::Lwf { lambda: 0.0, tau_d: 0.2 }));
    assert_eq!(finetuned, student(Method::Cassle { lambda: 0.0, tau_d: 0.2, predictor_hidden: 32 }));
}

#[test]
fn what_is_published_is_the_average_of_student_and_teacher() {
    let teacher = teacher();
    let network = |share: f64| {
        let mut job = job(LWF);
        job.recipe.teacher_share = share;
        run(&job, inputs(&teacher), &mut Recorder::default()).unwrap().network
    };
    let (student, average) = (network(0.0), network(0.25));
    for (student, average, teacher) in [
        (&student.encoder, &average.encoder, &teacher.encoder),
        (&student.projector, &average.projector, &teacher.projector),
    ] {
        let [student, average, teacher] =
            [student, average, teacher].map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
        let floats = |view: &safetensors::tensor::TensorView| {
            let bytes = view.data().as_chunks::<4>().0.iter();
            bytes.map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<f32>>()
        };
        assert_eq!(student.len(), average.len());
        for (name, view) in average.tensors() {
            let [of_student, of_teacher] = [&student, &teacher].map(|file| file.tensor(&name).unwrap());
            if view.dtype() != safetensors::Dtype::F32 {
                assert_eq!(view.data(), of_student.data(), "{name}");
                continue;
            }
            let pairs = floats(&of_student).into_iter().zip(floats(&of_teacher));
            for (found, (new, old)) in floats(&view).into_iter().zip(pairs) {
                assert!((found - (0.75 * new + 0.25 * old)).abs() <= 1e-6 * (1.0 + new.abs()), "{name}");
            }
        }
    }
}

#[test]
fn the_loss_falls_over_thirty_steps() {
    let mut recorder = Recorder::default();
    run(&first_job(30), first_inputs(), &mut recorder).unwrap();
    let steps = recorder.steps();
    let mean = |steps: &[(u64, f64)]| steps.iter().map(|(_, total)| total).sum::<f64>() / steps.len() as f64;
    let (first, last) = (mean(&steps[..5]), mean(&steps[25..]));
    assert!(last < 0.9 * first, "{first} to {last}");
}

#[test]
fn a_loss_that_is_not_finite_stops_with_its_step_and_term() {
    let mut job = first_job(4);
    // Divides by zero: every logit is infinite or not a number.
    job.recipe.optimisation.tau = 0.0;
    let mut recorder = Recorder::default();
    let error = run(&job, first_inputs(), &mut recorder).unwrap_err();
    assert!(
        matches!(&error, TrainError::NotFinite { step: 0, term } if term == "the loss ntxent"),
        "{error}"
    );
    assert!(recorder.checkpoints.is_empty());

    let mut job = first_job(4);
    job.recipe.optimisation.learning_rate = f64::MAX;
    let error = run(&job, first_inputs(), &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 1, .. }), "{error}");
}

#[test]
fn inputs_that_are_not_the_jobs_are_refused() {
    let teacher = teacher();
    let error = run(&job(LWF), first_inputs(), &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Inputs { .. }), "{error}");
    let error = run(&first_job(1), inputs(&teacher), &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Inputs { .. }), "{error}");
}

#[test]
fn another_recipes_checkpoint_is_refused() {
    let mut recorder = Recorder::default();
    run(&first_job(2), first_inputs(), &mut recorder).unwrap();
    let rest = Inputs { checkpoint: recorder.newest(), ..first_inputs() };
    let error = run(&first_job(3), rest, &mut Recorder::default()).unwrap_err();
    assert!(
        matches!(error, TrainError::Checkpoint(CheckpointError::Other { what: "recipe", .. })),
        "{error}"
    );
}

#[test]
fn named_weights_start_the_first_encoder() {
    let teacher = teacher();
    let mut job = first_job(1);
    job.recipe.model.init = Some(file("init"));
    let inputs = Inputs { init: Some(teacher.encoder.clone()), ..first_inputs() };
    let trained = run(&job, inputs, &mut Recorder::default()).unwrap();
    assert_eq!(trained.initial.encoder, teacher.encoder);
    assert_ne!(trained.initial.projector, teacher.projector);
}

#[test]
fn a_checkpoint_that_cannot_be_kept_ends_the_run() {
    struct Full;
    impl JobIo for Full {
        fn progress(&mut self, _: Progress) {}
        fn save_checkpoint(
            &mut self,
            _: u64,
            _: Vec<u8>,
        ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            Err("disk full".into())
        }
        fn should_stop(&self) -> bool {
            false
        }
    }
    let error = run(&first_job(2), first_inputs(), &mut Full).unwrap_err();
    assert!(matches!(error, TrainError::SaveCheckpoint { step: 2, .. }), "{error}");
}

/// Three steps of a transformer, held to `frames` frames' activations, distilled from a teacher of its own.
fn transformer_job(teacher: bool, micro_batch: Option<usize>) -> TrainJob {
    let mut job = if teacher { job(CASSLE) } else { first_job(2) };
    job.recipe.model.encoder =
        EncoderSpec { architecture: Architecture::VitTiny, image_size: 16, patch_size: 8 };
    job.recipe.optimisation.steps = 3;
    job.micro_batch = micro_batch.and_then(NonZeroUsize::new);
    job
}

#[test]
fn micro_batches_change_no_gradient_but_by_rounding() {
    let teacher =
        run(&transformer_job(false, None), first_inputs(), &mut Recorder::default()).unwrap().network;
    // 8 frames a batch: parts of 3, of which the last is shorter.
    let steps = |micro_batch| {
        let mut recorder = Recorder::default();
        run(&transformer_job(true, micro_batch), inputs(&teacher), &mut recorder).unwrap();
        recorder.steps()
    };
    let (whole, parts) = (steps(None), steps(Some(3)));
    // The third step's loss is that of weights that two steps' gradients have moved.
    assert_eq!(whole.len(), 3);
    for ((_, whole), (step, parts)) in whole.iter().zip(&parts) {
        assert!((whole - parts).abs() < 1e-4 * whole, "step {step}: {whole} and {parts}");
    }
    assert_eq!(whole, steps(Some(8)), "a whole batch at a time is a whole batch");
}

#[test]
fn a_run_in_micro_batches_resumes_bit_for_bit_and_only_in_the_same_ones() {
    let job = |micro_batch| transformer_job(false, micro_batch);
    let mut recorder = Recorder::default();
    let whole = run(&job(Some(3)), first_inputs(), &mut recorder).unwrap();
    let (step, bytes) = recorder.checkpoints[0].clone();
    assert!(step < whole.steps);
    let rest = || Inputs { checkpoint: Some(bytes.clone()), ..first_inputs() };
    assert_eq!(run(&job(Some(3)), rest(), &mut Recorder::default()).unwrap(), whole);
    let error = run(&job(Some(4)), rest(), &mut Recorder::default()).unwrap_err().to_string();
    assert!(error.contains("micro-batch is 3, this run's is 4"), "{error}");
}

#[test]
fn an_encoder_that_normalises_by_its_batch_takes_no_micro_batches() {
    let mut job = first_job(1);
    job.micro_batch = NonZeroUsize::new(4);
    let error = run(&job, first_inputs(), &mut Recorder::default()).unwrap_err().to_string();
    assert!(error.contains("resnet_small does"), "{error}");
}
