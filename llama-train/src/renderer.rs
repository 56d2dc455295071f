//! A run as lines of text, for logs and terminals without a dashboard.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Mutex;

use burn::train::LearnerSummary;
use burn::train::metric::{MetricDefinition, MetricId};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};

/// Writes a line every few steps and after every evaluation.
pub struct LineRenderer {
    out: Mutex<Box<dyn Write + Send>>,
    every: usize,
    names: HashMap<MetricId, String>,
    train: HashMap<String, f64>,
    valid: HashMap<String, f64>,
}

impl LineRenderer {
    /// A renderer that writes every `every`-th step to `out`.
    pub fn new(out: Box<dyn Write + Send>, every: usize) -> Self {
        Self {
            out: Mutex::new(out),
            every: every.max(1),
            names: HashMap::new(),
            train: HashMap::new(),
            valid: HashMap::new(),
        }
    }

    fn line(&mut self, text: &str) {
        // A closed pipe must not end the training.
        if let Ok(mut out) = self.out.lock() {
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        }
    }
}

fn update(names: &HashMap<MetricId, String>, values: &mut HashMap<String, f64>, state: MetricState) {
    if let MetricState::Numeric(entry, value) = state
        && let Some(name) = names.get(&entry.metric_id)
    {
        values.insert(name.clone(), value.current());
    }
}

impl MetricsRendererTraining for LineRenderer {
    fn update_train(&mut self, state: MetricState) {
        update(&self.names, &mut self.train, state);
    }

    fn update_valid(&mut self, state: MetricState) {
        update(&self.names, &mut self.valid, state);
    }

    fn render_train(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        let (step, steps) = (item.global_progress.items_processed, item.global_progress.items_total);
        if step != 1 && step != steps && !step.is_multiple_of(self.every) {
            return;
        }
        let value = |name: &str| self.train.get(name).copied().unwrap_or(f64::NAN);
        let text = format!(
            "step {step:>6}/{steps} | loss {:.4} | ppl {:>8.2} | lr {:.2e} | grad {:.3} | {:>7.0} tok/s | MFU {:>4.1}% | wait {:.1}% | {:.0} MB",
            value("Loss"),
            value("Perplexity"),
            value("Learning rate"),
            value("Gradient norm"),
            value("Tokens/s"),
            value("MFU"),
            value("Data wait"),
            value("Memory"),
        );
        self.line(&text);
    }

    fn render_valid(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        let value = |name: &str| self.valid.get(name).copied().unwrap_or(f64::NAN);
        let step = item.global_progress.items_processed;
        let text = format!("step {step:>6} validation: loss {:.4} | ppl {:.2}", value("Loss"), value("Perplexity"));
        self.line(&text);
    }

    fn on_train_end(&mut self, _: Option<LearnerSummary>) -> Result<(), Box<dyn core::error::Error>> {
        Ok(())
    }
}

impl MetricsRendererEvaluation for LineRenderer {
    fn update_test(&mut self, _: EvaluationName, state: MetricState) {
        update(&self.names, &mut self.valid, state);
    }

    fn render_test(&mut self, item: EvaluationProgress, progress: Vec<ProgressType>) {
        self.render_valid((&item).into(), progress);
    }
}

impl MetricsRenderer for LineRenderer {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name);
    }
}
