//! What a model is asked, and how answers are compared.

/// How the likelihoods of completions are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rule {
    /// As they are.
    Sum,
    /// By the number of characters of the completion.
    PerCharacter,
    /// By the number of tokens: perplexity.
    PerToken,
    /// By the likelihood of the completion after this alone.
    Unconditional(&'static str),
}

/// How an answer is generated, and what is made of it.
pub(super) struct Manner {
    /// What the answer ends before.
    pub stops: &'static [&'static str],
    /// Tokens of an answer, at most.
    pub max_new_tokens: usize,
    pub reading: Reading,
}

pub(super) enum Reading {
    /// One of the accepted answers, but for case, articles and punctuation.
    Short,
    /// A worked solution, of which this is the answer.
    Solution(fn(&str) -> Option<String>),
    /// Python.
    Program,
}

/// What a model is asked.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Question {
    /// Which completion is likeliest.
    Choice { candidates: Vec<Candidate>, correct: usize },
    /// What comes after a prompt; any of the answers is right.
    Open { prompt: String, answers: Vec<String> },
    /// What comes after a prompt is Python between `before` and `after`, and right if the whole ends without an error.
    Program { prompt: String, solution: String, before: String, after: String },
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate {
    pub context: String,
    /// With the space that parts it from the context.
    pub completion: String,
}

impl Question {
    pub fn choice<T: Into<String>>(context: &str, completions: impl IntoIterator<Item = T>, correct: usize) -> Self {
        let candidate = |completion: T| Candidate { context: context.into(), completion: completion.into() };
        Self::Choice { candidates: completions.into_iter().map(candidate).collect(), correct }
    }

    /// The question with its answer, as an example before others.
    pub fn solved(&self) -> String {
        match self {
            Self::Choice { candidates, correct } => {
                format!("{}{}", candidates[*correct].context, candidates[*correct].completion)
            }
            Self::Open { prompt, answers } => format!("{prompt} {}", answers[0]),
            Self::Program { prompt, solution, .. } => format!("{prompt}{solution}"),
        }
    }
}
