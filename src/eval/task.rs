//! The benchmarks of section 3: what their files have in a row, and the text that a model is asked with.
//!
//! Where the paper gives no text, it is that of EleutherAI's evaluation harness, whose way of scoring the paper follows, or of
//! GPT-3's appendix G for RACE.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use super::fields::{Fields, capitalized, labelled, wikihow};
use super::question::{Candidate, Manner, Question, Reading, Rule};
use super::read::Row;
use super::{answer, math, winogender};

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// Questions about a passage, yes or no (Clark et al. 2019).
    BoolQ,
    /// Physical commonsense (Bisk et al. 2020).
    Piqa,
    /// Social commonsense (Sap et al. 2019).
    Siqa,
    /// How a situation goes on (Zellers et al. 2019).
    HellaSwag,
    /// What a pronoun's place refers to (Sakaguchi et al. 2021).
    WinoGrande,
    /// Science questions, easy or challenge (Clark et al. 2018).
    Arc,
    /// Elementary science with common knowledge (Mihaylov et al. 2018).
    OpenBookQa,
    /// Reading comprehension of middle and high school (Lai et al. 2017).
    Race,
    /// 57 subjects (Hendrycks et al. 2020); five examples of the subject come before.
    Mmlu,
    /// Open questions asked of a search engine (Kwiatkowski et al. 2019).
    NaturalQuestions,
    /// Trivia (Joshi et al. 2017).
    TriviaQa,
    /// Grade school mathematics in words (Cobbe et al. 2021).
    Gsm8k,
    /// Competition mathematics (Hendrycks et al. 2021).
    Math,
    /// Python from a signature and a description (Chen et al. 2021).
    HumanEval,
    /// Python from a description and tests (Austin et al. 2021).
    Mbpp,
    /// Whom a pronoun means, by its gender (Rudinger et al. 2018).
    WinoGender,
    /// Pairs of a stereotypical and another sentence (Nangia et al. 2020): the share of pairs whose stereotypical one the model
    /// prefers; 50% is no preference.
    CrowsPairs,
}

