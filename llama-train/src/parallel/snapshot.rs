//! What the members of a group bring together for a checkpoint. Tensors are written one by one, so that no host has all of them at a
//! time: all members go through them in the order of their names, the first writes, the others send what it lacks.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use llama_model::shard::Split;
use llama_model::weights::{self, Streamed};
use llama_model::{LlamaConfig, TrainBackend, hf};

use super::background::vec_of;
use super::exchange::Parallel;
use super::link::Frame;
use super::pieces::Piece;
use crate::optimizer::Moment;
use crate::{AdamW, Pretrainer, TrainError};

/// A model in training and its optimizer, between two steps, of which each member of a group has a part.
pub struct Snapshot<'a, B: TrainBackend> {
    /// The part of the model that is here.
    pub model: &'a Pretrainer<B>,
    pub(crate) optimizer: &'a AdamW<B>,
    pub(crate) parallel: &'a Parallel,
}

impl<B: TrainBackend> Snapshot<'_, B> {
    /// Updates that the optimizer has made.
    pub fn updates(&self) -> u64 {
        self.optimizer.step_count()
    }

    /// Writes the moments of the whole model, `<path>.m` and `<path>.v`, flat. For the member that leads, before
    /// [`save_model`](Self::save_model).
    ///
    /// # Errors
    /// Those of the file and of other members.
    pub fn save_moments(&self, path: &Path) -> Result<(), TrainError> {
        let moments = self.moments().into_iter().map(|(name, (moment, pieces))| Streamed {
            name,
            dims: vec![pieces.iter().map(|piece| piece.len()).sum()],
            dtype: DType::F32,
            read: Box::new(move || self.moment(moment, &pieces)),
        });
        weights::save_streamed(path, moments.collect())
    }

    /// Writes the whole model as a Hugging Face folder. For the member that leads.
    ///
    /// # Errors
    /// Those of the files and of other members.
    pub fn save_model(&self, config: &LlamaConfig, folder: &Path) -> Result<(), TrainError> {
        let group = &self.parallel.group;
        hf::save_whole(&self.model.llama, config, folder, |path, part| {
            let split = Split::of(path);
            if split == Split::Whole {
                return Ok(part);
            }
            let (dims, len) = (part.shape.clone(), part.num_elements());
            let others = (1..group.shard().count).map(|rank| {
                let part = group.links.receive_floats(rank, len)?;
                Ok(TensorData::new(part, dims.clone()))
            });
            let parts = std::iter::once(Ok(part)).chain(others).collect::<Result<_, TrainError>>()?;
            Ok(split.join(parts))
        })
    }

    /// Sends the member that leads what its files lack.
    pub(crate) fn send(&self) -> Result<(), TrainError> {
        let (group, me) = (&self.parallel.group, self.parallel.group.me());
        let send = |data| group.links.send(0, Frame::Floats(vec_of(data)));
        for (moment, pieces) in self.moments().into_values() {
            for piece in pieces.into_iter().filter(|piece| piece.owner == me) {
                send(self.own_moment(moment, piece))?;
            }
        }
        // Of the first replica, since all have the same.
        if me >= group.shard().count {
            return Ok(());
        }
        let mut parts = BTreeMap::new();
        weights::visit_params(&self.model.llama, |path, value| {
            if Split::of(path) != Split::Whole {
                parts.insert(weights::file_name(path).unwrap_or_else(|| path.into()), value);
            }
        });
        parts.into_values().try_for_each(|part| send(part.to_data()))
    }

    /// The pieces of each moment by its name in the file.
    fn moments(&self) -> BTreeMap<String, (Moment, Vec<&Piece>)> {
        let mut moments = BTreeMap::new();
        let pieces = if self.updates() > 0 { &self.parallel.pieces[..] } else { &[] };
        for (piece, moment) in pieces.iter().flat_map(|piece| [(piece, Moment::First), (piece, Moment::Second)]) {
            moments.entry(moment.name(&piece.path)).or_insert((moment, Vec::new())).1.push(piece);
        }
        moments
    }

    /// Of a piece that this member updates.
    fn own_moment(&self, moment: Moment, piece: &Piece) -> TensorData {
        let data = self.optimizer.moment(moment, &piece.path);
        // What had no gradient yet has none.
        data.unwrap_or_else(|| TensorData::zeros::<f32, _>([piece.len()]))
    }

    /// The whole of a moment, flat.
    fn moment(&self, moment: Moment, pieces: &[&Piece]) -> Result<TensorData, TrainError> {
        let part = |piece: &&Piece| {
            let floats = match piece.owner == self.parallel.group.me() {
                true => vec_of(self.own_moment(moment, piece)),
                false => self.parallel.group.links.receive_floats(piece.owner, piece.len())?,
            };
            Ok::<_, TrainError>(TensorData::new(floats, piece.dims.clone()))
        };
        let parts = pieces.iter().map(part).collect::<Result<Vec<_>, _>>()?;
        let mut whole = Split::of(&pieces[0].path).join(parts);
        whole.shape = [whole.num_elements()].into();
        Ok(whole)
    }
}
