//! What a run does with a period: the words of `--methods`, and what they stand for.
//!
//! A method is written `NAME` or `NAME:KEY=VALUE[:KEY=VALUE]`, as in `lwf:lambda=1:lr=1e-3`. All but `joint` and `random`
//! learn the first period alike, unless they put batches together in a way of their own (`spacing` in seconds, `distance` as
//! train.duplicate_distance); a learning rate of their own counts from the second period on.

use std::str::FromStr;

use serde::Serialize;

use crate::train::spec::Method as Distil;

/// The rows of the published tables but for a sweep.
pub const DEFAULT: &[&str] = &[
    "random",
    "finetune",
    "finetune:lr=1e-3",
    "lwf",
    "lwf:lambda=1",
    "lwf:lr=1e-3",
    "cassle",
    "cosine",
    "replay",
    "joint",
];

/// Frames that `replay` keeps if it is not told.
const REPLAYED: usize = 200;
/// Weight of `cosine` if it is not told: what did best of 5 to 50 in a prototype.
const COSINE_LAMBDA: f64 = 20.0;

#[derive(Debug, Clone, PartialEq)]
pub struct BenchMethod {
    /// As it was written.
    pub name: String,
    pub kind: Kind,
    /// Peak learning rate from the second period on; `None`: that of the first.
    pub learning_rate: Option<f64>,
    /// Of the teacher's weights in those of each version but the first.
    pub teacher_share: f64,
    /// In place of the settings', from the first period on.
    pub spacing_ms: Option<i64>,
    pub duplicate_distance: Option<f64>,
}

