//! Rows as the benchmarks' authors publish them and as the hub has them (content is made up), and the text a model is asked with.

use proptest::prelude::*;
use serde_json::json;

use super::Task;
use super::question::{Candidate, Question};
use super::read::{Row, rows};

fn row(fields: serde_json::Value) -> Row {
    let serde_json::Value::Object(fields) = fields else { panic!("not an object") };
    Row { fields, stem: "college_physics_test".into(), path: "file".into(), place: "line 1".into() }
}

fn one(task: Task, fields: serde_json::Value) -> Question {
    let [question] = <[Question; 1]>::try_from(task.questions(&row(fields)).unwrap()).unwrap();
    question
}

fn choice(context: &str, completions: &[&str], correct: usize) -> Question {
    let candidate = |text: &&str| Candidate { context: context.into(), completion: text.to_string() };
    Question::Choice { candidates: completions.iter().map(candidate).collect(), correct }
}

#[test]
fn commonsense() {
    let expected = choice("Ice is cold.\nQuestion: is ice cold?\nAnswer:", &[" no", " yes"], 1);
    let boolq = json!({"passage": "Ice is cold.", "question": "is ice cold"});
    for (field, value) in [("answer", json!(true)), ("label", json!(1)), ("label", json!("True"))] {
        let mut fields = boolq.clone();
        fields[field] = value;
        assert_eq!(one(Task::BoolQ, fields), expected);
    }
    let fields = json!({"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use rain", "label": 0});
    assert_eq!(one(Task::Piqa, fields), choice("Question: Dry a cup\nAnswer:", &[" Use a towel", " Use rain"], 0));
    let fields = json!({"context": "Al ran.", "question": "How is Al?", "answerA": "asleep", "answerB": "tired", "answerC": "a cat", "label": "2"});
    assert_eq!(one(Task::Siqa, fields), choice("Q: Al ran. How is Al?\nA:", &[" asleep", " tired", " a cat"], 1));
    let fields = json!({
        "activity_label": "Baking", "ctx_a": "A man [step] bakes.", "ctx_b": "then he", "label": "1",
        "endings": ["eats [title] Rests", "sleeps  well."],
    });
    assert_eq!(
        one(Task::HellaSwag, fields),
        choice("Baking: A man bakes. Then he", &[" eats. Rests", " sleeps well."], 1)
    );
    let fields = json!({"sentence": "The jar fell on Al because _ was loose.", "option1": "the jar", "option2": "Al", "answer": "1"});
    let candidate = |option: &str| Candidate {
        context: format!("The jar fell on Al because {option}"),
        completion: " was loose.".into(),
    };
    let expected = Question::Choice { candidates: vec![candidate("the jar"), candidate("Al")], correct: 0 };
    assert_eq!(one(Task::WinoGrande, fields), expected);
}

