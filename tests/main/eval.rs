//! Evaluation from files to a report, with a model that is small and knows nothing: what is scored and counted must be what the engine
//! says of the same texts.

use std::path::{Path, PathBuf};

use llama::Engine;
use llama::data::NoProgress;
use llama::data::tokenizer::Tokenizer;
use llama::eval::{self, Answered, EvalOptions, EvalReport, Task};
use llama::model::generate::{GenerateOptions, Sampling, ScoreRequest};
use llama::model::{LlamaConfig, hf};
use serde_json::{Value, json};

use crate::behaviour::small;
use crate::support::device;

struct Place {
    folder: tempfile::TempDir,
    engine: Engine,
}

impl Place {
    fn new() -> Self {
        Self::with_weights(5)
    }

    fn with_weights(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = LlamaConfig { vocab_size: 259, max_seq_len: 256, tied_head: false, ..small() };
        let model = config.init::<burn::backend::Flex>(seed, &Default::default()).unwrap();
        let path = folder.path().join("model");
        hf::save(&model, &config, &path).unwrap();
        Tokenizer::bytes().save(&path.join("tokenizer.model")).unwrap();
        let engine = Engine::open(&path, device().into()).unwrap();
        Self { folder, engine }
    }

    fn file(&self, name: &str, rows: &[Value]) -> PathBuf {
        let path = self.folder.path().join(name);
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(&path, lines).unwrap();
        path
    }

    fn run(&self, task: Task, data: &Path, options: &EvalOptions) -> (EvalReport, Vec<Answered>) {
        let mut all = Vec::new();
        let each = |answered: &Answered| all.push(answered.clone());
        let report = eval::evaluate(&self.engine, task, &[data.into()], options, &NoProgress, each).unwrap();
        (report, all)
    }

    fn fails(&self, task: Task, data: &[PathBuf], options: &EvalOptions) -> String {
        eval::evaluate(&self.engine, task, data, options, &NoProgress, |_| ()).unwrap_err().to_string()
    }

    /// Log-likelihood of a completion, alone.
    fn log_likelihood(&self, context: &str, completion: &str) -> f64 {
        let tokens = self.engine.codec().encode_prompt(&format!("{context}{completion}"));
        let from = self.engine.codec().encode_prompt(context).len();
        self.engine.score(&[ScoreRequest { tokens, from }]).unwrap()[0].iter().map(|x| f64::from(*x)).sum()
    }
}

fn best(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, new| if values[new] > values[best] { new } else { best })
}

#[test]
fn completions_are_chosen_by_the_papers_rules() {
    let place = Place::new();
    let solutions = ["a", "pour it all into one large bowl and wait", "stir"];
    let pairs = [(0, 1), (0, 2), (2, 1), (1, 0)].map(|(a, b)| (solutions[a], solutions[b]));
    let rows: Vec<Value> =
        pairs.iter().map(|(a, b)| json!({"goal": "Mix", "sol1": a, "sol2": b, "label": 1})).collect();
    let path = place.file("piqa.jsonl", &rows);
    let (report, all) = place.run(Task::Piqa, &path, &EvalOptions::default());
    let [mut sum, mut by_character] = [0; 2];
    for ((a, b), answered) in pairs.iter().zip(&all) {
        let expected = [a, b].map(|text| place.log_likelihood("Question: Mix\nAnswer:", &format!(" {text}")));
        for (found, expected) in answered.log_likelihoods.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-3 * expected.abs(), "{found} {expected}");
        }
        let each = [expected[0] / a.len() as f64, expected[1] / b.len() as f64];
        sum += u64::from(best(&expected) == 1);
        by_character += u64::from(best(&each) == 1);
        assert_eq!((answered.answer.as_str(), answered.correct), ([*a, *b][best(&each)], best(&each) == 1));
    }
    assert_eq!(report.result.questions, 4);
    assert_eq!((report.by_sum.unwrap().correct, report.by_character.unwrap().correct), (sum, by_character));
    assert_eq!((report.result.correct, report.cut), (by_character, 0));
    assert!(sum != by_character, "the rules differ on these");

    // BoolQ: by what the answer's likelihood is without the question.
    let questions: Vec<String> = (0..6).map(|n| format!("is it number {n}")).collect();
    let rows: Vec<Value> =
        questions.iter().map(|question| json!({"passage": "It.", "question": question, "answer": true})).collect();
    let (report, all) = place.run(Task::BoolQ, &place.file("boolq.jsonl", &rows), &EvalOptions::default());
    for (question, answered) in questions.iter().zip(&all) {
        let context = format!("It.\nQuestion: {question}?\nAnswer:");
        let values =
            [" no", " yes"].map(|text| place.log_likelihood(&context, text) - place.log_likelihood("Answer:", text));
        assert_eq!(answered.answer, ["no", "yes"][best(&values)]);
    }
    assert_eq!(report.result.correct, all.iter().filter(|answered| answered.correct).count() as u64);

    // CrowS-Pairs has no context: by perplexity, after BOS.
    let rows = [json!({"sent_more": "He is.", "sent_less": "She is a very old friend.", "bias_type": "age"})];
    let (report, all) = place.run(Task::CrowsPairs, &place.file("pairs.jsonl", &rows), &EvalOptions::default());
    let each = ["He is.", "She is a very old friend."]
        .map(|text| place.log_likelihood("", text) / place.engine.codec().encode(text).len() as f64);
    assert_eq!((all[0].correct, report.groups["age"].questions), (best(&each) == 0, 1));
}

