//! A model on a device that is chosen at run time, behind an interface that names no backend.
//!
//! Code that is generic over the backend is compiled into each program that uses it, and with a GPU feature all of Burn's
//! GPU code with it. What is here is compiled once, with this crate.

use std::any::Any;
use std::path::{Path, PathBuf};

use llama_data::Progress;
use llama_data::tokenizer::Codec;
use llama_model::formats::{Checkpoint, Format};
use llama_model::generate::{self, GenerateOptions, Generated, Generation, ScoreRequest, Session, Speculation};
use llama_model::lora::{self, Adapters};
use llama_model::shard::Team;
use llama_model::{
    BackendTask, Compute, Device, Llama, LlamaBackend, LlamaConfig, ModelError, Precision, TrainBackend, WeightFormat,
};
use llama_train::checkpoint;
use llama_train::load_model;

use crate::Devices;
use crate::Error;
use crate::text::{self, TextStream};

mod others;

use others::{Follow, Others};

/// How a checkpoint is opened.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where to compute. All of them, also those of other processes, divide the model, each with a part of every block.
    pub devices: Devices,
    /// How matrices are kept in memory; fewer bytes decode faster. By default as the checkpoint has them ([`Checkpoint::load`]).
    pub weights: Option<WeightFormat>,
    /// Precision of products when a text is read; by default what [suits](suitable_precision) the weights.
    pub precision: Option<Precision>,
    /// What keys and values of past positions are kept in; by default what [suits](WeightFormat::cache) the weights.
    pub cache: Option<Precision>,
    /// Adapters that fine-tuning made: a folder in PEFT's layout, or a run.
    pub adapter: Option<PathBuf>,
    /// Tokenizer, where the checkpoint has none beside it: a file as [`text::codec`] takes it.
    pub tokenizer: Option<PathBuf>,
}

impl EngineOptions {
    /// Weights as they are stored, no adapters.
    pub fn new(devices: Devices) -> Self {
        Self { devices, weights: None, precision: None, cache: None, adapter: None, tokenizer: None }
    }
}

/// Steps of a generation: each has an entry for every prompt, as those of [`Generation`].
pub type Steps<'a> = Box<dyn Iterator<Item = Result<Vec<Option<Generated>>, ModelError>> + 'a>;

/// Rounds of a speculative generation, as those of [`Speculation`].
pub type Rounds<'a> = Box<dyn Iterator<Item = Result<Vec<Generated>, ModelError>> + 'a>;

/// A checkpoint on a device, with its tokenizer: generates, converses, tells the log-probability of texts.
///
/// ```no_run
/// use llama::model::generate::GenerateOptions;
///
/// let engine = llama::Engine::open("smollm2.gguf".as_ref(), "flex".parse()?)?;
/// let texts = engine.complete(&["The capital of France is"], GenerateOptions::default(), &[])?;
/// println!("{}", texts[0]);
/// # Ok::<(), llama::Error>(())
/// ```
pub struct Engine {
    model: Box<dyn Placed>,
    config: LlamaConfig,
    codec: Codec,
    /// Dropped after the model.
    _others: Others,
}

impl Engine {
    /// Opens a checkpoint in any format, or the newest of a run, with its tokenizer.
    ///
    /// # Errors
    /// Whatever is missing or broken, by the file's name; [`ModelError::Device`] if the device does not answer;
    /// [`Error::Vocabulary`] if the tokenizer is not the model's.
    pub fn open(path: &Path, devices: Devices) -> Result<Self, Error> {
        Self::open_with(path, &EngineOptions::new(devices), &llama_data::NoProgress)
    }

