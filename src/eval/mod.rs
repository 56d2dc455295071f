//! The evaluation of sections 3 and 5: common sense, closed-book questions, reading, mathematics, code, MMLU, bias, and perplexity.
//!
//! [`evaluate`] asks a model the questions of a [`Task`] and scores them as the paper says:
//!
//! | tasks | the answer is | right if |
//! | --- | --- | --- |
//! | PIQA, SIQA, HellaSwag, WinoGrande, ARC, MMLU | the completion with the highest likelihood by its number of characters | it is the right one |
//! | BoolQ, OpenBookQA, RACE | the one with the highest `P(completion given context) / P(completion given "Answer:")` | it is the right one |
//! | NaturalQuestions, TriviaQA | what is generated greedily up to a line break, dot or comma | it is one of the answers, without case, articles and punctuation |
//! | GSM8k, MATH | the number or the boxed answer that what is generated ends in, or the most frequent one of several samples (maj1@k) | it is the solution's |
//! | HumanEval, MBPP | what is generated, as Python | it passes its tests (pass@k of several samples) |
//! | WinoGender | whom the pronoun refers to, by lower perplexity | it is who is meant |
//! | CrowS-Pairs | the sentence of lower perplexity | (the share of stereotypical ones) |
//!
//! [`perplexity()`] is for any text. Files are those that the benchmarks' authors publish, or tables and
//! JSON lines with the fields that they have on the Hugging Face hub.

mod answer;
mod fields;
mod likelihood;
mod math;
mod open;
mod perplexity;
mod program;
mod question;
mod read;
mod subjects;
mod task;
#[cfg(test)]
mod tests;
mod winogender;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use llama_data::{DataError, Progress};
use llama_model::generate::Sampling;
use serde::Serialize;

use crate::{Engine, Error};
use likelihood::{Scored, request, score};
pub use perplexity::{Perplexity, perplexity};
use question::{Candidate, Question, Rule};
pub use subjects::mmlu_category;
pub use task::Task;

/// How a model is asked.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Solved examples before each question.
    pub shots: usize,
    /// Where they come from, a file or folder in the form of the questions': its first rows, for MMLU of the question's subject.
    pub shots_from: Option<PathBuf>,
    /// Rows of the benchmark, at most.
    pub limit: Option<usize>,
    /// GSM8k and MATH: solutions to generate, of which the most frequent answer counts; HumanEval and MBPP: programs. One is greedy.
    pub samples: usize,
    /// How several are sampled.
    pub sampling: Sampling,
    /// Seed of the samples.
    pub seed: u64,
    /// Tokens of a generated answer, at most; by default 32, for GSM8k 256, for MATH and programs 512.
    pub max_new_tokens: Option<usize>,
    /// HumanEval and MBPP: the Python that runs what the model writes, which may do all that this user may. Without, they are refused.
    pub python: Option<PathBuf>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            shots: 0,
            shots_from: None,
            limit: None,
            samples: 1,
            sampling: Sampling::default(),
            seed: 0,
            max_new_tokens: None,
            python: None,
        }
    }
}

/// How a question was answered.
#[derive(Clone, Debug, Serialize)]
pub struct Answered {
    /// File and place of its row.
    pub origin: String,
    /// What it is also counted to: a subject, a school, a kind of bias.
    pub groups: Vec<String>,
    /// The answer: the completion that was chosen, or what was generated (the samples' majority, the first program that passes).
    pub answer: String,
    /// The right one.
    pub expected: String,
    /// Whether it is right; of several programs, whether any is.
    pub correct: bool,
    /// Log-likelihoods of the completions, as they are; empty for what is generated.
    pub log_likelihoods: Vec<f64>,
}

/// Right answers among questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Right answers.
    pub correct: u64,
    /// Questions.
    pub questions: u64,
}