#[test]
fn examples_come_before_questions() {
    let place = Place::new();
    let row = |question: &str, subject: &str, answer: usize| json!({"question": question, "choices": ["1", "2", "3", "4"], "answer": answer, "subject": subject});
    let test = place.file("test.jsonl", &[row("One?", "anatomy", 0), row("Two?", "virology", 1)]);
    let shots = [row("Ex?", "virology", 3), row("Em?", "anatomy", 2), row("No?", "anatomy", 1)];
    let options = EvalOptions { shots: 1, shots_from: Some(place.file("dev.jsonl", &shots)), ..Default::default() };
    let (report, all) = place.run(Task::Mmlu, &test, &options);
    let listed = "1\nB. 2\nC. 3\nD. 4\nAnswer:";
    for (answered, (subject, example, letter, question)) in
        all.iter().zip([("anatomy", "Em?", "C", "One?"), ("virology", "Ex?", "D", "Two?")])
    {
        let context = format!(
            "The following are multiple choice questions (with answers) about {subject}.\n\n{example}\nA. {listed} {letter}\n\n{question}\nA. {listed}"
        );
        let expected = [" A", " B", " C", " D"].map(|letter| place.log_likelihood(&context, letter));
        for (found, expected) in answered.log_likelihoods.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-3 * expected.abs(), "{found} {expected}");
        }
        assert_eq!(answered.groups, [subject]);
    }
    assert_eq!(report.groups.len(), 2);
    // Texts that are too long lose their beginning, and it is said.
    let long = place.file("long.jsonl", &[row(&"long ".repeat(80), "anatomy", 0)]);
    assert_eq!(place.run(Task::Mmlu, &long, &EvalOptions::default()).0.cut, 4);

    let many = EvalOptions { shots: 2, ..options.clone() };
    assert!(
        place.fails(Task::Mmlu, std::slice::from_ref(&test), &many).contains("1 examples of virology instead of 2")
    );
    let from_nowhere = EvalOptions { shots_from: None, ..options };
    assert!(place.fails(Task::Mmlu, std::slice::from_ref(&test), &from_nowhere).contains("which file"));
    assert!(
        place.fails(Task::Mmlu, &[place.file("none.jsonl", &[])], &EvalOptions::default()).contains("no questions")
    );
    let empty = json!({"article": "None.", "questions": [], "answers": [], "options": []});
    assert!(
        place
            .fails(Task::Race, &[place.file("race.jsonl", &[empty])], &EvalOptions::default())
            .contains("no questions")
    );
    let error = place.fails(Task::Piqa, &[test], &EvalOptions::default());
    assert!(error.contains("test.jsonl: line 1: `goal`") && error.contains("piqa"), "{error}");
}

#[test]
fn answers_are_generated_and_compared() {
    let greedy =
        |max_new_tokens| GenerateOptions { max_new_tokens, sampling: Sampling::greedy(), ..Default::default() };
    let stops = ["\n", ".", ","].map(String::from);
    let prompt = "Answer these questions:\nQ: who is it?\nA:";
    // Weights that say something that has letters after normalisation.
    let answered = (0..30).find_map(|seed| {
        let place = Place::with_weights(seed);
        let said = place.engine.complete(&[prompt], greedy(8), &stops).unwrap().remove(0).trim().to_string();
        said.chars().any(char::is_alphanumeric).then_some((place, said))
    });
    let (place, said) = answered.expect("some weights say something");
    let question = "who is it";
    let rows = [
        json!({"question": question, "answer": ["no one", said.to_uppercase()]}),
        json!({"question": question, "answer": ["no one"]}),
    ];
    let options = EvalOptions { max_new_tokens: Some(8), ..Default::default() };
    let (report, all) = place.run(Task::NaturalQuestions, &place.file("nq.jsonl", &rows), &options);
    assert_eq!((report.result.correct, report.result.questions, report.by_sum), (1, 2, None));
    assert_eq!((all[0].answer.as_str(), all[0].correct, all[1].correct), (said.as_str(), true, false));

    // A number is drawn from what is generated; several samples are one question.
    let rows = [json!({"question": "How many?", "answer": "#### 7"}), json!({"question": "How much?", "answer": "8"})];
    let path = place.file("gsm8k.jsonl", &rows);
    for samples in [1, 3] {
        let options = EvalOptions { samples, max_new_tokens: Some(12), limit: Some(1), ..Default::default() };
        let (report, all) = place.run(Task::Gsm8k, &path, &options);
        assert_eq!((report.result.questions, all[0].expected.as_str()), (1, "7"));
        assert_eq!(all[0].correct, all[0].answer == "7");
        assert_eq!(
            all[0].answer,
            place.run(Task::Gsm8k, &path, &options).1[0].answer,
            "the same seed, the same answer"
        );
    }
    let options = EvalOptions { max_new_tokens: Some(256), ..Default::default() };
    assert!(place.fails(Task::Gsm8k, &[path], &options).contains("no room"));
}

