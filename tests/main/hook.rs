//! Parameters that a hook brings to the forward, and gradients that it takes from the backward.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn::tensor::Tensor;
use burn::tensor::ops::FloatTensor;
use llama::model::backend::ops;
use llama::model::weights::{self, ParamMap};
use llama::model::{LlamaConfig, ParamHook, TrainBackend};

use crate::block::{hooked_gradients, small};
use crate::support::{close, device_test, floats, scale, tolerance};

/// Lets a forward have the values of another model, and keeps the gradients.
struct Replacing<B: TrainBackend> {
    values: Mutex<HashMap<String, FloatTensor<B::InnerBackend>>>,
    asked: Mutex<Vec<String>>,
    taken: Mutex<Vec<(String, Vec<f64>)>>,
}

impl<B: TrainBackend> ParamHook<B> for Replacing<B> {
    fn before_forward(&self, path: &str, _: FloatTensor<B>) -> FloatTensor<B> {
        self.asked.lock().unwrap().push(path.into());
        B::from_inner(self.values.lock().unwrap().remove(path).expect("every parameter is asked for once"))
    }

    fn after_backward(&self, path: &str, gradient: FloatTensor<B>) {
        let flat: Tensor<B, 1> = match path.contains("norm") {
            true => ops::tensor(gradient),
            false => ops::tensor::<B, 2>(gradient).flatten(0, 1),
        };
        self.taken.lock().unwrap().push((path.into(), floats(flat)));
    }
}

device_test! {
    fn a_hook_brings_values_and_takes_gradients_layer_by_layer<B>(device) {
        for tied_head in [false, true] {
            let config = LlamaConfig { n_layers: 3, tied_head, ..small() };
            let [model, other] = [1, 2].map(|seed| config.init::<B>(seed, &device).unwrap());
            let expected = hooked_gradients(&other, None);
            struct Values<B: TrainBackend>(HashMap<String, FloatTensor<B::InnerBackend>>);
            impl<B: TrainBackend> ParamMap<B> for Values<B> {
                fn map<const D: usize>(&mut self, path: &str, value: Tensor<B, D>) -> Tensor<B, D> {
                    self.0.insert(path.into(), ops::primitive(value.clone().inner()));
                    value
                }
            }
            let mut values = Values::<B>(HashMap::new());
            weights::map_params(other, &mut values);
            let replacing = Replacing::<B> { values: Mutex::new(values.0), asked: Mutex::default(), taken: Mutex::default() };
            let replacing = Arc::new(replacing);
            let hook: Arc<dyn ParamHook<B>> = replacing.clone();
            let (loss, left) = hooked_gradients(&model, Some(&hook));
            assert_eq!(left, []);
            close("loss", &loss, &expected.0, tolerance(0.0, expected.0[0]));
            let taken = std::mem::take(&mut *replacing.taken.lock().unwrap());
            let paths: Vec<String> = expected.1.iter().map(|(path, _)| path.clone()).collect();
            assert_eq!(*replacing.asked.lock().unwrap(), paths, "in the model's order");
            // The last layer's first, that of the tokens last: what is behind the blocks, then nine of each.
            let of_layer = |path: &str| match path.split('.').nth(1).and_then(|layer| layer.parse::<usize>().ok()) {
                Some(layer) => 2 - layer,
                None if path.starts_with("tok") => 3,
                None => 0,
            };
            let layers: Vec<usize> = taken.iter().map(|(path, _)| of_layer(path)).collect();
            assert!(layers.is_sorted(), "{layers:?}");
            let taken: HashMap<_, _> = taken.into_iter().collect();
            assert_eq!(taken.len(), paths.len());
            for (path, expected) in &expected.1 {
                close(path, &taken[path], expected, tolerance(0.0, scale(expected)));
            }
        }
    }
}
