//! Data-parallel training: devices of one machine or of several share the micro-batches of a step.
//!
//! Every member of a [`Group`] has the whole model. Of a step's micro-batches it takes each `count`-th, from its rank on, so that the
//! configuration alone says what a step is, whatever the number of members. Every parameter belongs to one member, which has its moments:
//! the optimizer's state is divided, as in ZeRO's first stage ([Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054)).
//! After the backward,
//!
//! 1. the gradients of a parameter go to its owner, which sums them in the order of ranks;
//! 2. sums of squares, losses and counts go to everyone, so that all find the same norm, clip and skip alike;
//! 3. the owner updates its parameters,
//! 4. and sends them to everyone.
//!
//! A parameter is sent as often as in an all-reduce of the gradients. Sums have one order, so that a run on a CPU can be repeated bit for bit;
//! with one micro-batch for each member it has the very bits of a run on a single one.
//!
//! [`join`] makes the group: in one process by channels, between processes and machines by TCP.

mod exchange;
mod join;
mod link;

pub use join::{Rendezvous, join};

use llama_data::loader::Rank;

use crate::TrainError;
pub(crate) use exchange::{Parallel, owned};
use link::{Frame, Link};

/// One member's view of the devices that train together.
pub struct Group {
    rank: Rank,
    /// By rank; none to itself.
    links: Vec<Option<Link>>,
}

impl Group {
    /// A device that trains alone.
    pub fn alone() -> Self {
        Self { rank: Rank::ONLY, links: vec![None] }
    }

    /// Which member this is, of how many.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Whether this member writes files and shows the run: the first does.
    pub fn leads(&self) -> bool {
        self.rank.index == 0
    }

    /// The other members, by rank.
    fn others(&self) -> impl Iterator<Item = (usize, &Link)> {
        self.links.iter().enumerate().filter_map(|(rank, link)| Some((rank, link.as_ref()?)))
    }

    fn link(&self, rank: usize) -> &Link {
        self.links[rank].as_ref().expect("a member sends nothing to itself")
    }

    fn send(&self, rank: usize, frame: Frame) -> Result<(), TrainError> {
        self.link(rank).send(frame).map_err(|reason| TrainError::Member { rank, reason })
    }

    fn receive(&self, rank: usize) -> Result<Frame, TrainError> {
        self.link(rank).receive().map_err(|reason| TrainError::Member { rank, reason })
    }

    fn receive_bytes(&self, rank: usize) -> Result<Vec<u8>, TrainError> {
        match self.receive(rank)? {
            Frame::Bytes(bytes) => Ok(bytes),
            Frame::Floats(_) => Err(out_of_step(rank)),
        }
    }

    /// `len` numbers from a member.
    fn receive_floats(&self, rank: usize, len: usize) -> Result<Vec<f32>, TrainError> {
        match self.receive(rank)? {
            Frame::Floats(floats) if floats.len() == len => Ok(floats),
            _ => Err(out_of_step(rank)),
        }
    }

    /// What every member gives, by rank. For what is small.
    fn all_gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, TrainError> {
        for (rank, _) in self.others() {
            self.send(rank, Frame::Bytes(own.clone()))?;
        }
        let mut own = Some(own);
        (0..self.links.len())
            .map(|rank| match &self.links[rank] {
                Some(_) => self.receive_bytes(rank),
                None => Ok(own.take().unwrap_or_default()),
            })
            .collect()
    }

    /// Numbers of every member, by rank.
    fn all_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, TrainError> {
        let all = self.all_gather(bytemuck::cast_slice(own).to_vec())?.into_iter().enumerate();
        all.map(|(rank, bytes)| match bytes.len().is_multiple_of(size_of::<f64>()) {
            true => Ok(bytemuck::pod_collect_to_vec(&bytes)),
            false => Err(out_of_step(rank)),
        })
        .collect()
    }

    /// Whether any member says yes.
    pub(crate) fn any(&self, yes: bool) -> Result<bool, TrainError> {
        Ok(self.all_gather(vec![yes.into()])?.contains(&vec![1]))
    }

    /// Whether all have the same: names the first part in which a member differs from the first.
    pub(crate) fn agree(&self, parts: &[(&str, String)]) -> Result<(), TrainError> {
        let own: Vec<&String> = parts.iter().map(|(_, value)| value).collect();
        let own = serde_json::to_vec(&own).expect("texts have a JSON form");
        let all = self.all_gather(own)?;
        for (rank, theirs) in all.iter().enumerate() {
            let read = |bytes: &[u8]| serde_json::from_slice::<Vec<String>>(bytes).map_err(|_| out_of_step(rank));
            let (first, theirs) = (read(&all[0])?, read(theirs)?);
            if let Some(((field, _), _)) = parts.iter().zip(first.iter().zip(&theirs)).find(|(_, (a, b))| a != b) {
                return Err(TrainError::config(
                    field,
                    format!("of member {rank} is another than the first member's; all must have the same"),
                ));
            }
        }
        Ok(())
    }
}

fn out_of_step(rank: usize) -> TrainError {
    TrainError::Member { rank, reason: "it sent something else than was its turn; is it another version?".into() }
}