    /// [`open`](Self::open) with options; `progress` counts parameters. Of several processes the first opens the engine, the others
    /// [`follow`] it.
    ///
    /// # Errors
    /// As [`open`](Self::open), and for adapters, weights or a precision that do not go with model and devices;
    /// [`TrainError::Rendezvous`](crate::train::TrainError::Rendezvous) if other processes do not come.
    pub fn open_with(path: &Path, options: &EngineOptions, progress: &dyn Progress) -> Result<Self, Error> {
        let path = checkpoint_path(path)?;
        let codec = text::codec(options.tokenizer.as_deref().unwrap_or(&path))?;
        let checkpoint = Checkpoint::open(&path)?;
        let config = checkpoint.config().clone();
        if codec.vocab_size() > config.vocab_size {
            return Err(Error::Vocabulary { tokenizer: codec.vocab_size(), model: config.vocab_size });
        }
        let (device, group, others) = Others::join(&path, options)?;
        let team = group.team();
        let open = || {
            let model = device.run(Open { checkpoint, team, options, progress })??;
            group.ready()?;
            Ok(model)
        };
        match open() {
            Ok(model) => Ok(Self { model, config, codec, _others: others }),
            // Whoever is missed may have said why.
            Err(error) => {
                drop(group);
                Err(others.leave().unwrap_or(error))
            }
        }
    }

