//! The factor of the loss in half precision, whose smallest gradients would vanish without it (Micikevicius et al., 2018).

use llama_model::Precision;
use serde::{Deserialize, Serialize};

/// Factor of the **mean** loss a run begins with.
const FIRST: f64 = 65_536.0;
/// Updates without an overflow after which the factor doubles.
const PATIENCE: u64 = 2_000;
/// The factor never grows beyond, or falls below its inverse.
const MOST: f64 = 16_777_216.0;

/// A factor that is halved when gradients overflow, whose step is skipped, and doubled when they have not for long.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// The factor of the summed loss.
    pub factor: f64,
    /// Updates since it changed.
    pub updates: u64,
}

impl LossScale {
    /// The factor for micro-batches of `tokens`; none but in half precision.
    pub fn new(precision: Precision, tokens: u64) -> Option<Self> {
        // A power of two: scaling is exact.
        let per_token = FIRST / (tokens as f64).log2().round().exp2();
        (precision == Precision::F16).then_some(Self { factor: per_token, updates: 0 })
    }

    /// After an update.
    pub fn grow(&mut self) {
        self.updates += 1;
        if self.updates == PATIENCE && self.factor < MOST {
            *self = Self { factor: 2.0 * self.factor, updates: 0 };
        }
    }

    /// After an overflow; false if the factor cannot fall any further, so that it was none of its doing.
    pub fn shrink(&mut self) -> bool {
        *self = Self { factor: self.factor / 2.0, updates: 0 };
        self.factor > 1.0 / MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_slowly_and_falls_at_once() {
        assert_eq!(LossScale::new(Precision::Bf16, 1024), None);
        let mut scale = LossScale::new(Precision::F16, 1000).unwrap();
        assert_eq!(scale.factor, 64.0);
        (0..PATIENCE).for_each(|_| scale.grow());
        assert_eq!(scale, LossScale { factor: 128.0, updates: 0 });
        assert!(scale.shrink());
        assert_eq!(scale.factor, 64.0);
        assert!((0..60).any(|_| !scale.shrink()));
    }
}