impl Task {
    /// All there are.
    pub const ALL: [Self; 17] = [
        Self::BoolQ,
        Self::Piqa,
        Self::Siqa,
        Self::HellaSwag,
        Self::WinoGrande,
        Self::Arc,
        Self::OpenBookQa,
        Self::Race,
        Self::Mmlu,
        Self::NaturalQuestions,
        Self::TriviaQa,
        Self::Gsm8k,
        Self::Math,
        Self::HumanEval,
        Self::Mbpp,
        Self::WinoGender,
        Self::CrowsPairs,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::BoolQ => "boolq",
            Self::Piqa => "piqa",
            Self::Siqa => "siqa",
            Self::HellaSwag => "hellaswag",
            Self::WinoGrande => "winogrande",
            Self::Arc => "arc",
            Self::OpenBookQa => "openbookqa",
            Self::Race => "race",
            Self::Mmlu => "mmlu",
            Self::NaturalQuestions => "nq",
            Self::TriviaQa => "triviaqa",
            Self::Gsm8k => "gsm8k",
            Self::Math => "math",
            Self::HumanEval => "humaneval",
            Self::Mbpp => "mbpp",
            Self::WinoGender => "winogender",
            Self::CrowsPairs => "crows-pairs",
        }
    }

    /// What the paper divides the likelihood of a completion by, to choose one: nothing where all have the same.
    pub(super) fn rule(self) -> Rule {
        match self {
            Self::BoolQ | Self::OpenBookQa => Rule::Unconditional("Answer:"),
            // As Brown et al. 2020.
            Self::Race => Rule::Unconditional("A:"),
            Self::CrowsPairs | Self::WinoGender => Rule::PerToken,
            _ => Rule::PerCharacter,
        }
    }

    /// How what is not chosen is generated.
    pub(super) fn manner(self) -> Manner {
        let (stops, max_new_tokens, reading): (&[&str], _, _) = match self {
            Self::Gsm8k => (&["Question:"], 256, Reading::Solution(answer::number)),
            Self::Math => (&["Problem:"], 512, Reading::Solution(math::answer)),
            // As Chen et al.
            Self::HumanEval => (&["\nclass", "\ndef", "\n#", "\nif", "\nprint"], 512, Reading::Program),
            Self::Mbpp => (&["[DONE]"], 512, Reading::Program),
            // Up to the first line break, final dot or comma (section 3.2).
            _ => (&["\n", ".", ","], 32, Reading::Short),
        };
        Manner { stops, max_new_tokens, reading }
    }

    /// What comes before the first example or question.
    pub(super) fn preamble(self, group: Option<&str>) -> String {
        match (self, group) {
            (Self::Mmlu, Some(subject)) => {
                let subject = subject.replace('_', " ");
                format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
            }
            (Self::NaturalQuestions | Self::TriviaQa, _) => "Answer these questions:\n".into(),
            _ => String::new(),
        }
    }

    /// What stands between examples.
    pub(super) fn between(self) -> &'static str {
        if matches!(self, Self::NaturalQuestions | Self::TriviaQa) { "\n" } else { "\n\n" }
    }

    /// The questions of a row.
    pub(super) fn questions(self, row: &Row) -> Result<Vec<Question>, String> {
        let fields = Fields(&row.fields);
        let question = match self {
            Self::BoolQ => {
                let (passage, question) = (fields.text(&["passage"])?, fields.text(&["question"])?);
                let context = format!("{passage}\nQuestion: {}?\nAnswer:", question.trim_end_matches('?'));
                Question::choice(&context, [" no", " yes"], fields.index(&["answer", "label"], 0)?)
            }
            Self::Piqa => {
                let context = format!("Question: {}\nAnswer:", fields.text(&["goal"])?);
                Question::choice(&context, fields.spaced(&["sol1", "sol2"])?, fields.index(&["label"], 0)?)
            }
            Self::Siqa => {
                let context = format!("Q: {} {}\nA:", fields.text(&["context"])?, fields.text(&["question"])?);
                let answers = fields.spaced(&["answerA", "answerB", "answerC"])?;
                Question::choice(&context, answers, fields.index(&["label", "correct"], 1)?)
            }
            Self::HellaSwag => {
                let (first, second) = (fields.text(&["ctx_a"])?, capitalized(fields.text(&["ctx_b"])?));
                let context = wikihow(&format!("{}: {first} {second}", fields.text(&["activity_label"])?));
                let endings = fields.list("endings")?;
                let endings = endings.iter().map(|ending| format!(" {}", wikihow(ending)));
                Question::choice(&context, endings, fields.index(&["label"], 0)?)
            }
            Self::WinoGrande => {
                let sentence = fields.text(&["sentence"])?;
                let (before, after) = sentence.split_once('_').ok_or("`sentence` has no `_`")?;
                let candidate = |option: String| Candidate {
                    context: format!("{before}{option}"),
                    completion: format!(" {}", after.trim()),
                };
                let options = [fields.text(&["option1"])?, fields.text(&["option2"])?].map(String::from);
                let candidates = options.into_iter().map(candidate).collect();
                Question::Choice { candidates, correct: fields.index(&["answer"], 1)? }
            }
            Self::Arc | Self::OpenBookQa => {
                let inner = row.fields.get("question").and_then(Value::as_object);
                let asked = inner.map_or(fields, Fields);
                let stem = asked.text(&["stem", "question_stem", "question"])?;
                let (labels, texts) = labelled(asked)?;
                let key = fields.text(&["answerKey"])?.trim();
                let correct = labels.iter().position(|label| label == key);
                let correct = correct.ok_or_else(|| format!("`answerKey` {key} is none of {}", labels.join(", ")))?;
                let context = if self == Self::Arc { format!("Question: {stem}\nAnswer:") } else { stem.to_string() };
                Question::choice(&context, texts.iter().map(|text| format!(" {text}")), correct)
            }
            Self::Race => return race(fields),
            Self::Mmlu => {
                let question = fields.text(&["question"])?.trim();
                let choices = match row.fields.contains_key("choices") {
                    true => fields.list("choices")?,
                    false => ["A", "B", "C", "D"]
                        .map(|letter| fields.text(&[letter]).map(String::from))
                        .into_iter()
                        .collect::<Result<_, _>>()?,
                };
                let letters = ["A", "B", "C", "D"];
                if choices.len() != letters.len() {
                    return Err(format!("{} choices instead of 4", choices.len()));
                }
                let listed: Vec<_> =
                    letters.iter().zip(&choices).map(|(letter, choice)| format!("{letter}. {choice}\n")).collect();
                let context = format!("{question}\n{}Answer:", listed.concat());
                Question::choice(&context, letters.map(|letter| format!(" {letter}")), fields.index(&["answer"], 0)?)
            }
            Self::NaturalQuestions => Question::Open { prompt: open_prompt(fields)?, answers: fields.list("answer")? },
            Self::TriviaQa => {
                let answer = row.fields.get("answer").or_else(|| row.fields.get("Answer")).and_then(Value::as_object);
                let answer = Fields(answer.ok_or("`answer` is missing or no object")?);
                let value = answer.text(&["value", "Value"])?.to_string();
                let aliases = ["aliases", "Aliases", "normalized_aliases", "NormalizedAliases"];
                let aliases = aliases.iter().filter_map(|name| answer.list(name).ok()).flatten();
                Question::Open {
                    prompt: open_prompt(fields)?,
                    answers: std::iter::once(value).chain(aliases).collect(),
                }
            }
            Self::Gsm8k => {
                let solution = fields.text(&["answer"])?;
                answer::number(solution).ok_or("`answer` has no number")?;
                let prompt = format!("Question: {}\nAnswer:", fields.text(&["question"])?);
                Question::Open { prompt, answers: vec![solution.to_string()] }
            }
            Self::Math => {
                let solution = fields.text(&["solution"])?;
                math::answer(solution).ok_or("`solution` has no \\boxed answer")?;
                let prompt = format!("Problem:\n{}\n\nSolution:", fields.text(&["problem"])?);
                Question::Open { prompt, answers: vec![solution.to_string()] }
            }
            Self::HumanEval => {
                let (prompt, entry) =
                    (fields.text(&["prompt"])?.trim_end().to_string(), fields.text(&["entry_point"])?);
                let after = format!("\n{}\ncheck({entry})\n", fields.text(&["test"])?);
                let solution = format!("\n{}", fields.text(&["canonical_solution"])?);
                Question::Program { before: prompt.clone(), prompt, solution, after }
            }
            Self::Mbpp => {
                let tests = fields.list("test_list")?.join("\n");
                let setup = fields.text(&["test_setup_code"]).unwrap_or_default();
                // Austin et al., figure 1.
                let prompt = format!(
                    "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
                    fields.text(&["text", "prompt"])?
                );
                let solution = format!("{}\n[DONE]", fields.text(&["code"])?);
                Question::Program { prompt, solution, before: String::new(), after: format!("\n{setup}\n{tests}\n") }
            }
            Self::WinoGender => winogender::question(fields)?,
            Self::CrowsPairs => {
                let sentences = [fields.text(&["sent_more"])?, fields.text(&["sent_less"])?];
                Question::choice("", sentences, 0)
            }
        };
        match &question {
            Question::Choice { candidates, correct } if *correct >= candidates.len() => {
                Err(format!("the answer is number {correct} of {}, from 0", candidates.len()))
            }
            Question::Open { answers, .. } if answers.is_empty() => Err("there is no answer".into()),
            _ => Ok(vec![question]),
        }
    }

    /// What a row's results are also given by: MMLU's subjects, RACE's schools, kinds of mathematics, pronouns and bias.
    pub(super) fn groups(self, row: &Row) -> Vec<String> {
        let field = |name: &str| row.fields.get(name).and_then(Value::as_str).map(String::from);
        let group = match self {
            Self::Mmlu => field("subject").or_else(|| {
                let suffix = ["_test", "_dev", "_val"].iter().find_map(|end| row.stem.strip_suffix(end));
                Some(suffix.unwrap_or(&row.stem).to_string())
            }),
            Self::Race => field("example_id").or_else(|| field("id")).and_then(|id| {
                ["middle", "high"].iter().find(|school| id.starts_with(**school)).map(|school| school.to_string())
            }),
            Self::Math => field("type"),
            Self::CrowsPairs => field("bias_type"),
            Self::WinoGender => return winogender::groups(Fields(&row.fields)),
            _ => None,
        };
        group.into_iter().collect()
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|task| task.name() == name);
        found.ok_or_else(|| format!("`{name}` is no task: choose one of {}", names()))
    }
}