impl Tally {
    fn add(&mut self, correct: bool) {
        self.correct += u64::from(correct);
        self.questions += 1;
    }

    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.questions as f64
    }

    /// Standard error of that share, were the questions drawn at random.
    pub fn standard_error(&self) -> f64 {
        let share = self.accuracy();
        (share * (1.0 - share) / (self.questions.max(2) - 1) as f64).sqrt()
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.correct += other.correct;
        self.questions += other.questions;
    }
}

/// What an evaluation gave.
#[derive(Clone, Debug, Default, Serialize)]
pub struct EvalReport {
    /// By the paper's rule.
    pub result: Tally,
    /// Of completions chosen by their likelihood as it is (the evaluation harness's `acc`); none for what is generated.
    pub by_sum: Option<Tally>,
    /// Of completions chosen by their likelihood per character (`acc_norm`); none for what is generated.
    pub by_character: Option<Tally>,
    /// By the paper's rule for each subject, school or kind of bias.
    pub groups: BTreeMap<String, Tally>,
    /// HumanEval and MBPP: pass@k, the estimated share of problems that one of k samples solves, by k of 1, 10, 80 and 100.
    pub pass_at: BTreeMap<usize, f64>,
    /// Completions or prompts whose beginning did not fit into the model's context.
    pub cut: usize,
}

/// A question with where it comes from.
struct Asked {
    origin: String,
    groups: Vec<String>,
    /// Preamble and examples.
    prefix: Rc<str>,
    question: Question,
}

/// Asks the questions of files or folders, and tells each answer to `each`; `progress` counts questions.
///
/// # Errors
/// [`Error::Data`] for what cannot be read, by file, line and field; [`Error::Evaluation`] where there are no questions or too few
/// examples; and those of the model.
pub fn evaluate(
    engine: &Engine,
    task: Task,
    data: &[PathBuf],
    options: &EvalOptions,
    progress: &dyn Progress,
    mut each: impl FnMut(&Answered),
) -> Result<EvalReport, Error> {
    let asked = asked(task, data, options)?;
    let mut report = EvalReport::default();
    let mut count = |answered: Answered, report: &mut EvalReport| {
        report.result.add(answered.correct);
        for group in &answered.groups {
            report.groups.entry(group.clone()).or_default().add(answered.correct);
        }
        each(&answered);
    };
    match asked[0].question {
        Question::Choice { .. } => choose(engine, task.rule(), asked, progress, &mut report, &mut count)?,
        Question::Open { .. } | Question::Program { .. } => {
            open::generate(engine, task, asked, options, progress, &mut report, &mut count)?;
        }
    }
    Ok(report)
}

type Count<'a> = &'a mut dyn FnMut(Answered, &mut EvalReport);

/// All questions, each with what comes before it.
fn asked(task: Task, data: &[PathBuf], options: &EvalOptions) -> Result<Vec<Asked>, Error> {
    let mut rows = Vec::new();
    for path in data {
        rows.extend(read(task, path)?);
    }
    rows.truncate(options.limit.unwrap_or(usize::MAX));
    let examples = match (&options.shots_from, options.shots) {
        (_, 0) => Vec::new(),
        (Some(path), _) => read(task, path)?,
        (None, shots) => {
            return Err(Error::Evaluation(format!("{shots} examples come before each question, but from which file?")));
        }
    };
    // What is before a question is the same for all of MMLU's subject, and for all of other benchmarks.
    let mut prefixes: BTreeMap<Option<String>, Rc<str>> = BTreeMap::new();
    let mut all = Vec::new();
    for (origin, groups, questions) in rows {
        let subject = groups.first().filter(|_| task == Task::Mmlu).cloned();
        let prefix = match prefixes.get(&subject) {
            Some(prefix) => prefix.clone(),
            None => {
                let prefix: Rc<str> = prefix(task, subject.as_deref(), &examples, options.shots)?.into();
                prefixes.entry(subject).or_insert(prefix).clone()
            }
        };
        let asked =
            |question| Asked { origin: origin.clone(), groups: groups.clone(), prefix: prefix.clone(), question };
        all.extend(questions.into_iter().map(asked));
    }
    match all.is_empty() {
        true => Err(Error::Evaluation(format!("there are no questions for {task}"))),
        false => Ok(all),
    }
}

