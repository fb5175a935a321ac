//! AdamW (Loshchilov, Hutter 2019) with what training needs around it: clipping by the global norm, no decay of
//! biases, norms and position embeddings, and moments that can be saved and restored bit for bit.
//!
//! Parameters keep the order they were given in, and every sum over them is taken in that order. A parameter
//! without a gradient is an error: candle drops gradients silently where an operation has no backward. The arithmetic of a step
//! is an operation of the model's (`ops::adamw`).

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var, bail};

use crate::model::{AdamWStep, AdamWTensor, adamw};

use super::spec::Optimisation;

/// Added to the global norm before the limit is divided by it, as PyTorch does.
const NORM_EPSILON: f64 = 1e-6;
/// timm's parameters that are not decayed although they have more than one dimension.
const NOT_DECAYED: [&str; 2] = ["pos_embed", "cls_token"];

/// See the module's text.
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    clip_norm: f64,
    parameters: Vec<Parameter>,
}

struct Parameter {
    name: String,
    var: Var,
    /// Running means of the gradient and of its square.
    moments: [Tensor; 2],
    decays: bool,
}

impl AdamW {
    /// All moments are zero.
    pub fn new(parameters: Vec<(String, Var)>, optimisation: &Optimisation) -> Result<Self> {
        let parameters = parameters
            .into_iter()
            .map(|(name, var)| {
                let moments = [var.zeros_like()?, var.zeros_like()?];
                let decays = var.rank() > 1 && !NOT_DECAYED.iter().any(|end| name.ends_with(end));
                Ok(Parameter { name, var, moments, decays })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            beta1: optimisation.beta1,
            beta2: optimisation.beta2,
            weight_decay: optimisation.weight_decay,
            clip_norm: optimisation.clip_norm,
            parameters,
        })
    }

    /// Names of all parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|parameter| parameter.name.as_str())
    }

    /// The gradient of every parameter, in order; all others are dropped.
    ///
    /// # Errors
    /// Names a parameter that the loss does not depend on, as far as candle knows.
    pub fn gradients(&self, mut grads: GradStore) -> Result<Vec<Tensor>> {
        self.parameters
            .iter()
            .map(|parameter| match grads.remove(parameter.var.as_tensor()) {
                Some(gradient) => gradient.contiguous(),
                None => bail!("no gradient reached {}", parameter.name),
            })
            .collect()
    }

    /// What gradients are scaled by so that their global norm stays within the limit; `squares` are the sums
    /// of squares of each gradient.
    pub fn clip_scale(&self, squares: &[f32]) -> f64 {
        let norm = squares.iter().map(|square| f64::from(*square)).sum::<f64>().sqrt();
        (self.clip_norm / (norm + NORM_EPSILON)).min(1.0)
    }

    /// Moves every parameter; `number` counts the updates from 1, `scale` multiplies the gradients.
    pub fn update(
        &mut self,
        gradients: &[Tensor],
        number: u64,
        learning_rate: f64,
        scale: f64,
    ) -> Result<()> {
        let correction1 = 1.0 - self.beta1.powf(number as f64);
        let correction2 = 1.0 - self.beta2.powf(number as f64);
        let step = AdamWStep {
            scale,
            beta1: self.beta1,
            beta2: self.beta2,
            rate: learning_rate / correction1,
            root_correction: correction2.sqrt(),
        };
        let moved = self.parameters.iter().zip(gradients).map(|(parameter, gradient)| {
            let decay = if parameter.decays { learning_rate * self.weight_decay } else { 0.0 };
            parameter.with(gradient, 1.0 - decay)
        });
        adamw(&moved.collect::<Vec<_>>(), step)
    }

    /// Both moments of every parameter, `NAME.first` and `NAME.second`.
    pub fn moments(&self) -> Vec<(String, Tensor)> {
        let named = |parameter: &Parameter| {
            let [first, second] = &parameter.moments;
            [
                (format!("{}.first", parameter.name), first.clone()),
                (format!("{}.second", parameter.name), second.clone()),
            ]
        };
        self.parameters.iter().flat_map(named).collect()
    }

    /// Takes back what [`AdamW::moments`] gave; `saved` finds a tensor by its name.
    pub fn restore(&mut self, mut saved: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        for parameter in &mut self.parameters {
            for (moment, end) in parameter.moments.iter_mut().zip(["first", "second"]) {
                let name = format!("{}.{end}", parameter.name);
                let tensor = saved(&name)?;
                if tensor.dims() != moment.dims() || tensor.dtype() != moment.dtype() {
                    bail!("moment {name} has shape {:?}, expected {:?}", tensor.dims(), moment.dims());
                }
                *moment = tensor.to_device(moment.device())?.copy()?;
            }
        }
        Ok(())
    }
}

