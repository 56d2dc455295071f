//! The members of a team, and how a model's rows go between them.

use std::fmt::{self, Debug, Formatter};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, TensorData, TensorMetadata};

use super::Shard;
use crate::backend::ops::tensor;
use crate::copy::concat;
use crate::{ModelError, Precision};

/// What joins the members of a team.
pub trait Collective: Send + Sync {
    /// The part of the model that this member has.
    fn shard(&self) -> Shard;

    /// Gives bytes to a member; they may still be under way when this returns. All members send and receive in the same order.
    fn send(&self, to: usize, bytes: Vec<u8>);

    /// The next `len` bytes from a member, in the order it sent them. None if it is gone or sends something else: then what the model computes is
    /// no number.
    fn receive(&self, from: usize, len: usize) -> Option<Vec<u8>>;

    /// What a member says next, however long that takes. None if it is gone.
    fn hear(&self, from: usize) -> Option<Vec<u8>>;

    /// Why something is missing, if it is.
    fn missing(&self) -> Option<String>;
}

/// The members that a divided model is on; a model that is not divided is a team of one.
#[derive(Clone, Default)]
pub struct Team {
    members: Option<Arc<dyn Collective>>,
    /// Of the member that tells the others what to read: one thread at a time reads with them.
    turn: Option<Arc<Mutex<()>>>,
}

impl Debug for Team {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Shard { index, count } = self.shard();
        write!(f, "{index} of {count}")
    }
}

/// Rows on their way between members.
#[must_use]
pub(crate) struct Pending<B: Backend>(State<B>);

enum State<B: Backend> {
    /// There is nobody else.
    Here(FloatTensor<B>),
    Gather {
        sent: Sent<B>,
        dtype: DType,
    },
    Sum(Sent<B>),
}

/// What this member sent to itself, and the shape `[rows, width]` of what comes.
struct Sent<B: Backend> {
    own: Vec<u8>,
    rows: usize,
    width: usize,
    as_dtype: DType,
    device: B::Device,
}

impl Team {
    /// The team whose members `collective` joins.
    pub fn new(collective: Arc<dyn Collective>) -> Self {
        Self { members: (collective.shard().count > 1).then_some(collective), turn: None }
    }

    /// The same for the member that leads, the first.
    pub(crate) fn leading(self) -> Self {
        let leads = self.members.is_some() && self.shard().index == 0;
        Self { turn: leads.then(Arc::default), ..self }
    }

    /// Whether this member tells the others what to read.
    pub(crate) fn leads(&self) -> bool {
        self.turn.is_some()
    }

    /// Waits until no other thread reads with the members that follow.
    pub(crate) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says something to all others.
    pub(crate) fn tell(&self, bytes: &[u8]) {
        if let Some(members) = &self.members {
            self.shard().others().for_each(|to| members.send(to.index, bytes.to_vec()));
        }
    }

    /// What the member that leads says next. None if it is gone.
    pub(crate) fn hear(&self) -> Option<Vec<u8>> {
        self.members.as_ref()?.hear(0)
    }

