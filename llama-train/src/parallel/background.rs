//! What a member exchanges while it computes: a thread that takes pieces to and from their owners, in an order that all members have alike.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData, read_sync};

use super::link::Frame;
use super::pieces::Piece;
use super::{Group, Parallel};
use crate::TrainError;

/// What is next.
pub(super) struct Job {
    /// Place of the piece in the model's order.
    pub piece: usize,
    pub task: Task,
}

pub(super) enum Task {
    /// Takes this member's gradient of a piece to its owner, who gets the sum over all members.
    Sum(Read),
    /// Takes an owner's value of a piece to everyone else.
    Give(Read),
    /// Gets it.
    Get,
}

/// A tensor on its way from the device: read when the device has come so far, without anyone waiting before.
pub(super) enum Read {
    Here(TensorData),
    Coming(Pin<Box<dyn Future<Output = TensorData> + Send>>),
}

impl Read {
    /// Begins to read a tensor.
    pub fn begin<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Self {
        let read = async { tensor.into_data_async().await.expect("the device has run what it was given") };
        let mut read: Pin<Box<dyn Future<Output = TensorData> + Send>> = Box::pin(read);
        // Asked once, the device has it among what it is to do next.
        match read.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(data) => Self::Here(data),
            Poll::Pending => Self::Coming(read),
        }
    }

    fn end(self) -> Vec<f32> {
        vec_of(match self {
            Self::Here(data) => data,
            Self::Coming(read) => read_sync(read),
        })
    }
}

pub(super) fn vec_of(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().into_vec().expect("converted to f32")
}

/// A piece that has come: the sum of its gradients to its owner, its value to others.
type Came = (usize, Vec<f32>);

/// The thread.
pub(super) struct Background {
    me: usize,
    /// There until dropped.
    jobs: Option<Sender<Job>>,
    /// Only one thread receives at a time.
    came: Mutex<Receiver<Result<Came, TrainError>>>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// # Errors
    /// If the system gives no thread.
    pub fn new(parallel: Arc<Parallel>) -> io::Result<Self> {
        let me = parallel.group.me();
        let (jobs, to_do) = channel::<Job>();
        let (done, came) = channel();
        let work = move || {
            for job in to_do {
                let result = run(&parallel.group, &parallel.pieces[job.piece], job).transpose();
                let failed = matches!(result, Some(Err(_)));
                if result.is_some_and(|result| done.send(result).is_err()) || failed {
                    break;
                }
            }
        };
        let thread = thread::Builder::new().name("group-exchange".into()).spawn(work)?;
        Ok(Self { me, jobs: Some(jobs), came: Mutex::new(came), thread: Some(thread) })
    }

    /// Does what is asked for after everything before it.
    pub fn push(&self, job: Job) {
        // If it has ended, `came` says why.
        let _ = self.jobs.as_ref().expect("there until dropped").send(job);
    }

    /// What has come next.
    pub fn came(&self) -> Result<Came, TrainError> {
        let came = self.came.lock().unwrap_or_else(PoisonError::into_inner).recv();
        came.unwrap_or_else(|_| {
            Err(TrainError::Member { rank: self.me, reason: "what it exchanges has failed before".into() })
        })
    }
}

impl Drop for Background {
    /// Waits until the others have what is theirs.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(group: &Group, piece: &Piece, Job { piece: place, task }: Job) -> Result<Option<Came>, TrainError> {
    let (links, me) = (&group.background, group.me());
    let mut others = group.others().filter(|rank| piece.is_of(*rank, group.parts));
    match task {
        Task::Sum(own) if piece.owner != me => links.send(piece.owner, Frame::Floats(own.end())).map(|()| None),
        Task::Sum(own) => {
            let mut own = Some(own);
            let mut sum: Option<Vec<f32>> = None;
            // In the order of ranks, as one member alone would add them.
            for rank in links.ranks().filter(|rank| piece.is_of(*rank, group.parts)) {
                let part = match own.take_if(|_| rank == me) {
                    Some(own) => own.end(),
                    None => links.receive_floats(rank, piece.len())?,
                };
                match &mut sum {
                    Some(sum) => sum.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part),
                    None => sum = Some(part),
                }
            }
            Ok(sum.map(|sum| (place, sum)))
        }
        Task::Give(own) => {
            let own = own.end();
            others.try_for_each(|rank| links.send(rank, Frame::Floats(own.clone())))?;
            Ok(None)
        }
        Task::Get => links.receive_floats(piece.owner, piece.len()).map(|value| Some((place, value))),
    }
}