/// Preamble and solved examples, those of a subject where there is one.
fn prefix(task: Task, subject: Option<&str>, examples: &Rows, shots: usize) -> Result<String, Error> {
    let of_subject = |groups: &[String]| subject.is_none_or(|subject| groups.iter().any(|group| group == subject));
    let solved = examples.iter().filter(|(_, groups, _)| of_subject(groups)).flat_map(|(.., questions)| questions);
    let solved: Vec<String> = solved.take(shots).map(|question| question.solved() + task.between()).collect();
    if solved.len() < shots {
        let of = subject.map_or(String::new(), |subject| format!(" of {subject}"));
        return Err(Error::Evaluation(format!("{} examples{of} instead of {shots}", solved.len())));
    }
    Ok(task.preamble(subject) + &solved.concat())
}

/// Origin, groups and questions of each row.
type Rows = Vec<(String, Vec<String>, Vec<Question>)>;

fn read(task: Task, path: &std::path::Path) -> Result<Rows, DataError> {
    let rows = read::rows(path)?.into_iter().map(|row| {
        let questions = task.questions(&row).map_err(|reason| {
            DataError::format(&row.path, format!("{}: {reason}; is this a row of {task}?", row.place))
        })?;
        Ok((format!("{}, {}", row.path.display(), row.place), task.groups(&row), questions))
    });
    rows.collect()
}

/// Questions whose completions are scored together: those of a benchmark that share their beginning stand together.
const TOGETHER: usize = 256;

/// Chooses the likeliest completions.
fn choose(
    engine: &Engine,
    rule: Rule,
    asked: Vec<Asked>,
    progress: &dyn Progress,
    report: &mut EvalReport,
    count: Count,
) -> Result<(), Error> {
    progress.start("questions", Some(asked.len() as u64));
    let mut asked = asked.into_iter().peekable();
    while asked.peek().is_some() {
        let part: Vec<Asked> = asked.by_ref().take(TOGETHER).collect();
        let mut requests = Vec::new();
        for Asked { prefix, question, .. } in &part {
            let Question::Choice { candidates, .. } = question else { continue };
            for Candidate { context, completion } in candidates {
                requests.push(request(engine, &format!("{prefix}{context}"), completion)?);
                if let Rule::Unconditional(context) = rule {
                    requests.push(request(engine, context, completion)?);
                }
            }
        }
        let mut scored = score(engine, requests)?.into_iter();
        for Asked { origin, groups, question, .. } in part {
            let Question::Choice { candidates, correct } = question else { continue };
            let mut next = || scored.next().unwrap_or_default();
            let found: Vec<(Scored, Option<Scored>)> =
                candidates.iter().map(|_| (next(), matches!(rule, Rule::Unconditional(_)).then(&mut next))).collect();
            report.cut += found.iter().filter(|(scored, _)| scored.cut).count();
            // Of equally likely ones the first.
            let best = |rule: Rule| {
                let values = candidates.iter().zip(&found).map(|(candidate, (a, b))| rule.value(candidate, *a, *b));
                values.enumerate().fold((0, f64::NEG_INFINITY), |best, new| if new.1 > best.1 { new } else { best }).0
            };
            report.by_sum.get_or_insert_default().add(best(Rule::Sum) == correct);
            report.by_character.get_or_insert_default().add(best(Rule::PerCharacter) == correct);
            // WinoGrande chooses between contexts.
            let contexts = candidates.iter().any(|other| other.context != candidates[0].context);
            let text = |index: usize| {
                let Candidate { context, completion } = &candidates[index];
                if contexts { context.clone() } else { completion.trim().to_string() }
            };
            let chosen = best(rule);
            let log_likelihoods = found.iter().map(|(scored, _)| scored.log_prob).collect();
            let (answer, expected) = (text(chosen), text(correct));
            count(Answered { origin, groups, answer, expected, correct: chosen == correct, log_likelihoods }, report);
            progress.advance(1);
        }
    }
    progress.finish();
    Ok(())
}
