//! The state of a training run and one step of it: views in, moved weights out.
//!
//! Invariant: after a step the state is a function of the state before it and the batch alone, and
//! [`Learner::checkpoint`] holds all of it. The teacher is frozen, runs in eval mode, and sees the student's
//! own views. A step whose losses or gradients are not finite moves nothing and is an error.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use safetensors::SafeTensors;

use crate::model::{
    Architecture, HeadSpec, Mode, ModelError, Predictor, Trainability, Weights, sums_of_squares,
};

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
    architecture: Architecture,
    view_shape: (usize, usize, usize),
    /// Frames whose activations are in memory at once; none: a whole batch's.
    micro_batch: Option<NonZeroUsize>,
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
            architecture: recipe.model.encoder.architecture,
            view_shape: (3, size, size),
            micro_batch: None,
            selected: selected.clone(),
        })
    }

    /// Keeps the activations of so many frames in memory at once, of a whole batch's with none. It costs one more pass
    /// forward and changes no gradient but by rounding.
    ///
    /// # Errors
    /// For an encoder whose features depend on the batch they are in.
    pub fn hold_at_most(&mut self, micro_batch: Option<NonZeroUsize>) -> Result<(), TrainError> {
        if micro_batch.is_some() && self.architecture.normalises_by_batch() {
            return Err(TrainError::MicroBatch { architecture: self.architecture });
        }
        self.micro_batch = micro_batch;
        Ok(())
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
        let (terms, gradients) = match self.micro_batch {
            Some(frames) if 2 * frames.get() < count => {
                self.cached_gradients(&views, 2 * frames.get(), &batch.same)?
            }
            _ => {
                let features = self.student.encoder().forward(&views, Mode::Train)?;
                let terms = self.loss(&views, &features, &batch.same)?;
                let gradients = terms.total.backward()?;
                (terms, gradients)
            }
        };
        let gradients = self.optimiser.gradients(gradients)?;
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

    /// Gradient caching (Gao, Zhang, Han, Callan: *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*, 2021),
    /// with the activations of `part` views in memory at a time: features of all views first, of which no graph is kept;
    /// the losses of the whole batch and their gradient by the features; then part by part the features again, with a graph, and
    /// through it that gradient.
    fn cached_gradients(
        &self,
        views: &Tensor,
        part: usize,
        same: &Pairs,
    ) -> Result<(LossTerms, GradStore), TrainError> {
        let encoder = self.student.encoder();
        let features = in_parts(views, part, |views| Ok(encoder.forward(views, Mode::Train)?.detach()))?;
        let features = Var::from_tensor(&features)?;
        let terms = self.loss(views, features.as_tensor(), same)?;
        let mut gradients = terms.total.backward()?;
        let Some(cached) = gradients.remove(features.as_tensor()) else {
            return Err(candle_core::Error::msg("no gradient reached the features").into());
        };
        for start in (0..views.dim(0)?).step_by(part) {
            let rows = part.min(views.dim(0)? - start);
            let features = encoder.forward(&views.narrow(0, start, rows)?, Mode::Train)?;
            let share = (features * cached.narrow(0, start, rows)?)?.sum_all()?;
            let mut share = share.backward()?;
            // The weights' alone: the store also keeps gradients of what is no variable, such as the views.
            for weight in self.student.encoder_variables() {
                let Some(gradient) = share.remove(&weight) else { continue };
                let sum = match gradients.remove(&weight) {
                    Some(sum) => (sum + gradient)?,
                    None => gradient,
                };
                gradients.insert(&weight, sum);
            }
        }
        Ok((terms, gradients))
    }

    /// Of all views of a batch and the student's features of them.
    fn loss(&self, views: &Tensor, features: &Tensor, same: &Pairs) -> Result<LossTerms, TrainError> {
        let z = self.student.project(features, Mode::Train)?;
        let frames = z.dim(0)? / 2;
        let contrast =
            ntxent(&z.narrow(0, 0, frames)?, &z.narrow(0, frames, frames)?, self.optimisation.tau, same)?;
        let distilled = match &self.distillation {
            Some(term) => {
                let teacher = self.teacher_of(term, views)?;
                Some((term.loss((features, &z), teacher, same)?, term.lambda))
            }
            None => None,
        };
        Ok(LossTerms::combine(contrast, distilled)?)
    }

    /// The teacher's features and projections of `views`.
    fn teacher_of(&self, term: &Distillation, views: &Tensor) -> Result<(Tensor, Tensor), TrainError> {
        let part = self.micro_batch.map_or(views.dim(0)?, |frames| 2 * frames.get());
        let encoder = term.teacher.encoder();
        let features = in_parts(views, part, |views| encoder.forward(views, Mode::Eval))?;
        let projections = term.teacher.project(&features, Mode::Eval)?;
        Ok((features, projections))
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

    /// The distillation of the student's features and projections `z` to the teacher's features and projections `t` of the same
    /// views; a scalar.
    fn loss(
        &self,
        (features, z): (&Tensor, &Tensor),
        (old_features, t): (Tensor, Tensor),
        same: &Pairs,
    ) -> Result<Tensor, TrainError> {
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

/// What `f` makes of `views`, `part` of them at a time.
fn in_parts(
    views: &Tensor,
    part: usize,
    f: impl Fn(&Tensor) -> Result<Tensor, ModelError>,
) -> Result<Tensor, TrainError> {
    let count = views.dim(0)?;
    if part >= count {
        return Ok(f(views)?);
    }
    let starts = (0..count).step_by(part);
    let parts = starts.map(|start| f(&views.narrow(0, start, part.min(count - start))?));
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>, _>>()?, 0)?)
}

/// Losses (NT-Xent, distillation or 0, total) and each gradient's sum of squares, in one read from the device.
fn read_scalars(terms: &LossTerms, gradients: &[Tensor]) -> Result<([f32; 3], Vec<f32>), candle_core::Error> {
    let nothing = terms.ntxent.zeros_like()?;
    let distillation = terms.distillation.as_ref().unwrap_or(&nothing);
    let losses = [terms.ntxent.detach(), distillation.detach(), terms.total.detach()];
    let all = Tensor::cat(&[Tensor::stack(&losses, 0)?, sums_of_squares(gradients)?], 0)?;
    let values: Vec<f32> = all.to_vec1()?;
    Ok(([values[0], values[1], values[2]], values[3..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::EncoderSpec;
    use crate::train::device::select;
    use crate::train::fixtures;
    use crate::train::spec::PrecisionChoice;

    /// 8 frames of 16 x 16, both views.
    fn views() -> Tensor {
        let wave: Vec<f32> =
            (0..16 * 3 * 256).map(|i| (i as f32 * 0.37).sin() + (i as f32 * 0.011).cos()).collect();
        Tensor::from_vec(wave, (16, 3, 16, 16), &Device::Cpu).unwrap()
    }

    #[test]
    fn cached_gradients_are_those_of_the_whole_batch() {
        let selected = select("cpu", PrecisionChoice::F32).unwrap();
        let mut recipe = fixtures::job().recipe;
        recipe.model.encoder =
            EncoderSpec { architecture: Architecture::VitTiny, image_size: 16, patch_size: 8 };
        let teacher = Learner::start(&recipe, None, None, &selected).unwrap().student_bytes().unwrap();
        for method in [
            Method::Finetune,
            Method::Lwf { lambda: 4.0, tau_d: 0.2 },
            Method::Cassle { lambda: 4.0, tau_d: 0.2, predictor_hidden: 32 },
            Method::FeatureCosine { lambda: 20.0 },
        ] {
            recipe.method = method;
            let learner = Learner::start(&recipe, Some(&teacher), None, &selected).unwrap();
            let (views, same) = (views(), [(1, 4)]);
            let features = learner.student.encoder().forward(&views, Mode::Train).unwrap();
            let whole = learner.loss(&views, &features, &same).unwrap();
            // Parts of 6, 6 and 4 views.
            let (parts, cached) = learner.cached_gradients(&views, 6, &same).unwrap();
            let value = |terms: &LossTerms| terms.total.to_scalar::<f32>().unwrap();
            assert!((value(&whole) - value(&parts)).abs() < 1e-5 * value(&whole), "{method:?}");
            let expected = learner.optimiser.gradients(whole.total.backward().unwrap()).unwrap();
            let cached = learner.optimiser.gradients(cached).unwrap();
            let largest = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // Some gradients are 0 but for rounding: a shift of all features leaves the projector's normalisation as it is.
            let rounding = 1e-6 * expected.iter().map(largest).fold(0.0, f32::max);
            for ((name, expected), cached) in learner.optimiser.names().zip(&expected).zip(&cached) {
                let distance = largest(&(expected - cached).unwrap());
                assert!(distance <= 2e-5 * largest(expected) + rounding, "{method:?}, {name}: {distance}");
            }
        }
    }
}
