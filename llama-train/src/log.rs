//! The run's numbers as JSON lines, `metrics.jsonl` in the run's folder: one line a training step, one an evaluation.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use llama_model::weights::write_atomic;
use serde::{Deserialize, Serialize};

use crate::{StepOutput, TrainError};

/// Name of the file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "split", rename_all = "snake_case", deny_unknown_fields)]
pub enum Line {
    /// An optimizer step.
    Train {
        /// Steps done, this one included.
        step: u64,
        /// Mean cross entropy per token, in nats.
        loss: f64,
        /// Its exponential.
        perplexity: f64,
        /// Learning rate.
        lr: f64,
        /// Global gradient norm before the clip.
        grad_norm: f64,
        /// Tokens of all steps so far.
        tokens: u64,
        /// Tokens per second.
        tokens_per_second: f64,
        /// Model FLOPs utilisation, as a share.
        mfu: f64,
        /// Share of the step spent waiting for data.
        data_wait: f64,
        /// Resident memory of the process in bytes.
        memory: f64,
    },
    /// A step that was skipped because its loss or gradient was not finite.
    Skipped {
        /// Steps done, this one included.
        step: u64,
        /// The loss as text, since JSON has no NaN.
        loss: String,
        /// The gradient norm as text.
        grad_norm: String,
    },
    /// An evaluation.
    Valid {
        /// Steps done.
        step: u64,
        /// Mean cross entropy per token, in nats.
        loss: f64,
        /// Its exponential.
        perplexity: f64,
        /// Tokens evaluated on.
        tokens: u64,
    },
}

impl Line {
    /// The line of a training step.
    pub fn train(step: u64, tokens: u64, output: &StepOutput) -> Self {
        let loss = output.loss();
        Self::Train {
            step,
            loss,
            perplexity: loss.exp(),
            lr: output.lr,
            grad_norm: output.grad_norm,
            tokens,
            tokens_per_second: output.tokens_per_second,
            mfu: output.mfu,
            data_wait: output.data_wait,
            memory: output.memory,
        }
    }

    /// The line of an evaluation.
    pub fn valid(step: u64, output: &StepOutput) -> Self {
        Self::Valid { step, loss: output.loss(), perplexity: output.loss().exp(), tokens: output.tokens }
    }

    /// Steps done when the line was written.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train { step, .. } | Self::Skipped { step, .. } | Self::Valid { step, .. } => *step,
        }
    }
}

/// Appends to a run's file.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file of a run that has done `step` steps. Lines of later steps, left by a run that was killed after its
    /// last checkpoint, are removed: those steps will be made again.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        let path = folder.join(METRICS_FILE);
        let kept: String = match read(&path) {
            Ok(lines) => lines.iter().filter(|line| line.step() <= step && step > 0).map(to_json).collect(),
            Err(TrainError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        write_atomic(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| TrainError::io(&path, error))?;
        Ok(Self { path, file })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        self.file.write_all(to_json(line).as_bytes()).map_err(|error| TrainError::io(&self.path, error))
    }
}

fn to_json(line: &Line) -> String {
    serde_json::to_string(line).expect("every field has a JSON form") + "\n"
}

/// Reads a run's file. A last line that was cut off by a kill is left out.
///
/// # Errors
/// [`TrainError::Io`], or [`TrainError::Format`] for a broken line before the last.
pub fn read(path: &Path) -> Result<Vec<Line>, TrainError> {
    let file = File::open(path).map_err(|error| TrainError::io(path, error))?;
    let mut lines = Vec::new();
    let mut broken: Option<TrainError> = None;
    for (number, text) in BufReader::new(file).lines().enumerate() {
        if let Some(error) = broken {
            return Err(error);
        }
        let text = text.map_err(|error| TrainError::io(path, error))?;
        match serde_json::from_str(&text) {
            Ok(line) => lines.push(line),
            Err(error) => broken = Some(TrainError::format(path, format!("line {}: {error}", number + 1))),
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_later_lines_and_a_cut_one() {
        let folder = tempfile::tempdir().unwrap();
        let output = StepOutput { loss_sum: 2.0, tokens: 1, ..Default::default() };
        let mut file = MetricsFile::open(folder.path(), 0).unwrap();
        for step in 1..=5 {
            file.write(&Line::train(step, step, &output)).unwrap();
        }
        file.write(&Line::valid(5, &output)).unwrap();
        file.file.write_all(b"{\"split\":\"train\",\"st").unwrap();
        drop(file);
        let mut file = MetricsFile::open(folder.path(), 3).unwrap();
        file.write(&Line::train(4, 4, &output)).unwrap();
        let steps: Vec<u64> = read(&folder.path().join(METRICS_FILE)).unwrap().iter().map(Line::step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }
}
