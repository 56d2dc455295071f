//! Checkpoints: folders `checkpoints/step-00001000` in a run's folder.
//!
//! | file | what |
//! | --- | --- |
//! | `config.json`, `model.safetensors` | the model as a Hugging Face folder |
//! | `tokenizer.json`, .. | the tokenizer, so that the folder is enough to generate text, for `transformers`, too |
//! | `optimizer.safetensors` | both moments of every parameter, by path |
//! | `state.json` | step, optimizer updates, tokens, and the run's whole configuration |
//!
//! That is the whole state: first weights and data order come from the configuration, the data position and the
//! learning rate from the step. A checkpoint is written beside its place, flushed and renamed into it, and older ones
//! are removed only after that; a full disk or a kill leaves those before it whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_data::tokenizer::Codec;
use llama_model::shard::Split;
use llama_model::weights::{self, TensorFile};
use llama_model::{Llama, LlamaConfig, ModelError, TrainBackend, hf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::optimizer::Moment;
use crate::parallel::{self, Piece, Snapshot};
use crate::strategy::Place;
use crate::{AdamW, Group, LossScale, OptimizerConfig, PretrainConfig, Pretrainer, RunConfig, TrainError};

const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STATE_FILE: &str = "state.json";
const FOLDER: &str = "checkpoints";
/// How the name of a checkpoint begins that is not whole yet.
const TEMPORARY: &str = ".tmp-step-";

/// Where a run is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState<C = PretrainConfig> {
    /// Version of this file, 1.
    pub version: u32,
    /// Optimizer steps done, skipped ones included. The data position is `step · sequences per step`.
    pub step: u64,
    /// Updates the optimizer made: steps without the skipped ones.
    pub updates: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Factor of the loss, in half precision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Backend that computed, for the record.
    pub backend: String,
    /// The run's configuration.
    pub config: C,
}

impl<C> RunState<C> {
    /// The state of a run at a place.
    pub fn new<B: TrainBackend>(place: Place, updates: u64, config: C) -> Self {
        let Place { step, tokens, loss_scale } = place;
        let backend = B::name(&Default::default());
        Self { version: 1, step, updates, tokens, loss_scale, backend, config }
    }

    /// Where the run is.
    pub fn place(&self) -> Place {
        Place { step: self.step, tokens: self.tokens, loss_scale: self.loss_scale }
    }
}

/// A run read back.
pub struct Restored<B: TrainBackend> {
    /// The model.
    pub model: Pretrainer<B>,
    /// The optimizer.
    pub optimizer: AdamW<B>,
    /// Where the run was.
    pub state: RunState,
}

/// All whole checkpoints of a run, oldest first.
///
/// # Errors
/// [`TrainError::Io`] if the folder exists and cannot be read.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    let folder = run.join(FOLDER);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TrainError::io(&folder, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| TrainError::io(&folder, error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Where the checkpoint of a step is.
pub(crate) fn place(run: &Path, step: u64) -> PathBuf {
    run.join(FOLDER).join(format!("step-{step:08}"))
}

/// The newest checkpoint of a run.
///
/// # Errors
/// [`TrainError::NoCheckpoint`] if there is none.
pub fn latest(run: &Path) -> Result<PathBuf, TrainError> {
    list(run)?.pop().map(|(_, path)| path).ok_or_else(|| TrainError::NoCheckpoint { path: run.into() })
}

/// Writes the checkpoint of `state` and removes all but the newest `keep`. Returns its folder.
///
/// # Errors
/// [`TrainError::Io`], for example on a full disk; checkpoints that were there stay.
pub fn save<B: TrainBackend>(snapshot: &Snapshot<B>, state: &RunState, codec: &Codec) -> Result<PathBuf, TrainError> {
    save_model(&state.config.run, &state.config.model, snapshot, state, codec)
}

/// As [`save`], for any kind of run that trains a whole model.
pub(crate) fn save_model<B: TrainBackend, C: Serialize>(
    run: &RunConfig,
    model: &LlamaConfig,
    snapshot: &Snapshot<B>,
    state: &RunState<C>,
    codec: &Codec,
) -> Result<PathBuf, TrainError> {
    save_with(run, snapshot, state, |folder| {
        snapshot.save_model(model, folder)?;
        Ok(codec.save(folder)?)
    })
}

