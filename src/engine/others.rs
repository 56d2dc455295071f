//! The devices that have the other parts of an engine's model.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use llama_model::formats::Checkpoint;
use llama_model::{BackendTask, Device, TrainBackend};
use llama_train::Group;

use super::{EngineOptions, Open};
use crate::Error;
use crate::runs::{Member, is_absence};

/// The other devices of this process, among which a model is divided, and their group.
pub(super) struct Others {
    group: Option<Arc<Group>>,
    threads: Vec<JoinHandle<Result<(), Error>>>,
}

impl Others {
    /// Makes the group of all devices, lets all of this process but the first follow, and returns that one.
    pub fn join(path: &Path, options: &EngineOptions) -> Result<(Device, Arc<Group>, Self), Error> {
        let ((device, group), members) = options.devices.join(|group| group.rank().count as usize)?;
        let follow = |(device, group): Member| {
            let task = Follow { path: path.into(), options: options.clone(), group: Arc::new(group) };
            thread::spawn(move || device.run(task).map_err(Error::from).flatten())
        };
        let threads = members.into_iter().map(follow).collect();
        let group = Arc::new(group);
        Ok((device, group.clone(), Self { group: Some(group), threads }))
    }

    /// Leaves the group and waits for the others. The first error of one that was not for want of somebody.
    pub fn leave(mut self) -> Option<Error> {
        self.group = None;
        let ended = self.threads.drain(..).map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        ended.collect::<Vec<_>>().into_iter().filter_map(Result::err).find(|error| !is_absence(error))
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        self.group = None;
        for thread in self.threads.drain(..) {
            // What it panicked of was printed; the model that missed it has had its error.
            let _ = thread.join();
        }
    }
}

pub(super) struct Follow {
    pub path: PathBuf,
    pub options: EngineOptions,
    pub group: Arc<Group>,
}

impl BackendTask for Follow {
    type Output = Result<(), Error>;

    fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output {
        let Self { path, options, group } = self;
        let open = Open {
            checkpoint: Checkpoint::open(&path)?,
            team: group.team(),
            options: &options,
            progress: &llama_data::NoProgress,
        };
        let model = open.model::<B::InnerBackend>(&device)?;
        group.ready()?;
        Ok(model.follow()?)
    }
}
