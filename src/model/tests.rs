//! Whole networks: names and outputs against timm and torchvision, the gradient of every parameter against finite
//! differences, what training and evaluation modes do, and that threads change no bit.
//!
//! `tests/data/print_encoder_facts.py` printed what is compared with; its `formula` and `uniform` are repeated here.

use candle_core::{DType, Device, Tensor, Var};

use super::ops::gradient_check::{central_difference, random, weighted_sum};
use super::*;

const SEED: u64 = 3;

fn spec(architecture: Architecture, image_size: usize, patch_size: usize) -> EncoderSpec {
    EncoderSpec { architecture, image_size, patch_size }
}

/// The smallest of each kind that still has every part.
fn small(architecture: Architecture) -> EncoderSpec {
    match architecture {
        Architecture::VitTiny => spec(architecture, 16, 8),
        Architecture::Resnet18 => spec(architecture, 32, 0),
        Architecture::ResnetSmall => spec(architecture, 16, 0),
    }
}

fn initialised(spec: &EncoderSpec) -> Weights {
    Weights::initialise(&spec.parameters(), SEED, &Device::Cpu).unwrap()
}

/// A teacher, loaded as training does.
fn frozen(spec: &EncoderSpec, weights: &Weights) -> Weights {
    let bytes = weights.to_safetensors().unwrap();
    Weights::load(&bytes, &spec.parameters(), &Device::Cpu, Trainability::Frozen).unwrap()
}