fn open_prompt(fields: Fields) -> Result<String, String> {
    Ok(format!("Q: {}?\nA:", fields.text(&["question", "Question"])?.trim_end_matches('?')))
}

/// Original files have all questions of an article in a row, others one.
fn race(fields: Fields) -> Result<Vec<Question>, String> {
    let article = fields.text(&["article"])?;
    let ask = |question: &str, options: &[String], answer: &str| {
        let context = format!("Article:\n{article}\n\nQ: {question}\n\nA:");
        let correct = answer.bytes().next().and_then(|letter| usize::from(letter).checked_sub(usize::from(b'A')));
        match correct.filter(|correct| *correct < options.len()) {
            Some(correct) => Ok(Question::choice(&context, options.iter().map(|option| format!(" {option}")), correct)),
            None => Err(format!("answer `{answer}` of {} options", options.len())),
        }
    };
    if fields.0.contains_key("question") {
        let options = fields.list("options")?;
        return Ok(vec![ask(fields.text(&["question"])?, &options, fields.text(&["answer"])?)?]);
    }
    let (questions, answers) = (fields.list("questions")?, fields.list("answers")?);
    let options = fields.0.get("options").and_then(Value::as_array).ok_or("`options` is missing or no list")?;
    if questions.len() != answers.len() || questions.len() != options.len() {
        let (questions, answers, options) = (questions.len(), answers.len(), options.len());
        return Err(format!("{questions} questions, {answers} answers and {options} lists of options"));
    }
    let each = questions.iter().zip(&answers).zip(options);
    each.map(|((question, answer), options)| {
        let options: Option<Vec<String>> =
            options.as_array().and_then(|list| list.iter().map(|text| text.as_str().map(String::from)).collect());
        ask(question, &options.ok_or("`options` has what is no list of texts")?, answer)
    })
    .collect()
}
