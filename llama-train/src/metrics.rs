//! Metrics of a run, for burn-train's renderers.

use std::sync::Arc;

use burn::train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry, SerializedEntry,
};

use crate::StepOutput;

/// A number of a [`StepOutput`] under a name.
#[derive(Clone)]
pub struct StepMetric {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    value_of: fn(&StepOutput) -> f64,
    current: f64,
    sum: f64,
    count: usize,
}

impl StepMetric {
    fn new(name: &str, unit: Option<&'static str>, higher_is_better: bool, value_of: fn(&StepOutput) -> f64) -> Self {
        Self { name: Arc::new(name.into()), unit, higher_is_better, value_of, current: 0.0, sum: 0.0, count: 0 }
    }

    /// Metrics of training and evaluation: loss in nats per token, and its exponential.
    pub fn quality() -> [Self; 2] {
        [
            Self::new("Loss", None, false, StepOutput::loss),
            Self::new("Perplexity", None, false, |output| output.loss().exp()),
        ]
    }

    /// Metrics of training alone.
    pub fn training() -> [Self; 6] {
        [
            Self::new("Learning rate", None, false, |output| output.lr),
            Self::new("Gradient norm", None, false, |output| output.grad_norm),
            Self::new("Tokens/s", None, true, |output| output.tokens_per_second),
            Self::new("MFU", Some("%"), true, |output| 100.0 * output.mfu),
            Self::new("Data wait", Some("%"), false, |output| 100.0 * output.data_wait),
            Self::new("Memory", Some("MB"), false, |output| output.memory / 1e6),
        ]
    }
}

impl Metric for StepMetric {
    type Input = StepOutput;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        let unit = self.unit.map(String::from);
        NumericAttributes { unit, higher_is_better: self.higher_is_better }.into()
    }

    fn update(&mut self, item: &StepOutput, _: &MetricMetadata) -> SerializedEntry {
        self.current = (self.value_of)(item);
        self.sum += self.current;
        self.count += 1;
        let unit = self.unit.map(|unit| format!(" {unit}")).unwrap_or_default();
        let value = match self.current.abs() {
            size if size == 0.0 || (0.01..1e6).contains(&size) => format!("{:.3}", self.current),
            _ => format!("{:.2e}", self.current),
        };
        SerializedEntry::new(format!("{}: {value}{unit}", self.name), self.current.to_string())
    }

    fn clear(&mut self) {
        (self.sum, self.count) = (0.0, 0);
    }
}

impl Numeric for StepMetric {
    fn value(&self) -> NumericEntry {
        NumericEntry::Value(self.current)
    }

    fn running_value(&self) -> NumericEntry {
        NumericEntry::Aggregated { aggregated_value: self.sum / self.count.max(1) as f64, count: self.count }
    }
}