#[test]
fn solutions_and_programs_are_generated_and_checked() {
    let place = Place::new();
    let problem = |solution: &str| json!({"problem": "x", "solution": solution, "type": "Algebra"});
    let path = place.file("math.jsonl", &[problem("so $\\boxed{\\frac12}$"), problem("\\boxed{2}")]);
    let options = EvalOptions { max_new_tokens: Some(12), samples: 2, ..Default::default() };
    let (report, all) = place.run(Task::Math, &path, &options);
    assert_eq!((report.groups["Algebra"].questions, all[0].expected.as_str()), (2, "\\frac{1}{2}"));
    assert_eq!(all[0].correct, all[0].answer == all[0].expected);

    // What a model that knows nothing writes is after the `#`, so that any passes.
    let program = |prompt: &str, test: &str| json!({"prompt": prompt, "entry_point": "f", "canonical_solution": "", "test": test});
    let passes = program("f = 1 #", "def check(f):\n    assert f == 1");
    let rows = [passes.clone(), program("f = 1 #", "def check(f):\n    assert f == 2"), passes.clone(), passes];
    let path = place.file("humaneval.jsonl", &rows);
    let error = place.fails(Task::HumanEval, std::slice::from_ref(&path), &options);
    assert!(error.contains("--execute"), "{error}");
    let options = EvalOptions { python: Some("python3".into()), samples: 11, ..options };
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        eprintln!("skipped: there is no python3");
        return;
    }
    let nothing = EvalOptions { max_new_tokens: Some(1), ..options };
    let (report, all) = place.run(Task::HumanEval, &path, &nothing);
    assert_eq!((report.result.correct, report.result.questions, all[1].correct), (3, 4, false));
    assert_eq!(report.pass_at.keys().copied().collect::<Vec<_>>(), [1, 10]);
    let error = place.fails(Task::HumanEval, &[path], &EvalOptions { python: Some("/no/python".into()), ..nothing });
    assert!(error.contains("/no/python"), "{error}");
}

#[test]
fn perplexity_predicts_every_token_once() {
    let place = Place::new();
    let text = "The quick brown fox jumps over the lazy dog.\n".repeat(5);
    let path = place.folder.path().join("text.txt");
    std::fs::write(&path, &text).unwrap();
    let tokens = place.engine.codec().encode(&text);
    let bos = place.engine.codec().bos.unwrap();
    for window in [7, 100, 256] {
        let found = eval::perplexity(&place.engine, std::slice::from_ref(&path), window, &NoProgress).unwrap();
        assert_eq!((found.documents, found.tokens, found.words, found.bytes), (1, tokens.len() as u64, 45, 225));
        // Each window alone.
        let mut before = bos;
        let mut sum = 0.0;
        for part in tokens.chunks(window) {
            let tokens: Vec<u32> = std::iter::once(before).chain(part.iter().copied()).collect();
            let scores = place.engine.score(&[ScoreRequest { tokens, from: 1 }]).unwrap();
            sum += scores[0].iter().map(|x| f64::from(*x)).sum::<f64>();
            before = part[part.len() - 1];
        }
        assert!((found.log_likelihood - sum).abs() < 1e-3 * sum.abs(), "{} {sum}", found.log_likelihood);
        assert!((found.bits_per_byte() * 225.0 * std::f64::consts::LN_2 + sum).abs() < 1e-3 * sum.abs());
        assert!((found.per_token().ln() * tokens.len() as f64 + sum).abs() < 1e-3 * sum.abs());
        assert!((found.per_word().ln() * 45.0 + sum).abs() < 1e-3 * sum.abs());
    }
    for window in [0, 257] {
        let error =
            eval::perplexity(&place.engine, std::slice::from_ref(&path), window, &NoProgress).unwrap_err().to_string();
        assert!(error.contains("1 to 256"), "{error}");
    }
    std::fs::write(&path, "").unwrap();
    assert!(eval::perplexity(&place.engine, &[path], 8, &NoProgress).is_err());
}
