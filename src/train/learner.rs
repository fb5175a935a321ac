//! The state of a training run and one step of it: views in, moved weights out.
//!
//! Invariant: after a step the state is a function of the state before it and the batch alone, and
//! [`Learner::checkpoint`] holds all of it. The teacher is frozen, runs in eval mode, and sees the student's
//! own views. A step whose losses or gradients are not finite moves nothing and is an error.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;

use crate::model::{HeadSpec, Mode, ModelError, Predictor, Trainability, Weights};

use super::batches::Batch;
use super::checkpoint::{Checkpoint, tensors_to_bytes};
use super::device::Selected;
use super::error::TrainError;
use super::loss::{LossTerms, Pairs, distillation, feature_cosine, ntxent};
use super::network::{Compute, Network, NetworkBytes, PREDICTOR_SEED, prefixed};
use super::optim::AdamW;
use super::rng::weights_seed;
use super::schedule::learning_rate;
use super::spec::{Method, Optimisation, Recipe};

/// What one step measured. Means over the batch, before the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    pub total: f64,
    pub ntxent: f64,
    /// 0 where the method has none.
    pub distillation: f64,
    pub learning_rate: f64,
    /// Global norm of the gradients over all parameters is scaled by this, 1 where it is within the limit.
    pub clip_scale: f64,
}

/// The method's second term, with what it needs.
struct Distillation {
    teacher: Network,
    distilled: Distilled,
    lambda: f64,
}

/// What the student is held to the teacher by.
enum Distilled {
    /// Projections, behind the predictor where there is one.
    Projections {
        tau_d: f64,
        predictor: Option<Box<(Weights, Predictor)>>,
    },
    Features,
}

impl Distillation {
    fn predictor(&self) -> Option<&(Weights, Predictor)> {
        match &self.distilled {
            Distilled::Projections { predictor, .. } => predictor.as_deref(),
            Distilled::Features => None,
        }
    }

    fn predictor_mut(&mut self) -> Option<&mut (Weights, Predictor)> {
        match &mut self.distilled {
            Distilled::Projections { predictor, .. } => predictor.as_deref_mut(),
            Distilled::Features => None,
        }
    }
}

/// See the module's text.
pub struct Learner {
    student: Network,
    distillation: Option<Distillation>,
    optimiser: AdamW,
    optimisation: Optimisation,
    view_shape: (usize, usize, usize),
    selected: Selected,
    /// What the student started from.
    initial: NetworkBytes,
}

impl Learner {
    /// The state before the first step. With a teacher the student is its copy, projector included; otherwise
    /// its weights come from the recipe's seed, the encoder's from `init` if there is one.
    pub fn start(
        recipe: &Recipe,
        teacher: Option<&NetworkBytes>,
        init: Option<&[u8]>,
        selected: &Selected,
    ) -> Result<Self, TrainError> {
        let compute = compute(selected);
        let student = match teacher {
            Some(bytes) => Network::load(&recipe.model, bytes, compute, Trainability::Trainable)?,
            None => Network::initialise(&recipe.model, recipe.seed, init, compute)?,
        };
        let distillation = match teacher {
            Some(bytes) => Distillation::of(recipe, bytes, compute)?,
            None => None,
        };
        let mut parameters = student.trainable();
        if let Some((weights, _)) = distillation.as_ref().and_then(Distillation::predictor) {
            parameters.extend(prefixed("predictor", weights));
        }
        let size = recipe.model.encoder.image_size;
        Ok(Self {
            initial: student.to_bytes()?,
            optimiser: AdamW::new(parameters, &recipe.optimisation)?,
            student,
            distillation,
            optimisation: recipe.optimisation.clone(),
            view_shape: (3, size, size),
            selected: selected.clone(),
        })
    }

    /// What the student started from: the teacher's weights, or the initial ones.
    pub fn initial(&self) -> &NetworkBytes {
        &self.initial
    }

    /// The student as it is now. Sync point.
    pub fn student_bytes(&self) -> Result<NetworkBytes, ModelError> {
        self.student.to_bytes()
    }

    /// What is published of the student: its weights, averaged with the teacher's by the recipe's share. Sync point.
    pub fn published_bytes(
        &self,
        recipe: &Recipe,
        teacher: Option<&NetworkBytes>,
    ) -> Result<NetworkBytes, ModelError> {
        match teacher {
            Some(teacher) if recipe.teacher_share > 0.0 => {
                let compute = compute(&self.selected);
                let teacher = Network::load(&recipe.model, teacher, compute, Trainability::Frozen)?;
                self.student.to_bytes_towards(&teacher, recipe.teacher_share)
            }
            _ => self.student_bytes(),
        }
    }

