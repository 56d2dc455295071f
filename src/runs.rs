//! Whole runs on devices that are chosen at run time.

use std::fmt::{self, Display, Formatter};
use std::panic::resume_unwind;
use std::str::FromStr;
use std::thread;

use llama_data::tokenizer::Codec;
use llama_model::{BackendTask, Device, ModelError, TrainBackend};
use llama_train::parallel::{self, Rendezvous};
use llama_train::{FinetuneConfig, FinetuneData, Group, PretrainConfig, RunOptions, RunReport, TrainError};

use crate::{Error, text};

/// The devices of a run. Several share the micro-batches of each step, or divide the model; see [`parallel`].
///
/// ```
/// let both: llama::Devices = "flex,flex".parse()?;
/// assert_eq!(both.devices.len(), 2);
/// # Ok::<(), llama::model::ModelError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Devices {
    /// Those of this process.
    pub devices: Vec<Device>,
    /// Where it meets the other processes of the run, if there are any.
    pub rendezvous: Option<Rendezvous>,
    /// How many consecutive devices divide a model among them in a run; 1 if each has the whole of it.
    pub tensor_parallel: usize,
}

impl From<Device> for Devices {
    fn from(device: Device) -> Self {
        Self { devices: vec![device], rendezvous: None, tensor_parallel: 1 }
    }
}

impl FromStr for Devices {
    type Err = ModelError;

    /// Devices by name, with commas between them.
    fn from_str(names: &str) -> Result<Self, ModelError> {
        let devices = names.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?;
        Ok(Self { devices, rendezvous: None, tensor_parallel: 1 })
    }
}

impl Display for Devices {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.devices.iter().map(Device::to_string).collect::<Vec<_>>().join(", "))?;
        if let Some(Rendezvous { node, nodes, address, .. }) = &self.rendezvous {
            write!(f, " in process {node} of {nodes}, which meet at {address}")?;
        }
        match self.tensor_parallel {
            1 => Ok(()),
            count => write!(f, "; {count} devices divide a model"),
        }
    }
}

/// A device and its place in a group.
pub(crate) type Member = (Device, Group);

/// Whether an error is that of a member that misses another, who may have said why.
pub(crate) fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Train(TrainError::Member { .. }) | Error::Model(ModelError::Member(_)))
}

impl Devices {
    /// Whether this process has the device that writes files.
    pub fn lead(&self) -> bool {
        self.rendezvous.as_ref().is_none_or(|rendezvous| rendezvous.node == 0)
    }

    /// The devices of this process as members of one group, the first apart, where so many of all divide a model.
    pub(crate) fn join(&self, parts: impl Fn(&Group) -> usize) -> Result<(Member, Vec<Member>), Error> {
        let divide = |group: Group| {
            let parts = parts(&group);
            group.dividing_models(parts)
        };
        let groups = parallel::join(self.devices.len(), self.rendezvous.as_ref())?.into_iter();
        let groups = groups.map(divide).collect::<Result<Vec<_>, _>>()?;
        let mut members = self.devices.iter().copied().zip(groups);
        match members.next() {
            Some(first) => Ok((first, members.collect())),
            None => Err(ModelError::Config { field: "devices", reason: "must name one at least".into() }.into()),
        }
    }

    /// Lets every device of this process take part in a run: the first here, as the options say, the others silently.
    fn run(
        &self,
        options: RunOptions,
        member: impl Fn(Device, Group, RunOptions) -> Result<RunReport, Error> + Sync,
    ) -> Result<RunReport, Error> {
        let ((device, group), members) = self.join(|_| self.tensor_parallel)?;
        let (member, resume_from, interrupter) = (&member, options.resume_from, options.interrupter.clone());
        thread::scope(|scope| {
            let spawn = |(device, group): Member| {
                let options = RunOptions { resume_from, interrupter: interrupter.clone(), ..RunOptions::silent() };
                scope.spawn(move || member(device, group, options))
            };
            let others: Vec<_> = members.into_iter().map(spawn).collect();
            let first = member(device, group, options);
            let others = others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
            // A member that fails leaves the others, who then fail for want of it: the cause is told.
            let missed = |result: &Result<_, Error>| result.as_ref().is_err_and(is_absence);
            let cause = |first, other: Result<_, Error>| if missed(&first) && other.is_err() { other } else { first };
            others.collect::<Vec<_>>().into_iter().fold(first, cause)
        })
    }
}

/// [`llama_train::pretrain`] on devices that are chosen at run time. The trained model is the report's checkpoint.
///
/// # Errors
/// As there, [`ModelError::Device`] if a device does not answer, [`TrainError::Rendezvous`], and [`TrainError::Config`] if the data
/// is of another vocabulary than the checkpoint that the run begins with.
pub fn pretrain(config: &PretrainConfig, devices: &Devices, options: RunOptions) -> Result<RunReport, Error> {
    if options.resume_from.is_none() {
        check_vocabulary(config)?;
    }
    struct Pretrain<'a>(&'a PretrainConfig, Group, RunOptions<'a>);
    impl BackendTask for Pretrain<'_> {
        type Output = Result<RunReport, Error>;
        fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output {
            let Self(config, group, options) = self;
            let (_, report) = llama_train::pretrain::<B>(config, &device, group, options)?;
            Ok(report)
        }
    }
    devices.run(options, |device, group, options| device.run(Pretrain(config, group, options))?)
}

/// The weights of a checkpoint mean nothing for tokens of another vocabulary. One without a tokenizer beside it is believed.
fn check_vocabulary(config: &PretrainConfig) -> Result<(), Error> {
    const TEXT: &str = "The 1,024 quick br\u{f6}wn foxes\n\tjump(over); // \u{6771}\u{4eac} \u{1f98a}";
    let Some(Ok(own)) = config.base.as_deref().map(text::codec) else { return Ok(()) };
    let data = Codec::load(&config.data.folder)?;
    if own.encode(TEXT) != data.encode(TEXT) {
        let reason = "was tokenized with another vocabulary than that of the checkpoint which the run begins with";
        return Err(TrainError::Config { field: "data.folder".into(), reason: reason.into() }.into());
    }
    Ok(())
}

/// [`llama_train::finetune`] on devices that are chosen at run time. The adapters, or the trained model, are the report's checkpoint.
///
/// # Errors
/// As there, those of the base checkpoint, [`ModelError::Device`] if a device does not answer, and [`TrainError::Rendezvous`].
pub fn finetune(
    config: &FinetuneConfig,
    data: &FinetuneData,
    devices: &Devices,
    options: RunOptions,
) -> Result<RunReport, Error> {
    struct Finetune<'a>(&'a FinetuneConfig, &'a FinetuneData<'a>, Group, RunOptions<'a>);
    impl BackendTask for Finetune<'_> {
        type Output = Result<RunReport, Error>;
        fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output {
            let Self(config, data, group, options) = self;
            let (_, report) = llama_train::finetune::<B>(config, data, &device, group, options)?;
            Ok(report)
        }
    }
    devices.run(options, |device, group, options| device.run(Finetune(config, data, group, options))?)
}