fn f32_images(batch: usize, size: usize) -> Tensor {
    random((batch, 3, size, size), 9).to_dtype(DType::F32).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

mod golden {
    use super::*;
    use serde_json::Value;

    fn uniform(count: usize) -> Vec<f64> {
        let value = |index: u64| {
            let mut x = index.wrapping_mul(2_654_435_761).wrapping_add(count as u64) & 0xFFFF_FFFF;
            x ^= x >> 16;
            x = x.wrapping_mul(0x045D_9F3B) & 0xFFFF_FFFF;
            x ^= x >> 16;
            x as f64 / 2f64.powi(31) - 1.0
        };
        (0..count as u64).map(value).collect()
    }

    fn formula(name: &str, shape: &[usize]) -> Vec<f32> {
        let count: usize = shape.iter().product();
        let value = |v: f64| match (name.ends_with("running_var"), shape.len()) {
            (true, _) => 1.0 + 0.5 * v,
            (false, 1) => f64::from(u8::from(name.ends_with("weight"))) + 0.1 * v,
            (false, _) => v * (6.0 / (count / shape[0]) as f64).sqrt(),
        };
        uniform(count).into_iter().map(|v| value(v) as f32).collect()
    }

    fn filled(spec: &EncoderSpec) -> Weights {
        let weights = initialised(spec);
        for (name, var) in weights.iter().filter(|(_, tensor)| tensor.dtype() == DType::F32) {
            let tensor = Tensor::from_vec(formula(name, var.dims()), var.dims(), &Device::Cpu).unwrap();
            Var::from_tensor(var).unwrap().set(&tensor).unwrap();
        }
        weights
    }

    fn images(batch: usize, size: usize) -> Tensor {
        let data: Vec<f32> = uniform(batch * 3 * size * size).into_iter().map(|v| v as f32).collect();
        Tensor::from_vec(data, (batch, 3, size, size), &Device::Cpu).unwrap()
    }

    fn expected() -> Value {
        serde_json::from_str(include_str!("../../tests/data/golden_encoders.json")).unwrap()
    }

    fn assert_near(actual: &[f32], expected: &Value, tolerance: f64) {
        let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(actual.len(), expected.len());
        for (actual, expected) in actual.iter().zip(expected) {
            let distance = (f64::from(*actual) - expected).abs();
            assert!(distance <= tolerance * (1.0 + expected.abs()), "{actual}, torch has {expected}");
        }
    }

    fn assert_row_ends(output: &Tensor, expected: &Value) {
        let values = output.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mean_abs = values.iter().map(|v| v.abs()).sum::<f32>() / values.len() as f32;
        assert_near(&values[..8], &expected["first"], 1e-4);
        assert_near(&values[values.len() - 8..], &expected["last"], 1e-4);
        assert_near(&[mean_abs], &expected["mean_abs"], 1e-4);
    }

    #[test]
    fn vit_tiny_computes_what_timm_computes() {
        let spec = spec(Architecture::VitTiny, 64, 16);
        let encoder = build(&spec, &filled(&spec), Precision::F32).unwrap();
        let output = encoder.forward(&images(2, 64), Mode::Eval).unwrap();
        assert_row_ends(&output, &expected()["vit_tiny_image64_patch16_batch2"]);
    }

    #[test]
    fn resnet18_computes_what_torchvision_computes() {
        let spec = spec(Architecture::Resnet18, 64, 0);
        let weights = filled(&spec);
        let encoder = build(&spec, &weights, Precision::F32).unwrap();
        let expected = expected();
        let output = encoder.forward(&images(4, 64), Mode::Train).unwrap();
        assert_row_ends(&output, &expected["resnet18_image64_batch4_train"]);

        let factors: Vec<f32> = uniform(output.elem_count()).into_iter().map(|v| v as f32).collect();
        let factors = Tensor::from_vec(factors, output.dims(), &Device::Cpu).unwrap();
        let grads = (&output * factors).unwrap().sum_all().unwrap().backward().unwrap();
        let stem = grads.get(&weights.get("conv1.weight").unwrap()).unwrap().flatten_all().unwrap();
        let stem = stem.narrow(0, 0, 8).unwrap().to_vec1::<f32>().unwrap();
        assert_near(&stem, &expected["resnet18_image64_batch4_train_conv1_weight_grad"], 1e-3);

        let head = |name: &str| weights.get(name).unwrap().narrow(0, 0, 8).unwrap().to_vec1::<f32>().unwrap();
        let statistics = &expected["resnet18_image64_batch4_train_layer4.1.bn2"];
        assert_near(&head("layer4.1.bn2.running_mean"), &statistics["running_mean"], 1e-4);
        assert_near(&head("layer4.1.bn2.running_var"), &statistics["running_var"], 1e-4);
        let output = encoder.forward(&images(4, 64), Mode::Eval).unwrap();
        assert_row_ends(&output, &expected["resnet18_image64_batch4_eval_after_one_train_pass"]);
    }

    fn assert_names(spec: &EncoderSpec, printed: &str) {
        let line = |parameter: &ParameterSpec| {
            let shape: Vec<String> = parameter.shape.iter().map(usize::to_string).collect();
            let shape = if shape.is_empty() { "scalar".to_owned() } else { shape.join("x") };
            let dtype = if parameter.kind == ParameterKind::Counter { "int64" } else { "float32" };
            format!("{} {dtype} {shape}", parameter.name)
        };
        let actual: Vec<String> = spec.parameters().iter().map(line).collect();
        let expected: Vec<&str> = printed.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(actual, expected);
    }

    #[test]
    fn names_and_shapes_equal_timms_and_torchvisions() {
        let vit = include_str!("../../tests/data/parameter_names_vit_tiny_patch16_224.txt");
        assert_names(&spec(Architecture::VitTiny, 224, 16), vit);
        let resnet = include_str!("../../tests/data/parameter_names_resnet18.txt");
        assert_names(&spec(Architecture::Resnet18, 224, 0), resnet);
    }
}

mod gradients {
    use super::*;

    const STEP: f64 = 1e-7;
    const TOLERANCE: f64 = 1e-5;

    /// Checks three entries of each trainable tensor at once: the one with the largest gradient, and two anywhere.
    fn assert_every_parameter(weights: &Weights, forward: impl Fn() -> Tensor, without_effect: &[&str]) {
        let loss = || weighted_sum(&forward()).to_scalar::<f64>().unwrap();
        let grads = weighted_sum(&forward()).backward().unwrap();
        let trainable = weights.trainable();
        assert!(!trainable.is_empty());
        for (name, var) in trainable {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} got no gradient"));
            assert_eq!(grad.dims(), var.dims(), "{name}");
            let grad: Vec<f64> = grad.flatten_all().unwrap().to_vec1().unwrap();
            let largest = (0..grad.len()).max_by(|&a, &b| grad[a].abs().total_cmp(&grad[b].abs())).unwrap();
            let has_effect = grad[largest].abs() > 1e-9;
            assert_eq!(has_effect, !without_effect.contains(&name.as_str()), "{name}: {}", grad[largest]);
            let anywhere = |factor: usize| (name.len() + 1) * factor % grad.len();
            let moves = [(largest, 1.0), (anywhere(7919), -0.7), (anywhere(104_729), 1.3)];
            let analytic: f64 = moves.iter().map(|&(index, factor)| grad[index] * factor).sum();
            let numeric = central_difference(&var, &moves, STEP, &loss);
            let allowed = TOLERANCE * (1.0 + analytic.abs());
            assert!(
                (analytic - numeric).abs() <= allowed,
                "{name} at {moves:?}: analytic {analytic}, numeric {numeric}"
            );
        }
    }

    fn assert_encoder(architecture: Architecture, batch: usize, mode: Mode) {
        let spec = small(architecture);
        let weights = initialised(&spec).to_f64();
        let encoder = build(&spec, &weights, Precision::F32).unwrap();
        let images = random((batch, 3, spec.image_size, spec.image_size), 9);
        assert_every_parameter(&weights, || encoder.forward(&images, mode).unwrap(), &[]);
    }

    #[test]
    fn every_parameter_of_vit_tiny() {
        assert_encoder(Architecture::VitTiny, 2, Mode::Train);
    }

    #[test]
    fn every_parameter_of_resnet18() {
        assert_encoder(Architecture::Resnet18, 5, Mode::Train);
    }

    #[test]
    fn every_parameter_of_resnet_small() {
        assert_encoder(Architecture::ResnetSmall, 3, Mode::Train);
    }

    #[test]
    fn every_parameter_of_resnet_small_in_evaluation_mode() {
        assert_encoder(Architecture::ResnetSmall, 2, Mode::Eval);
    }

    #[test]
    fn every_parameter_of_projector_and_predictor() {
        let spec = HeadSpec { input_dim: 5, hidden_dim: 7, output_dim: 4 };
        let x = random((6, 5), 1);
        let weights =
            Weights::initialise(&Projector::parameters(&spec), SEED, &Device::Cpu).unwrap().to_f64();
        let projector = Projector::build(&spec, &weights).unwrap();
        assert_every_parameter(&weights, || projector.forward(&x, Mode::Train).unwrap(), &[]);

        let weights =
            Weights::initialise(&Predictor::parameters(&spec), SEED, &Device::Cpu).unwrap().to_f64();
        let predictor = Predictor::build(&spec, &weights).unwrap();
        // The normalisation takes away what the first bias adds: its gradient is zero by mathematics.
        assert_every_parameter(&weights, || predictor.forward(&x, Mode::Train).unwrap(), &["0.bias"]);
    }
}