/// Which frames and which teacher a period is learned with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Initial weights, which learn nothing: what a probe makes of any network.
    Random,
    /// The new period alone, from the version before.
    Sequential(Distil),
    /// As `finetune`, with so many frames kept of the earlier periods, equally many of each.
    Replay { frames: usize },
    /// From scratch on all periods together, once, for as many steps as the others take in all: the upper bound.
    Joint,
}

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MethodError {
    #[error("{0:?} is no method: random, finetune, lwf, cassle, cosine, replay or joint")]
    Unknown(String),
    #[error("{method:?}: {key:?} is none of its settings ({known})")]
    Key { method: String, key: String, known: &'static str },
    #[error("{method:?}: {key}={value:?} is no positive number")]
    Value { method: String, key: String, value: String },
    #[error("{method:?}: {key}={value:?} is no number of at least 0")]
    Negative { method: String, key: String, value: String },
    #[error("{method:?}: {key} must be a whole number of at least 1")]
    Whole { method: String, key: &'static str },
    #[error("{method:?}: share={share} is not below 1: nothing of what is learned would be left")]
    Share { method: String, share: f64 },
    #[error("{method:?} says {key} twice")]
    Twice { method: String, key: String },
}

/// What a method takes from the configuration unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Defaults {
    pub lambda: f64,
    pub tau_d: f64,
    pub predictor_hidden: usize,
    /// Of lwf and cassle.
    pub teacher_share: f64,
}

/// One method's `KEY=VALUE`s, each taken once.
struct Values {
    method: String,
    known: &'static str,
    pairs: Vec<(String, f64)>,
}

impl Values {
    fn take(&mut self, key: &str, otherwise: f64) -> f64 {
        self.take_if_there(key).unwrap_or(otherwise)
    }

    fn take_if_there(&mut self, key: &str) -> Option<f64> {
        let at = self.pairs.iter().position(|(name, _)| name == key)?;
        Some(self.pairs.swap_remove(at).1)
    }

    fn finish(self) -> Result<(), MethodError> {
        match self.pairs.into_iter().next() {
            Some((key, _)) => Err(MethodError::Key { method: self.method, key, known: self.known }),
            None => Ok(()),
        }
    }
}

impl BenchMethod {
    pub fn parse(text: &str, defaults: &Defaults) -> Result<Self, MethodError> {
        let mut words = text.split(':');
        let name = words.next().unwrap_or_default();
        let known = match name {
            "random" | "joint" => "none",
            "finetune" => "share, lr, spacing, distance",
            "lwf" | "cassle" => "lambda, tau_d, share, lr, spacing, distance",
            "cosine" => "lambda, share, lr, spacing, distance",
            "replay" => "frames, share, lr, spacing, distance",
            _ => return Err(MethodError::Unknown(text.to_owned())),
        };
        let pairs: Vec<(String, f64)> =
            words.map(|word| pair(text, word, known)).collect::<Result<_, _>>()?;
        for (index, (key, _)) in pairs.iter().enumerate() {
            if pairs[..index].iter().any(|(earlier, _)| earlier == key) {
                return Err(MethodError::Twice { method: text.to_owned(), key: key.clone() });
            }
        }
        let mut values = Values { method: text.to_owned(), known, pairs };
        let kind = match name {
            "random" => Kind::Random,
            "joint" => Kind::Joint,
            "finetune" => Kind::Sequential(Distil::Finetune),
            "lwf" => Kind::Sequential(Distil::Lwf {
                lambda: values.take("lambda", defaults.lambda),
                tau_d: values.take("tau_d", defaults.tau_d),
            }),
            "cassle" => Kind::Sequential(Distil::Cassle {
                lambda: values.take("lambda", defaults.lambda),
                tau_d: values.take("tau_d", defaults.tau_d),
                predictor_hidden: defaults.predictor_hidden,
            }),
            "cosine" => {
                Kind::Sequential(Distil::FeatureCosine { lambda: values.take("lambda", COSINE_LAMBDA) })
            }
            _ => match values.take("frames", REPLAYED as f64) {
                frames if frames.fract() == 0.0 => Kind::Replay { frames: frames as usize },
                _ => return Err(MethodError::Whole { method: text.to_owned(), key: "frames" }),
            },
        };
        let own = !matches!(kind, Kind::Random | Kind::Joint);
        let mut of_training = |key| if own { values.take_if_there(key) } else { None };
        let [share, learning_rate, spacing, duplicate_distance] =
            ["share", "lr", "spacing", "distance"].map(&mut of_training);
        let is_averaged = matches!(kind, Kind::Sequential(distil) if distil.is_averaged());
        let teacher_share = share.unwrap_or(if is_averaged { defaults.teacher_share } else { 0.0 });
        if !(0.0..1.0).contains(&teacher_share) {
            return Err(MethodError::Share { method: text.to_owned(), share: teacher_share });
        }
        values.finish()?;
        let spacing_ms = spacing.map(|seconds| (1e3 * seconds).round() as i64);
        Ok(Self { name: text.to_owned(), kind, learning_rate, teacher_share, spacing_ms, duplicate_distance })
    }
}

fn pair(method: &str, word: &str, known: &'static str) -> Result<(String, f64), MethodError> {
    let Some((key, value)) = word.split_once('=') else {
        return Err(MethodError::Key { method: method.into(), key: word.into(), known });
    };
    let (method, key, value) = (method.to_owned(), key.to_owned(), value.to_owned());
    let may_be_0 = ["share", "spacing", "distance"].contains(&&*key);
    match f64::from_str(&value) {
        Ok(number) if number.is_finite() && (number > 0.0 || may_be_0 && number == 0.0) => Ok((key, number)),
        _ if may_be_0 => Err(MethodError::Negative { method, key, value }),
        _ => Err(MethodError::Value { method, key, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults =
        Defaults { lambda: 4.0, tau_d: 0.2, predictor_hidden: 128, teacher_share: 0.25 };

    #[test]
    fn every_row_of_the_table_is_a_method() {
        let methods: Vec<BenchMethod> =
            DEFAULT.iter().map(|text| BenchMethod::parse(text, &DEFAULTS).unwrap()).collect();
        let lwf = |lambda| Kind::Sequential(Distil::Lwf { lambda, tau_d: 0.2 });
        assert_eq!(methods[1].kind, Kind::Sequential(Distil::Finetune));
        assert_eq!((methods[2].kind, methods[2].learning_rate), (methods[1].kind, Some(1e-3)));
        assert_eq!((methods[3].kind, methods[4].kind), (lwf(4.0), lwf(1.0)));
        assert_eq!(methods[8].kind, Kind::Replay { frames: 200 });
        assert_eq!((methods[1].teacher_share, methods[3].teacher_share), (0.0, 0.25));
        let shared = BenchMethod::parse("finetune:share=0.5", &DEFAULTS).unwrap();
        assert_eq!(shared.teacher_share, 0.5);
        let spaced = BenchMethod::parse("finetune:spacing=2.5:distance=0", &DEFAULTS).unwrap();
        assert_eq!((spaced.spacing_ms, spaced.duplicate_distance), (Some(2500), Some(0.0)));
    }

    #[test]
    fn a_wrong_word_is_named_with_what_is_right() {
        let message = |text| BenchMethod::parse(text, &DEFAULTS).unwrap_err().to_string();
        assert_eq!(
            message("lvf"),
            "\"lvf\" is no method: random, finetune, lwf, cassle, cosine, replay or joint"
        );
        assert_eq!(message("joint:lr=1"), "\"joint:lr=1\": \"lr\" is none of its settings (none)");
        assert_eq!(
            message("lwf:lamda=1"),
            "\"lwf:lamda=1\": \"lamda\" is none of its settings (lambda, tau_d, share, lr, spacing, distance)"
        );
        assert_eq!(message("lwf:lr=1:lr=2"), "\"lwf:lr=1:lr=2\" says lr twice");
        assert_eq!(
            message("replay:frames=0.5"),
            "\"replay:frames=0.5\": frames must be a whole number of at least 1"
        );
        assert_eq!(message("lwf:lambda=-1"), "\"lwf:lambda=-1\": lambda=\"-1\" is no positive number");
        assert_eq!(
            message("lwf:share=1"),
            "\"lwf:share=1\": share=1 is not below 1: nothing of what is learned would be left"
        );
        assert_eq!(
            message("lwf:spacing=-1"),
            "\"lwf:spacing=-1\": spacing=\"-1\" is no number of at least 0"
        );
        assert_eq!(
            message("lwf:lambda"),
            "\"lwf:lambda\": \"lambda\" is none of its settings (lambda, tau_d, share, lr, spacing, distance)"
        );
    }
}
