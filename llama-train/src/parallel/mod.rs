//! Training on several devices (paper, section 2.4): data, tensor and sequence parallelism.
//!
//! The members of a [`Group`] train one model. Of a step's micro-batches each takes the `count`-th, from its rank on, so that the
//! configuration alone says what a step is, whatever the number of members. Every parameter belongs to one member, which has its moments:
//! the optimizer's state is divided, as in ZeRO's first stage ([Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054)).
//!
//! 1. While the backward goes on, the gradients of a parameter go to its owner, which sums them in the order of ranks;
//! 2. sums of squares, losses and counts go to everyone, so that all find the same norm, clip and skip alike;
//! 3. the owner updates its parameters,
//! 4. and sends them to everyone while the next forward goes on, which waits for those of a layer when it comes to it.
//!
//! A parameter is sent as often as in an all-reduce of the gradients. Sums have one order, so that a run on a CPU can be repeated bit for bit;
//! with one micro-batch for each member it has the very bits of a run on a single one.
//!
//! A model that is too large for a device is divided among consecutive members ([`Group::dividing_models`],
//! [`llama_model::shard`]): they are one replica and take the same micro-batches. A part of a matrix is then exchanged as above by those members of the
//! replicas that have it; what is not divided, by all, who have its gradients for their rows each.
//!
//! [`join`] makes the group: in one process by channels, between processes and machines by TCP.

mod background;
mod exchange;
mod flow;
mod join;
mod link;
mod pieces;
mod snapshot;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use join::{Rendezvous, join};
pub use snapshot::Snapshot;

use llama_data::loader::Rank;
use llama_model::shard::{Collective, Shard, Team};

use crate::TrainError;
pub(crate) use exchange::Parallel;
pub(crate) use flow::Flow;
use link::{Frame, Links, out_of_step};
pub(crate) use pieces::{Piece, owned};

/// One member's view of the devices that train together.
pub struct Group {
    rank: Rank,
    /// How many consecutive members divide a model among them.
    parts: usize,
    links: Links,
    /// What goes between the members while they compute.
    background: Links,
    /// Why a model did not get what another member should have sent.
    lost: Mutex<Option<TrainError>>,
}

impl Group {
    fn new(rank: Rank, links: Links, background: Links) -> Self {
        Self { rank, parts: 1, links, background, lost: Mutex::new(None) }
    }

    /// A device that trains alone.
    pub fn alone() -> Self {
        Self::new(Rank::ONLY, Links::new(vec![None]), Links::new(vec![None]))
    }

    /// Lets every `parts` members, by rank, divide a model among them: members whose connections are fast, as those of one machine.
    ///
    /// # Errors
    /// [`TrainError::Config`] if some would be left over.
    pub fn dividing_models(self, parts: usize) -> Result<Self, TrainError> {
        match parts > 0 && self.rank.count.is_multiple_of(parts as u64) {
            true => Ok(Self { parts, ..self }),
            false => {
                let reason = format!("is {parts}, of which {} devices are no multiple", self.rank.count);
                Err(TrainError::config("tensor_parallel", reason))
            }
        }
    }

    /// The part of the model that this member has.
    pub fn shard(&self) -> Shard {
        Shard { index: self.me() % self.parts, count: self.parts }
    }

    /// Which of the whole models it has a part of: those share the micro-batches.
    pub fn replica(&self) -> Rank {
        let parts = self.parts as u64;
        Rank { index: self.rank.index / parts, count: self.rank.count / parts }
    }

    /// Those that have the other parts, as long as this member is in the group.
    pub fn team(self: &Arc<Self>) -> Team {
        Team::new(Arc::new(Part { shard: self.shard(), group: Arc::downgrade(self) }))
    }

    /// The rank of the member of this replica that has a part.
    fn rank_of_part(&self, part: usize) -> usize {
        self.me() / self.parts * self.parts + part
    }

    fn lost(&self) -> MutexGuard<'_, Option<TrainError>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, error: TrainError) {
        self.lost().get_or_insert(error);
    }

    /// Whether models got all that they were to get: asked before what they computed is used.
    pub(crate) fn check(&self) -> Result<(), TrainError> {
        self.lost().take().map_or(Ok(()), Err)
    }

    /// Which member this is, of how many.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Its rank as a place among the members.
    pub(crate) fn me(&self) -> usize {
        self.rank.index as usize
    }

    /// Whether this member writes files and shows the run: the first does.
    pub fn leads(&self) -> bool {
        self.rank.index == 0
    }

    /// All ranks but this member's.
    fn others(&self) -> impl Iterator<Item = usize> {
        self.links.ranks().filter(|rank| *rank != self.me())
    }

    /// What every member gives, by rank. For what is small.
    fn all_gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, TrainError> {
        for rank in self.others() {
            self.links.send(rank, Frame::Bytes(own.clone()))?;
        }
        let mut own = Some(own);
        let part = |rank| match own.take_if(|_| rank == self.me()) {
            Some(own) => Ok(own),
            None => self.links.receive_bytes(rank),
        };
        self.links.ranks().map(part).collect()
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

    /// Waits until all members have come so far.
    ///
    /// # Errors
    /// [`TrainError::Member`] if one of them has not.
    pub fn ready(&self) -> Result<(), TrainError> {
        self.any(true).map(|_| ())
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

/// A group as a model has it. Graphs of gradients may outlive a member that fails; they do not keep it in the group.
struct Part {
    shard: Shard,
    group: Weak<Group>,
}

impl Part {
    /// Unless somebody is missing already, who is not waited for again.
    fn group(&self) -> Option<Arc<Group>> {
        self.group.upgrade().filter(|group| group.lost().is_none())
    }
}

impl Collective for Part {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn send(&self, to: usize, bytes: Vec<u8>) {
        if let Some(group) = self.group() {
            let sent = group.links.send(group.rank_of_part(to), Frame::Bytes(bytes));
            sent.unwrap_or_else(|error| group.lose(error));
        }
    }

    fn receive(&self, from: usize, len: usize) -> Option<Vec<u8>> {
        let group = self.group()?;
        let rank = group.rank_of_part(from);
        let bytes = group.links.receive_bytes(rank);
        let right = bytes.and_then(|bytes| if bytes.len() == len { Ok(bytes) } else { Err(out_of_step(rank)) });
        right.map_err(|error| group.lose(error)).ok()
    }

    fn hear(&self, from: usize) -> Option<Vec<u8>> {
        let group = self.group()?;
        match group.links.to(group.rank_of_part(from)).wait() {
            Ok(Frame::Bytes(bytes)) => Some(bytes),
            _ => None,
        }
    }

    fn missing(&self) -> Option<String> {
        match self.group.upgrade() {
            Some(group) => group.lost().as_ref().map(TrainError::to_string),
            None => Some("this member has left the group".into()),
        }
    }
}