impl Parameter {
    fn with<'a>(&'a self, gradient: &'a Tensor, keep: f64) -> AdamWTensor<'a> {
        AdamWTensor { parameter: self.var.as_tensor(), gradient, moments: self.moments.each_ref(), keep }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::train::fixtures;

    fn optimisation() -> Optimisation {
        Optimisation { weight_decay: 0.1, clip_norm: 1.0, ..fixtures::optimisation() }
    }

    fn var(data: &[f32], shape: (usize, usize)) -> Var {
        Var::from_tensor(&Tensor::from_slice(data, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn gradient(data: &[f32], shape: (usize, usize)) -> Tensor {
        Tensor::from_slice(data, shape, &Device::Cpu).unwrap()
    }

    fn content(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The publication's algorithm 2 in f64, one parameter, constant gradient signs.
    fn reference(mut p: f64, gradients: &[f64], lr: f64, decay: f64) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (t, g) in (1..).zip(gradients) {
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            p -= lr * decay * p;
            p -= lr * m_hat / (v_hat.sqrt() + 1e-8);
        }
        p
    }

    #[test]
    fn updates_are_those_of_the_publication() {
        let weight = var(&[1.0, -2.0], (1, 2));
        let mut adam = AdamW::new(vec![("w".into(), weight.clone())], &optimisation()).unwrap();
        for (number, g) in (1..).zip([[0.5f32, -0.1], [0.3, 0.2], [-0.4, 0.7]]) {
            adam.update(&[gradient(&g, (1, 2))], number, 0.01, 1.0).unwrap();
        }
        let expected =
            [reference(1.0, &[0.5, 0.3, -0.4], 0.01, 0.1), reference(-2.0, &[-0.1, 0.2, 0.7], 0.01, 0.1)];
        for (got, expected) in content(&weight).iter().zip(expected) {
            assert!((f64::from(*got) - expected).abs() < 1e-6, "{got} is not {expected}");
        }
    }

    #[test]
    fn biases_norms_and_position_embeddings_do_not_decay() {
        let bias = Var::ones(3, candle_core::DType::F32, &Device::Cpu).unwrap();
        let named =
            [("blocks.0.attn.qkv.weight", (2, 2)), ("pos_embed", (2, 2)), ("encoder.cls_token", (1, 2))];
        let mut parameters: Vec<_> = named
            .iter()
            .map(|(name, shape)| (name.to_string(), var(&vec![1.0; shape.0 * shape.1], *shape)))
            .collect();
        parameters.push(("norm.bias".into(), bias));
        let mut adam = AdamW::new(parameters.clone(), &optimisation()).unwrap();
        let zeros: Vec<Tensor> = parameters.iter().map(|(_, var)| var.zeros_like().unwrap()).collect();
        adam.update(&zeros, 1, 0.5, 1.0).unwrap();
        let first: Vec<f32> = parameters.iter().map(|(_, var)| content(var)[0]).collect();
        assert_eq!(first, [0.95, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn gradients_above_the_limit_are_scaled_to_it() {
        let adam = AdamW::new(Vec::new(), &optimisation()).unwrap();
        assert_eq!(adam.clip_scale(&[0.09, 0.16]), 1.0);
        assert!((adam.clip_scale(&[9.0, 16.0]) - 0.2).abs() < 1e-6);
    }

    #[test]
    fn a_parameter_without_a_gradient_is_named() {
        let (used, unused) = (var(&[1.0], (1, 1)), var(&[1.0], (1, 1)));
        let parameters = vec![("used".to_owned(), used.clone()), ("unused".to_owned(), unused)];
        let adam = AdamW::new(parameters, &optimisation()).unwrap();
        let grads = used.as_tensor().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let error = adam.gradients(grads).unwrap_err().to_string();
        assert!(error.contains("no gradient reached unused"), "{error}");
    }

    #[test]
    fn restored_moments_go_on_as_the_saved_ones_would() {
        let weight = var(&[1.0, -2.0], (1, 2));
        let mut adam = AdamW::new(vec![("w".into(), weight.clone())], &optimisation()).unwrap();
        adam.update(&[gradient(&[0.5, -0.1], (1, 2))], 1, 0.01, 1.0).unwrap();
        let saved: Vec<_> = adam.moments().into_iter().map(|(name, t)| (name, t.copy().unwrap())).collect();
        let other = var(&content(&weight), (1, 2));
        let mut resumed = AdamW::new(vec![("w".into(), other.clone())], &optimisation()).unwrap();
        let find = |name: &str| Ok(saved.iter().find(|(known, _)| known == name).unwrap().1.clone());
        resumed.restore(find).unwrap();
        for adam in [&mut adam, &mut resumed] {
            adam.update(&[gradient(&[0.2, 0.3], (1, 2))], 2, 0.01, 1.0).unwrap();
        }
        assert_eq!(content(&weight), content(&other));
    }
}
