//! Seeded initial weights, equal on every backend: made on the host, one random stream per parameter.

use burn::module::{Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::backend::LlamaBackend;
use crate::shard::{Shard, Split};

/// Standard deviation of the weights.
const STD: f64 = 0.02;

/// Makes parameters below a path such as `layers.0.attention`.
pub(crate) struct Init<'a, B: LlamaBackend> {
    /// None for zeros.
    seed: Option<u64>,
    n_layers: usize,
    path: String,
    /// The part of each matrix that is made.
    shard: Shard,
    device: &'a B::Device,
}

impl<'a, B: LlamaBackend> Init<'a, B> {
    pub(crate) fn new(seed: Option<u64>, n_layers: usize, shard: Shard, device: &'a B::Device) -> Self {
        Self { seed, n_layers, path: String::new(), shard, device }
    }

    pub(crate) fn device(&self) -> &'a B::Device {
        self.device
    }

    /// The same below `name`.
    pub(crate) fn at(&self, name: &str) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { path, ..*self }
    }

    pub(crate) fn std(&self) -> f64 {
        STD
    }

    /// For matrices that write into the residual stream: its variance does not grow with the 2L terms it sums.
    pub(crate) fn residual_std(&self) -> f64 {
        STD / (2.0 * self.n_layers as f64).sqrt()
    }

    pub(crate) fn normal(&self, dims: [usize; 2], std: f64) -> Param<Tensor<B, 2>> {
        let split = Split::of(&self.weight());
        let Some(seed) = self.seed else {
            // One number that is seen everywhere: in f32 a model may need several times the memory that it is loaded into.
            let zero = Tensor::<B, 2>::zeros([1, 1], self.device);
            return self.param(zero.expand(split.part_dims(dims, self.shard.count)));
        };
        let mut rng = ChaCha8Rng::seed_from_u64(self.hash(seed));
        let values: Vec<f32> = (0..dims[0] * dims[1])
            .map(|_| {
                let z: f32 = StandardNormal.sample(&mut rng);
                z * std as f32
            })
            .collect();
        self.param(Tensor::from_data(split.cut(TensorData::new(values, dims), self.shard), self.device))
    }

    pub(crate) fn uniform(&self, dims: [usize; 2], bound: f64) -> Param<Tensor<B, 2>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.hash(self.seed.unwrap_or(0)));
        let values: Vec<f32> =
            (0..dims[0] * dims[1]).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect();
        self.param(Tensor::from_data(TensorData::new(values, dims), self.device))
    }

    pub(crate) fn zeros(&self, dims: [usize; 2]) -> Param<Tensor<B, 2>> {
        self.param(Tensor::zeros(dims, self.device))
    }

    pub(crate) fn ones(&self, dims: [usize; 1]) -> Param<Tensor<B, 1>> {
        self.param(Tensor::ones(dims, self.device))
    }

    /// Burn's parameter ids are random in each process; these follow from the path, so that optimizer states can be
    /// matched after a restart.
    fn param<const D: usize>(&self, tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
        Param::initialized(ParamId::from(self.hash(0)), tensor.require_grad())
    }

    fn hash(&self, seed: u64) -> u64 {
        xxh3_64_with_seed(self.weight().as_bytes(), seed)
    }

    /// The path of the parameter.
    fn weight(&self) -> String {
        format!("{}.weight", self.path)
    }
}

#[cfg(test)]
#[cfg(all(feature = "flex", target_os = "linux"))]
mod tests {
    use burn::backend::Flex;

    use crate::LlamaConfig;
    use crate::shard::Team;

    /// What a checkpoint is loaded into takes no memory of its own: 65B would be 261 GB in f32, and these are 13.
    #[test]
    fn empty_models_take_no_memory() {
        let gigabytes = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("VmSize")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1e6
        };
        let before = gigabytes();
        let config = LlamaConfig { n_layers: 16, ..LlamaConfig::llama_7b() };
        let model = config.init_empty::<Flex>(&Team::default(), &Default::default()).unwrap();
        assert_eq!(model.layers[15].feed_forward.w1.dims(), [11_008, 4096]);
        let grown = gigabytes() - before;
        assert!(grown < 3.0, "{grown} GB");
    }
}