/// Output and every gradient of one f32 training pass, bit by bit, inside a pool of `threads`.
fn training_pass(spec: &EncoderSpec, batch: usize, threads: usize) -> Vec<(String, Vec<u32>)> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let weights = initialised(spec);
        let encoder = build(spec, &weights, Precision::F32).unwrap();
        let output = encoder.forward(&f32_images(batch, spec.image_size), Mode::Train).unwrap();
        let grads = weighted_sum(&output).backward().unwrap();
        let mut all = vec![("output".to_owned(), bits(&output))];
        for (name, var) in weights.trainable() {
            all.push((name, bits(grads.get(&var).unwrap())));
        }
        all.push((
            "statistics".to_owned(),
            weights.to_safetensors().unwrap().into_iter().map(u32::from).collect(),
        ));
        all
    })
}

#[test]
fn threads_change_no_bit_of_outputs_gradients_and_statistics() {
    for (architecture, batch) in [(Architecture::ResnetSmall, 24), (Architecture::VitTiny, 40)] {
        let spec = small(architecture);
        let one = training_pass(&spec, batch, 1);
        for threads in [1, 2, 3] {
            for (expected, actual) in one.iter().zip(training_pass(&spec, batch, threads)) {
                assert!(*expected == actual, "{architecture}, {}, {threads} threads", actual.0);
            }
        }
    }
}