/// As [`save`], for the files of a model that `write_model` puts into a folder.
pub(crate) fn save_with<B: TrainBackend, C: Serialize>(
    run: &RunConfig,
    snapshot: &Snapshot<B>,
    state: &RunState<C>,
    write_model: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<PathBuf, TrainError> {
    let folder = run.folder.join(FOLDER);
    std::fs::create_dir_all(&folder).map_err(|error| TrainError::io(&folder, error))?;
    let place = place(&run.folder, state.step);
    remove_half_written(&folder)?;
    // Removed again when dropped, so that a failed write leaves no debris.
    let mut builder = tempfile::Builder::new();
    // Readable as any folder is; a temporary one would be its owner's alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let temporary = builder.prefix(TEMPORARY).tempdir_in(&folder).map_err(|error| TrainError::io(&folder, error))?;
    let at = |name: &str| temporary.path().join(name);
    snapshot.save_moments(&at(OPTIMIZER_FILE))?;
    write_model(temporary.path())?;
    let json = serde_json::to_string_pretty(state).expect("every field has a JSON form") + "\n";
    weights::write_atomic(&at(STATE_FILE), json.as_bytes())?;
    sync_folder(temporary.path())?;

    // The same step twice is a run that was resumed and interrupted before its next one: the same content.
    if place.exists() {
        std::fs::remove_dir_all(&place).map_err(|error| TrainError::io(&place, error))?;
    }
    std::fs::rename(temporary.path(), &place).map_err(|error| TrainError::io(&place, error))?;
    let _ = temporary.keep();
    sync_folder(&folder)?;

    let mut old = list(&run.folder)?;
    old.truncate(old.len().saturating_sub(run.keep_checkpoints));
    for (_, path) in old {
        std::fs::remove_dir_all(&path).map_err(|error| TrainError::io(&path, error))?;
    }
    Ok(place)
}

/// Removes what a process left that was killed while it wrote a checkpoint.
fn remove_half_written(folder: &Path) -> Result<(), TrainError> {
    for entry in std::fs::read_dir(folder).map_err(|error| TrainError::io(folder, error))? {
        let path = entry.map_err(|error| TrainError::io(folder, error))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY)) {
            std::fs::remove_dir_all(&path).map_err(|error| TrainError::io(&path, error))?;
        }
    }
    Ok(())
}

/// A rename is on the disk when its folder is.
fn sync_folder(folder: &Path) -> Result<(), TrainError> {
    // Only Unix can open a folder as a file.
    if cfg!(unix) {
        File::open(folder).and_then(|file| file.sync_all()).map_err(|error| TrainError::io(folder, error))?;
    }
    Ok(())
}

/// Reads where the run of a checkpoint is, with its configuration.
///
/// # Errors
/// [`TrainError::Io`], or [`TrainError::Format`] for a damaged file, another version or another kind of run.
pub fn load_state(folder: &Path) -> Result<RunState, TrainError> {
    let state: RunState = load_state_of(folder)?;
    state.config.validate()?;
    Ok(state)
}

/// As [`load_state`], for any kind of run. The configuration is not validated.
pub(crate) fn load_state_of<C: DeserializeOwned>(folder: &Path) -> Result<RunState<C>, TrainError> {
    let path = folder.join(STATE_FILE);
    let text = std::fs::read_to_string(&path).map_err(|error| TrainError::io(&path, error))?;
    let state: RunState<C> = serde_json::from_str(&text).map_err(|error| TrainError::format(&path, error))?;
    if state.version != 1 {
        return Err(TrainError::format(&path, format!("version {}; this program reads version 1", state.version)));
    }
    Ok(state)
}

/// Reads a whole checkpoint.
///
/// # Errors
/// As [`load_state`], and those of reading weights: a file that is truncated, or not of this model.
pub fn load<B: TrainBackend>(folder: &Path, device: &B::Device) -> Result<Restored<B>, TrainError> {
    load_for(folder, &Arc::new(Group::alone()), device)
}

/// As [`load`], what a member of a group has of it.
pub(crate) fn load_for<B: TrainBackend>(
    folder: &Path,
    group: &Arc<Group>,
    device: &B::Device,
) -> Result<Restored<B>, TrainError> {
    let state = load_state(folder)?;
    let llama = state.config.model.init_in::<B>(&group.team(), state.config.seed, device)?;
    let llama = weights::load_part(llama, group.shard(), &folder.join(hf::WEIGHTS_FILE))?;
    let optimizer = load_optimizer(folder, state.config.optimizer.clone(), state.updates, &llama, group, device)?;
    let model = Pretrainer::new(llama, state.config.compute, state.config.optimizer.z_loss);
    Ok(Restored { model, optimizer, state })
}

/// Reads the moments that a member has of a model's parameters.
pub(crate) fn load_optimizer<B: TrainBackend>(
    folder: &Path,
    config: OptimizerConfig,
    updates: u64,
    model: &Llama<B>,
    group: &Group,
    device: &B::Device,
) -> Result<AdamW<B>, TrainError> {
    let path = folder.join(OPTIMIZER_FILE);
    let file = TensorFile::open(&path)?;
    let pieces = if updates == 0 { Vec::new() } else { parallel::owned(model, group) };
    let read = |moment: Moment, piece: &Piece| {
        let (split, shard) = (Split::of(&piece.path), piece.shard(group.shard().count));
        let dims = split.whole_dims(&piece.dims, shard.count);
        let mut data = file.tensor(&moment.name(&piece.path), &[dims.iter().product()])?;
        data.shape = dims.into();
        let mut part = split.cut(data, shard);
        part.shape = [piece.len()].into();
        Ok(part)
    };
    let both = |piece: Piece| {
        let moments = [read(Moment::First, &piece)?, read(Moment::Second, &piece)?];
        Ok((piece.path, moments))
    };
    let optimizer = AdamW::from_moments(config, updates, pieces.into_iter().map(both), device);
    optimizer.map_err(|error| match error {
        ModelError::MissingTensor { path, name } => {
            TrainError::format(&path, format!("the moment `{name}` is missing"))
        }
        error => error.into(),
    })
}