    /// Whether all that was to come has come.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let missing = self.members.as_ref().and_then(|members| members.missing());
        missing.map_or(Ok(()), |reason| Err(ModelError::Member(reason)))
    }

    /// The part of this member.
    pub fn shard(&self) -> Shard {
        self.members.as_ref().map_or(Shard::WHOLE, |members| members.shard())
    }

    /// Whether the model is not divided.
    pub fn is_alone(&self) -> bool {
        self.members.is_none()
    }

    /// Begins to give the rows of all members to all: `[rows, width]`, rounded to the type that is read of them.
    pub(crate) fn begin_gather<B: Backend>(&self, x: FloatTensor<B>, rows: usize, precision: Precision) -> Pending<B> {
        let dtype = x.dtype();
        Pending(match self.send(x, rows, precision.dtype(), |_, rows| 0..rows) {
            Ok(sent) => State::Gather { sent, dtype },
            Err(x) => State::Here(x),
        })
    }

    /// Begins to give each member the sum, in f32, of what all have for its rows.
    pub(crate) fn begin_scatter_sum<B: Backend>(&self, x: FloatTensor<B>) -> Pending<B> {
        let rows = self.shard().range(x.shape()[0]).len();
        Pending(self.send(x, rows, DType::F32, |to, rows| to.range(rows)).map_or_else(State::Here, State::Sum))
    }

    /// Begins to give all members the sum, in f32, of what all have.
    pub(crate) fn begin_sum<B: Backend>(&self, x: FloatTensor<B>) -> Pending<B> {
        let rows = x.shape()[0];
        Pending(self.send(x, rows, DType::F32, |_, rows| 0..rows).map_or_else(State::Here, State::Sum))
    }

    /// Sends each member its rows of `x`; `rows` will come back. Without others, `x` comes back.
    fn send<B: Backend>(
        &self,
        x: FloatTensor<B>,
        rows: usize,
        as_dtype: DType,
        rows_for: impl Fn(Shard, usize) -> Range<usize>,
    ) -> Result<Sent<B>, FloatTensor<B>> {
        let Some(members) = &self.members else { return Err(x) };
        let ([of_x, width], device) = (x.shape().dims(), B::float_device(&x));
        let data = tensor::<B, 2>(x).into_data().convert_dtype(as_dtype);
        let row = width * as_dtype.size();
        let part = |to| {
            let Range { start, end } = rows_for(to, of_x);
            data.as_bytes()[start * row..end * row].to_vec()
        };
        let shard = self.shard();
        shard.others().for_each(|to| members.send(to.index, part(to)));
        Ok(Sent { own: part(shard), rows, width, as_dtype, device })
    }

    /// What was begun, when it has come.
    pub(crate) fn end<B: Backend>(&self, Pending(state): Pending<B>) -> FloatTensor<B> {
        match state {
            State::Here(x) => x,
            State::Gather { sent: Sent { own, rows, width, as_dtype, device }, dtype } => {
                let row = width * as_dtype.size();
                let parts = self.receive(own, |from| from.range(rows).len() * row);
                let all = concat(as_dtype, parts.iter().map(Vec::as_slice), &[rows, width]);
                B::float_from_data(all.convert_dtype(dtype), &device)
            }
            State::Sum(Sent { own, rows, width, as_dtype, device }) => {
                let parts = self.receive(own, |_| rows * width * as_dtype.size());
                let mut parts = parts.iter().map(|part| bytemuck::pod_collect_to_vec::<u8, f32>(part));
                let mut sum = parts.next().unwrap_or_default();
                // In the order of members, so that all of them make the same additions.
                for part in parts {
                    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
                B::float_from_data(TensorData::new(sum, [rows, width]), &device)
            }
        }
    }

    /// What each member sent, in their order.
    fn receive(&self, own: Vec<u8>, len: impl Fn(Shard) -> usize) -> Vec<Vec<u8>> {
        let (members, mut own) = (self.members.as_ref().expect("only a team sends"), Some(own));
        let part = |from: Shard| match from == self.shard() {
            true => own.take().unwrap_or_default(),
            // Of whoever is gone, bytes that are no number in any type.
            false => members.receive(from.index, len(from)).unwrap_or_else(|| vec![0xff; len(from)]),
        };
        self.shard().all().map(part).collect()
    }

    /// [`begin_scatter_sum`](Self::begin_scatter_sum), awaited.
    pub(crate) fn scatter_sum<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        self.end(self.begin_scatter_sum::<B>(x))
    }

    /// [`begin_sum`](Self::begin_sum), awaited.
    pub(crate) fn sum<B: Backend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        self.end(self.begin_sum::<B>(x))
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::Tensor;

    use super::*;
    use crate::backend::ops::primitive;

    #[test]
    fn what_a_missing_member_does_not_send_is_no_number() {
        struct Nobody;
        impl Collective for Nobody {
            fn shard(&self) -> Shard {
                Shard { index: 1, count: 3 }
            }
            fn send(&self, _: usize, _: Vec<u8>) {}
            fn receive(&self, _: usize, _: usize) -> Option<Vec<u8>> {
                None
            }
            fn hear(&self, _: usize) -> Option<Vec<u8>> {
                None
            }
            fn missing(&self) -> Option<String> {
                Some("nobody is there".into())
            }
        }
        let team = Team::new(Arc::new(Nobody));
        let ones = |rows| primitive(Tensor::<Flex, 2>::ones([rows, 2], &Default::default()));
        let values = |pending: Pending<Flex>| tensor::<Flex, 2>(team.end(pending)).into_data().to_vec::<f32>().unwrap();
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            // Two of seven rows are here.
            let found = values(team.begin_gather(ones(2), 7, precision));
            assert_eq!(found.len(), 14);
            assert!(found[4..8].iter().all(|x| *x == 1.0) && found[..4].iter().chain(&found[8..]).all(|x| x.is_nan()));
        }
        assert!(values(team.begin_scatter_sum(ones(7))).iter().all(|x| x.is_nan()));
        assert!(values(team.begin_sum(ones(7))).iter().all(|x| x.is_nan()));
        assert_eq!(team.check().unwrap_err().to_string(), "nobody is there");
    }
}
