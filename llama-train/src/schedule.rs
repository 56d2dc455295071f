//! Learning rate over optimizer steps (paper, section 2.3): linear warmup, then half a cosine down to a share of the
//! peak at the last step. It never restarts.

use std::f64::consts::PI;

use burn::lr_scheduler::LrScheduler;
use burn::tensor::backend::Backend;

use crate::ScheduleConfig;

/// The schedule, and the step it is at.
#[derive(Clone, Debug)]
pub struct WarmupCosine {
    config: ScheduleConfig,
    step: u64,
}

impl WarmupCosine {
    /// A schedule at its first step.
    pub fn new(config: ScheduleConfig) -> Self {
        Self { config, step: 0 }
    }

    /// Learning rate of optimizer step `step`, counted from 0. Step `warmup_steps - 1` has the peak, step `steps - 1`
    /// the final rate, and so has every step after it.
    pub fn lr(&self, step: u64) -> f64 {
        let ScheduleConfig { peak_lr, final_fraction, warmup_steps, steps } = self.config;
        if step < warmup_steps {
            return peak_lr * (step + 1) as f64 / warmup_steps as f64;
        }
        let progress = (step + 1 - warmup_steps) as f64 / (steps - warmup_steps).max(1) as f64;
        let cosine = 0.5 * (1.0 + (PI * progress.min(1.0)).cos());
        peak_lr * (final_fraction + (1.0 - final_fraction) * cosine)
    }
}

impl LrScheduler for WarmupCosine {
    type Record<B: Backend> = usize;

    fn step(&mut self) -> f64 {
        self.step += 1;
        self.lr(self.step - 1)
    }

    fn to_record<B: Backend>(&self) -> usize {
        self.step as usize
    }

    fn load_record<B: Backend>(self, record: usize) -> Self {
        Self { step: record as u64, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_peaks_and_ends_at_ten_percent() {
        let schedule =
            WarmupCosine::new(ScheduleConfig { peak_lr: 1e-2, final_fraction: 0.1, warmup_steps: 5, steps: 20 });
        let close = |step, expected: f64| assert!((schedule.lr(step) - expected).abs() < 1e-12, "step {step}");
        close(0, 2e-3);
        close(4, 1e-2);
        close(19, 1e-3);
        close(1000, 1e-3);
        assert!((5..19).all(|step| schedule.lr(step) < schedule.lr(step - 1)));
    }

    #[test]
    fn no_warmup_and_only_warmup_are_fine() {
        let config = |warmup_steps, steps| ScheduleConfig { peak_lr: 1.0, final_fraction: 0.1, warmup_steps, steps };
        assert!(WarmupCosine::new(config(0, 10)).lr(0) < 1.0);
        assert_eq!(WarmupCosine::new(config(10, 10)).lr(9), 1.0);
    }
}