    /// Takes step `batch.step` of `steps`. One sync point, before the weights move.
    pub fn step(&mut self, batch: Batch, steps: u64) -> Result<StepReport, TrainError> {
        // On one of rayon's threads, as an encoder's forward pass.
        rayon::scope(|_| self.step_on_worker(batch, steps))
    }

    fn step_on_worker(&mut self, batch: Batch, steps: u64) -> Result<StepReport, TrainError> {
        let step = batch.step;
        let (channels, height, width) = self.view_shape;
        let count = batch.views.len() / (channels * height * width);
        let views = Tensor::from_vec(batch.views, (count, channels, height, width), &self.selected.device)?;
        let terms = self.loss(&views, &batch.same)?;
        let gradients = self.optimiser.gradients(&terms.total.backward()?)?;
        let (losses, squares) = read_scalars(&terms, &gradients)?;
        self.check_finite(step, &losses, &squares)?;
        let learning_rate = learning_rate(&self.optimisation, step, steps);
        let clip_scale = self.optimiser.clip_scale(&squares);
        self.optimiser.update(&gradients, step + 1, learning_rate, clip_scale)?;
        Ok(StepReport {
            ntxent: f64::from(losses[0]),
            distillation: f64::from(losses[1]),
            total: f64::from(losses[2]),
            learning_rate,
            clip_scale,
        })
    }

    fn loss(&self, views: &Tensor, same: &Pairs) -> Result<LossTerms, TrainError> {
        let (features, z) = self.student.forward(views, Mode::Train)?;
        let frames = z.dim(0)? / 2;
        let contrast =
            ntxent(&z.narrow(0, 0, frames)?, &z.narrow(0, frames, frames)?, self.optimisation.tau, same)?;
        let distilled = match &self.distillation {
            Some(term) => Some((term.loss(views, (&features, &z), same)?, term.lambda)),
            None => None,
        };
        Ok(LossTerms::combine(contrast, distilled)?)
    }

    fn check_finite(&self, step: u64, losses: &[f32; 3], squares: &[f32]) -> Result<(), TrainError> {
        let losses = ["ntxent", "distillation", "total"]
            .map(|name| format!("the loss {name}"))
            .into_iter()
            .zip(losses);
        let gradients = self.optimiser.names().map(|name| format!("the gradient of {name}")).zip(squares);
        match losses.chain(gradients).find(|(_, value)| !value.is_finite()) {
            Some((term, _)) => Err(TrainError::NotFinite { step, term }),
            None => Ok(()),
        }
    }

    /// The state after `step` steps. Sync point.
    pub fn checkpoint(&self, step: u64) -> Result<Checkpoint, TrainError> {
        let NetworkBytes { encoder, projector } = self.student.to_bytes()?;
        let moments = tensors_to_bytes(&self.optimiser.moments())?;
        let mut sections = BTreeMap::from([
            ("encoder".to_owned(), encoder),
            ("projector".to_owned(), projector),
            ("optimiser".to_owned(), moments),
        ]);
        if let Some((weights, _)) = self.distillation.as_ref().and_then(Distillation::predictor) {
            sections.insert("predictor".to_owned(), weights.to_safetensors()?);
        }
        Ok(Checkpoint { step, sections })
    }

    /// Takes back a state that [`Learner::checkpoint`] gave, of a run with the same recipe.
    pub fn restore(&mut self, recipe: &Recipe, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let bytes = NetworkBytes {
            encoder: checkpoint.section("encoder")?.to_vec(),
            projector: checkpoint.section("projector")?.to_vec(),
        };
        self.student =
            Network::load(&recipe.model, &bytes, compute(&self.selected), Trainability::Trainable)?;
        let mut parameters = self.student.trainable();
        if let Some(predictor) = self.distillation.as_mut().and_then(Distillation::predictor_mut) {
            let section = checkpoint.section("predictor")?;
            *predictor = load_predictor(recipe, section, &self.selected.device)?;
            parameters.extend(prefixed("predictor", &predictor.0));
        }
        self.optimiser = AdamW::new(parameters, &self.optimisation)?;
        let moments = SafeTensors::deserialize(checkpoint.section("optimiser")?).map_err(ModelError::from)?;
        self.optimiser.restore(|name| {
            let view = moments.tensor(name).map_err(candle_core::Error::wrap)?;
            Tensor::from_raw_buffer(view.data(), candle_core::DType::F32, view.shape(), &Device::Cpu)
        })?;
        Ok(())
    }
}