#[test]
fn threads_change_no_bit_of_a_lone_images_features() {
    for architecture in Architecture::ALL {
        let spec = EncoderSpec { architecture, image_size: 64, patch_size: 8 };
        let weights = frozen(&spec, &initialised(&spec));
        let features = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let encoder = build(&spec, &weights, Precision::F32).unwrap();
                let features = encoder.forward(&f32_images(1, spec.image_size), Mode::Eval).unwrap();
                features.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            })
        };
        let one = features(1);
        for threads in [2, 3, 5] {
            assert!(one == features(threads), "{architecture}, {threads} threads");
        }
    }
}

#[test]
fn a_teacher_records_no_graph() {
    for architecture in Architecture::ALL {
        let spec = small(architecture);
        let teacher = build(&spec, &frozen(&spec, &initialised(&spec)), Precision::F32).unwrap();
        let output = teacher.forward(&f32_images(2, spec.image_size), Mode::Eval).unwrap();
        assert!(!output.track_op(), "{architecture}");
        assert_eq!(output.dims(), [2, teacher.feature_dim()]);
        assert_eq!(teacher.feature_dim(), spec.feature_dim());
    }
}

#[test]
fn no_gradient_reaches_a_teacher_through_a_shared_loss() {
    let spec = small(Architecture::ResnetSmall);
    let (student_weights, images) = (initialised(&spec), f32_images(3, spec.image_size));
    let teacher_weights = frozen(&spec, &student_weights);
    let student =
        build(&spec, &student_weights, Precision::F32).unwrap().forward(&images, Mode::Train).unwrap();
    let teacher =
        build(&spec, &teacher_weights, Precision::F32).unwrap().forward(&images, Mode::Eval).unwrap();
    let grads = (student * teacher).unwrap().sum_all().unwrap().backward().unwrap();
    for (name, tensor) in teacher_weights.iter() {
        assert!(grads.get(tensor).is_none(), "{name}");
    }
}

#[test]
fn a_teacher_in_training_mode_is_refused() {
    let spec = small(Architecture::ResnetSmall);
    let teacher = build(&spec, &frozen(&spec, &initialised(&spec)), Precision::F32).unwrap();
    let error = teacher.forward(&f32_images(2, spec.image_size), Mode::Train).unwrap_err();
    assert!(matches!(error, ModelError::FrozenStatistics { name } if name == "bn1.running_mean"));
}

#[test]
fn evaluation_leaves_the_running_statistics_alone_and_training_moves_them() {
    let spec = small(Architecture::ResnetSmall);
    let weights = initialised(&spec);
    let encoder = build(&spec, &weights, Precision::F32).unwrap();
    let before = weights.to_safetensors().unwrap();
    encoder.forward(&f32_images(2, spec.image_size), Mode::Eval).unwrap();
    assert!(weights.to_safetensors().unwrap() == before);
    encoder.forward(&f32_images(2, spec.image_size), Mode::Train).unwrap();
    encoder.forward(&f32_images(2, spec.image_size), Mode::Train).unwrap();
    for (name, tensor) in weights.iter().filter(|(name, _)| name.ends_with("num_batches_tracked")) {
        assert_eq!(tensor.to_scalar::<i64>().unwrap(), 2, "{name}");
    }
}

#[test]
fn running_statistics_follow_torchs_rule() {
    let spec = HeadSpec { input_dim: 1, hidden_dim: 1, output_dim: 1 };
    let weights = Weights::initialise(&Projector::parameters(&spec), SEED, &Device::Cpu).unwrap();
    Var::from_tensor(&weights.get("0.weight").unwrap())
        .unwrap()
        .set(&Tensor::new(&[[1f32]], &Device::Cpu).unwrap())
        .unwrap();
    let x = Tensor::new(&[[1f32], [2.0], [6.0]], &Device::Cpu).unwrap();
    Projector::build(&spec, &weights).unwrap().forward(&x, Mode::Train).unwrap();
    let value = |name: &str| weights.get(name).unwrap().to_vec1::<f32>().unwrap()[0];
    // Mean 3, unbiased variance (4 + 1 + 9) / 2 = 7, momentum 0.1 from 0 and 1.
    assert!((value("1.running_mean") - 0.3).abs() < 1e-6);
    assert!((value("1.running_var") - (0.9 + 0.7)).abs() < 1e-6);
}

