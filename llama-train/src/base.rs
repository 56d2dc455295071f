//! Models that runs begin with.

use llama_data::Progress;
use llama_model::formats::Checkpoint;
use llama_model::shard::{Split, Team};
use llama_model::{Llama, LlamaBackend, ModelError, WeightFormat};

/// The model of a checkpoint, or a part of it, with its progress in parameters; without a format, as it is stored.
///
/// # Errors
/// As [`Checkpoint::load_in`].
pub fn load_model<B: LlamaBackend>(
    checkpoint: &Checkpoint,
    team: &Team,
    weights: impl Into<Option<WeightFormat>>,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<Llama<B>, ModelError> {
    let task = format!("loading {}", checkpoint.path().display());
    let of_part = |(path, dims): (String, Vec<usize>)| Split::of(&path).part_len(&dims, team.shard().count) as u64;
    progress.start(&task, Some(checkpoint.config().parameters().into_iter().map(of_part).sum()));
    let model = checkpoint.load_in::<B>(team, weights, device, |read| progress.advance(read));
    progress.finish();
    model
}