impl Distillation {
    /// None for a method that distils nothing, or with weight 0.
    fn of(recipe: &Recipe, teacher: &NetworkBytes, compute: Compute<'_>) -> Result<Option<Self>, TrainError> {
        let (lambda, distilled) = match recipe.method {
            Method::Finetune => return Ok(None),
            Method::Lwf { lambda, .. } | Method::Cassle { lambda, .. } | Method::FeatureCosine { lambda }
                if lambda == 0.0 =>
            {
                return Ok(None);
            }
            Method::Lwf { lambda, tau_d } => (lambda, Distilled::Projections { tau_d, predictor: None }),
            Method::Cassle { lambda, tau_d, .. } => {
                let predictor = Some(Box::new(new_predictor(recipe, compute.device)?));
                (lambda, Distilled::Projections { tau_d, predictor })
            }
            Method::FeatureCosine { lambda } => (lambda, Distilled::Features),
        };
        let teacher = Network::load(&recipe.model, teacher, compute, Trainability::Frozen)?;
        Ok(Some(Self { teacher, distilled, lambda }))
    }

    /// The distillation of the student's `features` and projections `z` of `views`; a scalar.
    fn loss(
        &self,
        views: &Tensor,
        (features, z): (&Tensor, &Tensor),
        same: &Pairs,
    ) -> Result<Tensor, TrainError> {
        let (old_features, t) = self.teacher.forward(views, Mode::Eval)?;
        let loss = match &self.distilled {
            Distilled::Projections { tau_d, predictor } => match predictor.as_deref() {
                Some((_, predictor)) => distillation(&predictor.forward(z, Mode::Train)?, &t, *tau_d, same)?,
                None => distillation(z, &t, *tau_d, same)?,
            },
            Distilled::Features => feature_cosine(features, &old_features)?,
        };
        Ok(loss)
    }
}

fn compute(selected: &Selected) -> Compute<'_> {
    Compute { device: &selected.device, precision: selected.precision }
}

/// The predictor maps projections onto projections; its width is the method's.
fn predictor_spec(recipe: &Recipe) -> HeadSpec {
    let dim = recipe.model.projector_dim;
    let hidden_dim = match recipe.method {
        Method::Cassle { predictor_hidden, .. } => predictor_hidden,
        Method::Finetune | Method::Lwf { .. } | Method::FeatureCosine { .. } => dim,
    };
    HeadSpec { input_dim: dim, hidden_dim, output_dim: dim }
}

fn new_predictor(recipe: &Recipe, device: &Device) -> Result<(Weights, Predictor), ModelError> {
    let spec = predictor_spec(recipe);
    let seed = weights_seed(recipe.seed, PREDICTOR_SEED);
    let weights = Weights::initialise(&Predictor::parameters(&spec), seed, device)?;
    let predictor = Predictor::build(&spec, &weights)?;
    Ok((weights, predictor))
}

fn load_predictor(
    recipe: &Recipe,
    bytes: &[u8],
    device: &Device,
) -> Result<(Weights, Predictor), ModelError> {
    let spec = predictor_spec(recipe);
    let weights = Weights::load(bytes, &Predictor::parameters(&spec), device, Trainability::Trainable)?;
    let predictor = Predictor::build(&spec, &weights)?;
    Ok((weights, predictor))
}

/// Losses (NT-Xent, distillation or 0, total) and each gradient's sum of squares, in one read from the device.
fn read_scalars(terms: &LossTerms, gradients: &[Tensor]) -> Result<([f32; 3], Vec<f32>), candle_core::Error> {
    let nothing = terms.ntxent.zeros_like()?;
    let distillation = terms.distillation.as_ref().unwrap_or(&nothing);
    let mut scalars = vec![terms.ntxent.detach(), distillation.detach(), terms.total.detach()];
    for gradient in gradients {
        scalars.push(gradient.sqr()?.sum_all()?);
    }
    let values: Vec<f32> = Tensor::stack(&scalars, 0)?.to_vec1()?;
    Ok(([values[0], values[1], values[2]], values[3..].to_vec()))
}
