//! Questions whose answers are generated.

use llama_data::Progress;
use llama_model::generate::{GenerateOptions, Sampling};

use super::question::{Manner, Question, Reading};
use super::{Answered, Asked, Count, EvalOptions, EvalReport, Task, answer, program};
use crate::{Engine, EngineSession, Error};

/// Samples of a question that are generated together.
const TOGETHER: usize = 32;
/// Numbers of samples that pass@k is told for: the paper's.
const PASS_AT: [usize; 4] = [1, 10, 80, 100];

/// Generates answers.
pub(super) fn generate(
    engine: &Engine,
    task: Task,
    asked: Vec<Asked>,
    options: &EvalOptions,
    progress: &dyn Progress,
    report: &mut EvalReport,
    count: Count,
) -> Result<(), Error> {
    let Manner { stops, max_new_tokens, reading } = task.manner();
    let python = match (&reading, &options.python) {
        (Reading::Program, None) => {
            return Err(Error::Evaluation(format!(
                "{task} runs the programs that the model writes, which may do all that you may: where that does no harm, in a container \
                 for example, name a Python (--execute)"
            )));
        }
        (_, python) => python.clone().unwrap_or_default(),
    };
    let max_new_tokens = options.max_new_tokens.unwrap_or(max_new_tokens);
    let max_seq_len = engine.config().max_seq_len;
    let room = max_seq_len.checked_sub(max_new_tokens).filter(|room| *room > 0).ok_or_else(|| {
        Error::Evaluation(format!("{max_new_tokens} tokens of an answer leave no room in a context of {max_seq_len}"))
    })?;
    let mut prompts = Vec::new();
    for Asked { prefix, question, .. } in &asked {
        let (Question::Open { prompt, .. } | Question::Program { prompt, .. }) = question else { continue };
        let mut tokens = engine.codec().encode_prompt(&format!("{prefix}{prompt}"));
        let excess = tokens.len().saturating_sub(room);
        tokens.drain(..excess);
        report.cut += usize::from(excess > 0);
        prompts.push(tokens);
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut session = engine.session(longest + max_new_tokens)?;
    let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
    let samples = if matches!(reading, Reading::Short) { 1 } else { options.samples.max(1) };
    let sampling = if samples == 1 { Sampling::greedy() } else { options.sampling.clone() };
    let stop_tokens = engine.codec().eos.into_iter().collect();
    let each = GenerateOptions { max_new_tokens, sampling, seed: options.seed, stop_tokens, ..Default::default() };
    progress.start("questions", Some(prompts.len() as u64));
    let questions = prompts.len();
    for (Asked { origin, groups, question, .. }, tokens) in asked.into_iter().zip(prompts) {
        let texts = texts(engine, &mut session, tokens, samples, &each, &stops)?;
        let (answer, expected, correct) = match (&reading, question) {
            (Reading::Solution(read), Question::Open { answers, .. }) => {
                let found: Vec<_> = texts.iter().map(|text| read(text)).collect();
                let (most, right) = (answer::majority(&found).cloned(), read(&answers[0]));
                let correct = most.is_some() && most == right;
                (most.unwrap_or_default(), right.unwrap_or_default(), correct)
            }
            (_, Question::Open { answers, .. }) => {
                let text = texts[0].trim().to_string();
                let correct = answer::matches(&text, &answers);
                (text, answers[0].clone(), correct)
            }
            (_, Question::Program { solution, before, after, .. }) => {
                let programs: Vec<String> = texts.iter().map(|text| format!("{before}{text}{after}")).collect();
                let passed = program::pass(&python, &programs)
                    .map_err(|error| Error::Evaluation(format!("{}: {error}", python.display())))?;
                let right = passed.iter().filter(|passed| **passed).count();
                for k in PASS_AT.into_iter().filter(|k| *k <= samples) {
                    *report.pass_at.entry(k).or_default() += program::pass_at(k, samples, right) / questions as f64;
                }
                let first = passed.iter().position(|passed| *passed).unwrap_or(0);
                (texts[first].clone(), solution, right > 0)
            }
            (_, Question::Choice { .. }) => continue,
        };
        count(Answered { origin, groups, answer, expected, correct, log_likelihoods: Vec::new() }, report);
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

/// What comes after a prompt, up to one of `stops`: once, in the session, or several times.
fn texts(
    engine: &Engine,
    session: &mut EngineSession,
    prompt: Vec<u32>,
    samples: usize,
    options: &GenerateOptions,
    stops: &[String],
) -> Result<Vec<String>, Error> {
    if samples == 1 {
        return Ok(engine.texts(session.generate(prompt, options.clone())?, &[true], stops)?);
    }
    let mut texts = Vec::new();
    while texts.len() < samples {
        let part = TOGETHER.min(samples - texts.len());
        let options =
            GenerateOptions { seed: options.seed.wrapping_add((texts.len() / TOGETHER) as u64), ..options.clone() };
        let steps = engine.generate(&vec![prompt.clone(); part], options)?;
        texts.extend(engine.texts(steps, &vec![true; part], stops)?);
    }
    Ok(texts)
}