#[test]
fn one_value_a_channel_has_no_variance_to_train_on() {
    let spec = HeadSpec { input_dim: 2, hidden_dim: 3, output_dim: 2 };
    let weights = Weights::initialise(&Projector::parameters(&spec), SEED, &Device::Cpu).unwrap();
    let projector = Projector::build(&spec, &weights).unwrap();
    let x = Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(projector.forward(&x, Mode::Train), Err(ModelError::BatchTooSmall { rows: 1 })));
    projector.forward(&x, Mode::Eval).unwrap();
}

#[test]
fn an_encoder_sees_what_the_optimiser_sets() {
    let spec = small(Architecture::ResnetSmall);
    let weights = initialised(&spec);
    let encoder = build(&spec, &weights, Precision::F32).unwrap();
    let images = f32_images(2, spec.image_size);
    let before = bits(&encoder.forward(&images, Mode::Eval).unwrap());
    let (_, conv1) = weights.trainable().into_iter().find(|(name, _)| name == "conv1.weight").unwrap();
    conv1.set(&(conv1.as_tensor() * 2.0).unwrap()).unwrap();
    assert_ne!(bits(&encoder.forward(&images, Mode::Eval).unwrap()), before);
}

#[test]
fn parameter_counts_equal_timms_and_torchvisions() {
    let count = |spec: EncoderSpec| -> usize {
        let trainable = |p: &&ParameterSpec| p.kind == ParameterKind::Trainable;
        spec.parameters().iter().filter(trainable).map(ParameterSpec::element_count).sum()
    };
    assert_eq!(count(spec(Architecture::ResnetSmall, 32, 0)), 173_304);
    // sum(p.numel() for p in model.parameters()) of timm's and torchvision's models.
    assert_eq!(count(spec(Architecture::VitTiny, 224, 16)), 5_524_416);
    assert_eq!(count(spec(Architecture::Resnet18, 224, 0)), 11_176_512);
}

#[test]
fn a_wrong_specification_says_what_would_be_right() {
    let message = |spec: EncoderSpec| spec.validate().unwrap_err().to_string();
    assert_eq!(message(spec(Architecture::VitTiny, 64, 7)), "patch size 7 px must divide image size 64 px");
    assert_eq!(message(spec(Architecture::VitTiny, 64, 0)), "patch size 0 px must divide image size 64 px");
    let text = message(spec(Architecture::Resnet18, 16, 0));
    assert_eq!(text, "image size 16 px for resnet18 must lie in 32..=1024");
    assert!(spec(Architecture::ResnetSmall, 32, 0).validate().is_ok());
}

#[test]
fn weights_of_another_network_are_refused_by_name() {
    let weights = initialised(&small(Architecture::ResnetSmall));
    let error = build(&small(Architecture::Resnet18), &weights, Precision::F32).err().unwrap();
    assert_eq!(error.to_string(), "tensor \"conv1.weight\" has shape [24, 3, 3, 3], expected [64, 3, 7, 7]");
    let error = build(&small(Architecture::VitTiny), &weights, Precision::F32).err().unwrap();
    assert_eq!(error.to_string(), "tensor \"cls_token\" is missing");
}

#[test]
fn images_of_another_size_are_refused() {
    let spec = small(Architecture::ResnetSmall);
    let encoder = build(&spec, &initialised(&spec), Precision::F32).unwrap();
    let error = encoder.forward(&f32_images(2, 32), Mode::Eval).unwrap_err();
    let expected = "images have shape [2, 3, 32, 32], expected [batch, 3, 16, 16] with a batch of at least 1";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn architectures_have_one_name_everywhere() {
    for architecture in Architecture::ALL {
        assert_eq!(architecture.to_string().parse::<Architecture>().unwrap(), architecture);
        assert_eq!(serde_json::to_value(architecture).unwrap(), architecture.name());
    }
    assert!("vit_huge".parse::<Architecture>().is_err());
}