    /// The model's sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The tokenizer.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Generates after prompts of tokens; see [`Generation`].
    ///
    /// # Errors
    /// As [`Generation::new`].
    pub fn generate(&self, prompts: &[Vec<u32>], options: GenerateOptions) -> Result<Steps<'_>, ModelError> {
        self.model.generate(prompts, options)
    }

    /// Generates after texts, and returns what comes after each: up to the end of the text as the tokenizer has it, a token of
    /// [`stop_tokens`](GenerateOptions::stop_tokens), or one of the strings `stops`, none of which is returned.
    ///
    /// # Errors
    /// As [`Generation::new`] and its steps.
    pub fn complete<T: AsRef<str>>(
        &self,
        prompts: &[T],
        mut options: GenerateOptions,
        stops: &[String],
    ) -> Result<Vec<String>, ModelError> {
        options.stop_tokens.extend(self.codec.eos);
        let tokens: Vec<_> = prompts.iter().map(|prompt| self.codec.encode_prompt(prompt.as_ref())).collect();
        let begun = |prompt: &Vec<u32>| prompt.iter().any(|token| Some(*token) != self.codec.bos);
        let continuing: Vec<_> = tokens.iter().map(begun).collect();
        self.texts(self.generate(&tokens, options)?, &continuing, stops)
    }

    /// The text of a generation, up to one of `stops`; for each row, whether it is `continuing` a text.
    pub(crate) fn texts(
        &self,
        steps: Steps<'_>,
        continuing: &[bool],
        stops: &[String],
    ) -> Result<Vec<String>, ModelError> {
        let stream = |continuing: &bool| TextStream::new(&self.codec, *continuing, stops.to_vec());
        let mut streams: Vec<_> = continuing.iter().map(stream).collect();
        let mut texts = vec![String::new(); streams.len()];
        for step in steps {
            for ((new, text), stream) in step?.into_iter().zip(&mut texts).zip(&mut streams) {
                text.extend(new.map(|new| stream.push(new.token)));
            }
            if streams.iter().all(TextStream::stopped) {
                break;
            }
        }
        Ok(texts.into_iter().zip(streams).map(|(text, stream)| text + &stream.finish()).collect())
    }

    /// Generates after one prompt with guesses of a smaller model on the same device; see [`Speculation`].
    ///
    /// # Errors
    /// As [`Speculation::new`], and [`ModelError::Generation`] if the draft is on a device of another kind.
    pub fn speculate<'a>(
        &'a self,
        draft: &'a Engine,
        guesses: usize,
        prompt: Vec<u32>,
        options: GenerateOptions,
    ) -> Result<Rounds<'a>, ModelError> {
        self.model.speculate(draft.model.as_ref(), guesses, prompt, options)
    }

    /// Natural log-probability of each token that is to be scored, given all before it; see [`score`](generate::score()).
    ///
    /// # Errors
    /// As there.
    pub fn score(&self, requests: &[ScoreRequest]) -> Result<Vec<Vec<f32>>, ModelError> {
        self.model.score(requests)
    }

    /// A text of up to `capacity` tokens that grows, as in a conversation: what was read of it is not read again.
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`] if the model's context is shorter.
    pub fn session(&self, capacity: usize) -> Result<EngineSession<'_>, ModelError> {
        Ok(EngineSession(self.model.session(capacity)?))
    }
}

/// A growing text of an [`Engine`]; see [`Session`].
pub struct EngineSession<'a>(Box<dyn Growing + 'a>);

impl EngineSession<'_> {
    /// Generates after `prompt`; of it, only what was not read yet is read.
    ///
    /// # Errors
    /// As [`Generation::in_session`].
    pub fn generate(&mut self, prompt: Vec<u32>, options: GenerateOptions) -> Result<Steps<'_>, ModelError> {
        self.0.generate(prompt, options)
    }
}

/// The devices of a process that has another part of an engine's model: they do what the first process does, until it is gone. With the same path
/// and options as [`Engine::open_with`] there.
///
/// # Errors
/// As there.
pub fn follow(path: &Path, options: &EngineOptions) -> Result<(), Error> {
    let path = checkpoint_path(path)?;
    let (device, group, others) = Others::join(&path, options)?;
    let followed = device.run(Follow { path, options: options.clone(), group }).map_err(Error::from).flatten();
    others.leave().map_or(followed, Err)
}

/// The precision of products that suits weights on a device; see [`WeightFormat::precision`].
///
/// # Errors
/// [`ModelError::Device`] if the device does not answer.
pub fn suitable_precision(weights: WeightFormat, device: Device) -> Result<Precision, ModelError> {
    struct Suitable(WeightFormat);
    impl BackendTask for Suitable {
        type Output = Precision;
        fn run<B: TrainBackend>(self, device: B::Device) -> Precision {
            self.0.precision::<B::InnerBackend>(&device)
        }
    }
    device.run(Suitable(weights))
}

/// The checkpoint at `path`: itself, in any format, or the newest of the run there.
///
/// # Errors
/// If it is neither.
pub fn checkpoint_path(path: &Path) -> Result<PathBuf, Error> {
    match Format::detect(path) {
        Ok(_) => Ok(path.into()),
        // A run folder has its checkpoints below it; anything else is told what is wrong with it.
        Err(error) => checkpoint::latest(path).map_err(|_| error.into()),
    }
}

/// The adapters at `path`: the newest of a run, or what is there itself.
pub fn adapter_path(path: &Path) -> PathBuf {
    let folder = path.join(lora::CONFIG_FILE).is_file().then(|| path.to_path_buf());
    folder.or_else(|| checkpoint::latest(path).ok()).unwrap_or_else(|| path.into())
}

/// A model on the device of some backend.
trait Placed: Send + Sync {
    fn generate(&self, prompts: &[Vec<u32>], options: GenerateOptions) -> Result<Steps<'_>, ModelError>;
    fn speculate<'a>(
        &'a self,
        draft: &'a dyn Placed,
        guesses: usize,
        prompt: Vec<u32>,
        options: GenerateOptions,
    ) -> Result<Rounds<'a>, ModelError>;
    fn score(&self, requests: &[ScoreRequest]) -> Result<Vec<Vec<f32>>, ModelError>;
    fn session(&self, capacity: usize) -> Result<Box<dyn Growing + '_>, ModelError>;
    fn as_any(&self) -> &dyn Any;
}

/// A growing text on the device of some backend.
trait Growing {
    fn generate(&mut self, prompt: Vec<u32>, options: GenerateOptions) -> Result<Steps<'_>, ModelError>;
}

struct Open<'a> {
    checkpoint: Checkpoint,
    team: Team,
    options: &'a EngineOptions,
    progress: &'a dyn Progress,
}

impl BackendTask for Open<'_> {
    type Output = Result<Box<dyn Placed>, Error>;

    fn run<B: TrainBackend>(self, device: B::Device) -> Self::Output {
        Ok(Box::new(OnDevice(self.model::<B::InnerBackend>(&device)?.leading())))
    }
}

impl Open<'_> {
    fn model<B: LlamaBackend>(self, device: &B::Device) -> Result<Llama<B>, Error> {
        let Self { checkpoint, team, options, progress } = self;
        let model = load_model::<B>(&checkpoint, &team, options.weights, device, progress)?;
        let model = match &options.adapter {
            Some(folder) => Adapters::open(&adapter_path(folder))?.apply(model)?,
            None => model,
        };
        let weights = options.weights.unwrap_or_else(|| checkpoint.stored_format().on::<B>(device));
        let precision = options.precision.unwrap_or_else(|| weights.precision::<B>(device));
        let cache = options.cache.unwrap_or_else(|| weights.cache::<B>(device));
        precision.check::<B>("precision", device)?;
        cache.check::<B>("cache", device)?;
        Ok(model.with_compute(Compute { precision, ..Default::default() }).with_cache(cache))
    }
}

struct OnDevice<B: LlamaBackend>(Llama<B>);

impl<B: LlamaBackend> Placed for OnDevice<B> {
    fn generate(&self, prompts: &[Vec<u32>], options: GenerateOptions) -> Result<Steps<'_>, ModelError> {
        Ok(Box::new(Generation::new(&self.0, prompts, options)?))
    }

    fn speculate<'a>(
        &'a self,
        draft: &'a dyn Placed,
        guesses: usize,
        prompt: Vec<u32>,
        options: GenerateOptions,
    ) -> Result<Rounds<'a>, ModelError> {
        let Some(draft) = draft.as_any().downcast_ref::<Self>() else {
            return Err(ModelError::Generation("the draft must be on the model's device".into()));
        };
        Ok(Box::new(Speculation::new(&self.0, &draft.0, guesses, prompt, options)?))
    }

    fn score(&self, requests: &[ScoreRequest]) -> Result<Vec<Vec<f32>>, ModelError> {
        generate::score(&self.0, requests)
    }

    fn session(&self, capacity: usize) -> Result<Box<dyn Growing + '_>, ModelError> {
        let session = Session::new(&self.0, capacity)?;
        Ok(Box::new(Text { on: self, session: Some(session), capacity }))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Text<'a, B: LlamaBackend> {
    on: &'a OnDevice<B>,
    /// Absent while a generation has it, and after one that was refused.
    session: Option<Session<B>>,
    capacity: usize,
}

impl<B: LlamaBackend> Text<'_, B> {
    fn take(&mut self) -> Result<Session<B>, ModelError> {
        let new = || Session::new(&self.on.0, self.capacity);
        self.session.take().map_or_else(new, Ok)
    }
}

impl<B: LlamaBackend> Growing for Text<'_, B> {
    fn generate(&mut self, prompt: Vec<u32>, options: GenerateOptions) -> Result<Steps<'_>, ModelError> {
        let session = self.take()?;
        let generation = Generation::in_session(&self.on.0, session, prompt, options)?;
        Ok(Box::new(Turn { generation: Some(generation), session: &mut self.session }))
    }
}

/// A generation that gives its session back when it ends.
struct Turn<'a, B: LlamaBackend> {
    generation: Option<Generation<'a, B>>,
    session: &'a mut Option<Session<B>>,
}

impl<B: LlamaBackend> Iterator for Turn<'_, B> {
    type Item = Result<Vec<Option<Generated>>, ModelError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.generation.as_mut()?.next()
    }
}

impl<B: LlamaBackend> Drop for Turn<'_, B> {
    fn drop(&mut self) {
        *self.session = self.generation.take().map(Generation::into_session);
    }
}