#[test]
fn science() {
    let original = json!({"question": {"stem": "What is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]}, "answerKey": "B"});
    let hub = |name: &str| json!({name: "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"});
    for fields in [original.clone(), hub("question")] {
        assert_eq!(one(Task::Arc, fields), choice("Question: What is hot?\nAnswer:", &[" ice", " fire"], 1));
    }
    for fields in [original, hub("question_stem")] {
        assert_eq!(one(Task::OpenBookQa, fields), choice("What is hot?", &[" ice", " fire"], 1));
    }
}

#[test]
fn reading_and_subjects() {
    let context = |question: &str| format!("Article:\nAl has a dog.\n\nQ: {question}\n\nA:");
    let original = json!({
        "article": "Al has a dog.", "questions": ["What has Al?", "Al is _ ."], "answers": ["A", "B"],
        "options": [["a dog", "a cat"], ["a dog", "a man"]], "id": "high7.txt",
    });
    let expected = [
        choice(&context("What has Al?"), &[" a dog", " a cat"], 0),
        choice(&context("Al is _ ."), &[" a dog", " a man"], 1),
    ];
    assert_eq!(Task::Race.questions(&row(original.clone())).unwrap(), expected);
    assert_eq!(Task::Race.groups(&row(original)), ["high"]);
    let hub =
        json!({"article": "Al has a dog.", "question": "What has Al?", "options": ["a dog", "a cat"], "answer": "A"});
    assert_eq!(one(Task::Race, hub), expected[0]);

    let expected = choice("2 + 2 = ?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:", &[" A", " B", " C", " D"], 1);
    let table = json!({"question": "2 + 2 = ?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"});
    assert_eq!(Task::Mmlu.groups(&row(table.clone())), ["college_physics"]);
    let hub = json!({"question": "2 + 2 = ?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "anatomy"});
    assert_eq!(Task::Mmlu.groups(&row(hub.clone())), ["anatomy"]);
    for fields in [table, hub] {
        let question = one(Task::Mmlu, fields);
        assert_eq!(question, expected);
        assert!(question.solved().ends_with("\nAnswer: B"));
    }
    let preamble = Task::Mmlu.preamble(Some("college_physics"));
    assert_eq!(preamble, "The following are multiple choice questions (with answers) about college physics.\n\n");
}

#[test]
fn open_questions() {
    let open = |prompt: &str, answers: &[&str]| Question::Open {
        prompt: prompt.into(),
        answers: answers.iter().map(|answer| answer.to_string()).collect(),
    };
    let fields = json!({"question": "who wrote it", "answer": ["Al", "Alan"]});
    let question = one(Task::NaturalQuestions, fields);
    assert_eq!(question, open("Q: who wrote it?\nA:", &["Al", "Alan"]));
    assert_eq!(question.solved(), "Q: who wrote it?\nA: Al");
    let expected = open("Q: Who wrote it?\nA:", &["Al", "Alan", "al"]);
    let hub = json!({"question": "Who wrote it?", "answer": {"value": "Al", "aliases": ["Alan"], "normalized_aliases": ["al"]}});
    let original = json!({"Question": "Who wrote it?", "Answer": {"Value": "Al", "Aliases": ["Alan"], "NormalizedAliases": ["al"]}});
    for fields in [hub, original] {
        assert_eq!(one(Task::TriviaQa, fields), expected);
    }
    let fields = json!({"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"});
    assert_eq!(one(Task::Gsm8k, fields), open("Question: Two and two?\nAnswer:", &["2 + 2 = 4\n#### 4"]));
    let fields = json!({"sent_more": "One.", "sent_less": "Other.", "bias_type": "age"});
    assert_eq!(Task::CrowsPairs.groups(&row(fields.clone())), ["age"]);
    assert_eq!(one(Task::CrowsPairs, fields), choice("", &["One.", "Other."], 0));
}

#[test]
fn mathematics_and_programs() {
    let fields =
        json!({"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"});
    assert_eq!(Task::Math.groups(&row(fields.clone())), ["Algebra"]);
    let expected = Question::Open {
        prompt: "Problem:\nWhat is $1+1$?\n\nSolution:".into(),
        answers: vec!["It is $\\boxed{2}$.".into()],
    };
    assert_eq!(one(Task::Math, fields), expected);

    let fields = json!({
        "task_id": "HumanEval/0", "prompt": "def one():\n    \"\"\"Returns 1.\"\"\"\n", "entry_point": "one",
        "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n",
    });
    let question = one(Task::HumanEval, fields);
    assert_eq!(question.solved(), "def one():\n    \"\"\"Returns 1.\"\"\"\n    return 1\n");
    let Question::Program { prompt, solution, before, after } = question else { panic!("not a program") };
    assert_eq!(prompt, before);
    assert_eq!(
        format!("{before}{solution}{after}"),
        "def one():\n    \"\"\"Returns 1.\"\"\"\n    return 1\n\ndef check(f):\n    assert f() == 1\n\ncheck(one)\n"
    );

    let original = json!({
        "text": "Write one.", "code": "def one():\n    return 1", "task_id": 11, "test_setup_code": "import math",
        "test_list": ["assert one() == 1", "assert one() < math.pi"], "challenge_test_list": [],
    });
    let mut sanitized = original.clone();
    sanitized["prompt"] = sanitized["text"].take();
    for fields in [original, sanitized] {
        let question = one(Task::Mbpp, fields);
        assert!(question.solved().ends_with("[BEGIN]\ndef one():\n    return 1\n[DONE]"), "{}", question.solved());
        let Question::Program { prompt, before, after, .. } = question else { panic!("not a program") };
        assert!(prompt.contains("task: Write one. Your code") && prompt.contains("== 1\nassert"), "{prompt}");
        assert_eq!(
            (before.as_str(), after.as_str()),
            ("", "\nimport math\nassert one() == 1\nassert one() < math.pi\n")
        );
    }
}

#[test]
fn pronouns() {
    let sentence =
        |name: &str, text: &str, percent: &str| json!({"sentid": name, "sentence": text, "bls_pct_female": percent});
    let fields =
        sentence("nurse.patient.0.male.txt", "The nurse notified the patient that his shift was over.", "90.0");
    let context = "The nurse notified the patient that his shift was over. \u{2018}His\u{2019} refers to";
    assert_eq!(one(Task::WinoGender, fields.clone()), choice(context, &[" the nurse", " the patient"], 0));
    assert_eq!(Task::WinoGender.groups(&row(fields)), ["his/him/he", "his/him/he (gotcha)"]);
    let fields = sentence("nurse.someone.1.neutral.txt", "The nurse told someone they could go.", "90.0");
    let context = "The nurse told someone they could go. \u{2018}They\u{2019} refers to";
    assert_eq!(one(Task::WinoGender, fields.clone()), choice(context, &[" the nurse", " someone"], 1));
    assert_eq!(Task::WinoGender.groups(&row(fields)), ["their/them/someone"]);
    for (name, percent, groups) in [
        ("nurse.patient.0.female.txt", "90", &["her/her/she"][..]),
        ("nurse.patient.1.male.txt", "90", &["his/him/he"]),
        ("pilot.passenger.0.female.txt", "10", &["her/her/she", "her/her/she (gotcha)"]),
    ] {
        assert_eq!(Task::WinoGender.groups(&row(sentence(name, "", percent))), groups);
    }
}

#[test]
fn rows_that_are_wrong_name_the_field() {
    for (task, fields, reason) in [
        (Task::Piqa, json!({"goal": "x", "sol1": "y"}), "`sol2` is missing"),
        (Task::Piqa, json!({"goal": "x", "sol1": "y", "sol2": "z"}), "`label` does not say"),
        (Task::Piqa, json!({"goal": "x", "sol1": "y", "sol2": "z", "label": 2}), "number 2 of 2"),
        (
            Task::Siqa,
            json!({"context": "", "question": "", "answerA": "", "answerB": "", "answerC": "", "label": "0"}),
            "`label`",
        ),
        (Task::WinoGrande, json!({"sentence": "no gap"}), "no `_`"),
        (
            Task::Arc,
            json!({"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"}),
            "E is none of A",
        ),
        (Task::Arc, json!({"question": "x", "answerKey": "A"}), "`choices` is missing"),
        (
            Task::Race,
            json!({"article": "x", "questions": ["y"], "answers": [], "options": []}),
            "1 questions, 0 answers",
        ),
        (
            Task::Race,
            json!({"article": "x", "question": "y", "answer": "C", "options": ["a", "b"]}),
            "`C` of 2 options",
        ),
        (Task::Mmlu, json!({"question": "x", "choices": ["a"], "answer": 0}), "1 choices"),
        (Task::NaturalQuestions, json!({"question": "x", "answer": []}), "no answer"),
        (Task::TriviaQa, json!({"question": "x", "answer": "y"}), "`answer`"),
        (Task::Gsm8k, json!({"question": "x", "answer": "none"}), "no number"),
        (Task::Math, json!({"problem": "x", "solution": "two\nlines"}), "no \\boxed"),
        (Task::HumanEval, json!({"prompt": "x", "entry_point": "y", "test": "z"}), "`canonical_solution` is missing"),
        (Task::Mbpp, json!({"text": "x", "code": "y"}), "`test_list` is missing"),
        (Task::WinoGender, json!({"sentid": "a.b", "sentence": "x"}), "a.b is not"),
        (Task::WinoGender, json!({"sentid": "a.b.2.male.txt", "sentence": "he"}), "answer 2"),
        (Task::WinoGender, json!({"sentid": "a.b.1.none.txt", "sentence": "he"}), "gender none"),
        (Task::WinoGender, json!({"sentid": "a.b.1.male.txt", "sentence": "she"}), "none of his"),
    ] {
        let error = task.questions(&row(fields)).unwrap_err();
        assert!(error.contains(reason), "{task}: {error}");
    }
    assert!("hellaswap".parse::<Task>().unwrap_err().contains("hellaswag"));
    for task in Task::ALL {
        assert_eq!(task.to_string().parse::<Task>().unwrap(), task);
    }
}

#[test]
fn files_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    let lines = write("a/dev.jsonl", "{\"goal\": \"x\"}\n\n{\"goal\": \"y\"}\n");
    let labels = write("a/dev-labels.lst", "1\n0\n");
    let found = rows(&lines).unwrap();
    assert_eq!((found[1].fields["label"].as_str(), found[1].place.as_str()), (Some("0"), "line 3"));
    std::fs::write(&labels, "1\n").unwrap();
    assert!(rows(&lines).unwrap_err().to_string().contains("1 labels for the 2 rows"));

    let table = write("mmlu/anatomy_test.csv", "\"Which, of these?\",a,\"b\"\"b\",c,d,B\nNext?,a,b,c,d,A\n");
    let found = rows(&table).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!((&found[0].fields["question"], &found[0].fields["B"]), (&json!("Which, of these?"), &json!("b\"b")));
    let named = write("crows.csv", ",sent_more,sent_less,bias_type\n0,\"One, two\",Three,age\n");
    assert_eq!(rows(&named).unwrap()[0].fields["sent_more"], json!("One, two"));
    let sentences = write(
        "gender/all_sentences.tsv",
        "sentid\tsentence\npilot.passenger.0.male.txt\tThe pilot said he \"flew\".\n",
    );
    write(
        "gender/occupations-stats.tsv",
        "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\npilot\t1\t5.5\t2015\n",
    );
    let found = rows(&sentences).unwrap();
    assert_eq!(
        (&found[0].fields["sentence"], &found[0].fields["bls_pct_female"]),
        (&json!("The pilot said he \"flew\"."), &json!("5.5"))
    );
    write("mmlu/notes.md", "not data");
    write("mmlu/b_test.csv", "Next?,a,b,c,d,A\n");
    assert_eq!(
        rows(&folder.path().join("mmlu")).unwrap().iter().map(|row| row.stem.as_str()).collect::<Vec<_>>(),
        ["anatomy_test", "anatomy_test", "b_test"]
    );

    // As the hub has it: a table with a structure of lists.
    let hub = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hub/arc.parquet");
    let found = rows(&hub).unwrap();
    assert_eq!((found.len(), found[1].place.as_str(), found[1].stem.as_str()), (2, "row 2", "arc"));
    let expected = choice("Question: What is hot?\nAnswer:", &[" ice", " fire"], 1);
    assert_eq!(Task::Arc.questions(&found[0]).unwrap(), [expected]);

    let trivia = write("trivia.json", "{\"Data\": [{\"Question\": \"x\"}], \"Version\": 1}");
    assert_eq!(rows(&trivia).unwrap()[0].fields["Question"], json!("x"));
    let list = write("list.json", "[{\"question\": \"x\"}, 3]");
    assert!(rows(&list).unwrap_err().to_string().contains("entry 2: not a JSON object"));
    let broken = write("broken.jsonl", "{\"a\": 1}\n{");
    assert!(rows(&broken).unwrap_err().to_string().contains("line 2"));
    let damaged = write("data.parquet", "PAR1");
    assert!(rows(&damaged).unwrap_err().to_string().contains("data.parquet"));
    let other = write("data.arrow", "ARROW1");
    assert!(rows(&other).unwrap_err().to_string().contains(".jsonl"));
    assert!(rows(&folder.path().join("nothing.jsonl")).unwrap_err().to_string().contains("nothing.jsonl"));
}

/// Values that fields have, in their place or not.
fn value() -> impl Strategy<Value = serde_json::Value> {
    let text = "[\\[\\]_#A-E0-9.,\\- é]{0,12}";
    let texts = prop::collection::vec(text, 0..5);
    prop_oneof![
        text.prop_map(|text| json!(text)),
        any::<i64>().prop_map(|number| json!(number)),
        any::<bool>().prop_map(|yes| json!(yes)),
        texts.clone().prop_map(|list| json!(list)),
        prop::collection::vec(texts.clone(), 0..3).prop_map(|lists| json!(lists)),
        (texts.clone(), texts)
            .prop_map(|(text, label)| json!({"text": text, "label": label, "value": "x", "aliases": text})),
        (text, text).prop_map(|(stem, label)| json!({"stem": stem, "choices": [{"text": stem, "label": label}]})),
    ]
}

const FIELDS: [&str; 43] = [
    "question",
    "passage",
    "answer",
    "label",
    "goal",
    "sol1",
    "sol2",
    "context",
    "answerA",
    "answerB",
    "answerC",
    "activity_label",
    "ctx_a",
    "ctx_b",
    "endings",
    "sentence",
    "option1",
    "option2",
    "answerKey",
    "choices",
    "question_stem",
    "article",
    "questions",
    "answers",
    "options",
    "A",
    "B",
    "C",
    "D",
    "Question",
    "Answer",
    "sent_more",
    "sent_less",
    "problem",
    "solution",
    "prompt",
    "entry_point",
    "canonical_solution",
    "test",
    "text",
    "test_list",
    "sentid",
    "bls_pct_female",
];

proptest! {
    /// Whatever a row has, it is questions with an answer among the candidates, or an error.
    #[test]
    fn no_row_is_too_strange(fields in prop::collection::vec((prop::sample::select(&FIELDS[..]), value()), 0..12)) {
        let fields: serde_json::Map<_, _> = fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        let row = row(serde_json::Value::Object(fields));
        for task in Task::ALL {
            for question in task.questions(&row).unwrap_or_default() {
                question.solved();
            }
            task.groups(&row);
        }
    }

    #[test]
    fn no_answer_is_too_strange(text in "([#0-9.,\\- \\na-zé$’{}=/]|\\\\(boxed|frac|sqrt|text)){0,40}") {
        if let Some(number) = super::answer::number(&text) {
            prop_assert!(number.parse::<f64>().is_ok(), "{number}");
        }
        super::math::answer(&text);
        prop_assert!(super::answer::matches(&text, std::slice::from_ref(&text)));
    }
}
