//! Examples for fine-tuning, from files: conversations, instructions, prompts with their completions, or plain text.
//!
//! | a line of JSON, or a row of Parquet, has | is trained on | as |
//! | --- | --- | --- |
//! | `messages`: a list of `role` and `content` | what the assistant says | the checkpoint's chat template |
//! | `instruction`, perhaps `input`, and `output` | the output | a conversation of two turns, or Alpaca's text where there is no template |
//! | `prompt` and `completion` | the completion | text as it is |
//! | `text` | everything | a document |
//!
//! Other files are documents. All but Parquet may be compressed.

use std::path::{Path, PathBuf};

use llama_data::DataError;
use llama_data::examples::Example;
use llama_data::input::{self, Limits};
use llama_data::read::ParquetRows;
use llama_data::source::{Sources, inner_extension};
use llama_data::tokenizer::Codec;
use llama_model::generate::common_prefix;
use serde::Deserialize;

use crate::text::{Message, TextError, conversation};

/// One line or row.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Messages {
        messages: Vec<Message>,
    },
    Instruction {
        instruction: String,
        #[serde(default)]
        input: String,
        output: String,
    },
    Completion {
        prompt: String,
        completion: String,
    },
    Text {
        text: String,
    },
}

/// Reads the examples of all files and folders, those of documents in pieces of `seq_len` tokens.
///
/// # Errors
/// [`TextError::Data`] for files that cannot be read and lines that are none of these, with file and line;
/// [`TextError::Template`] for conversations that the template refuses or does not exist for.
pub fn read(paths: &[PathBuf], codec: &Codec, seq_len: usize) -> Result<Vec<Example>, TextError> {
    let mut examples = Vec::new();
    for file in Sources::new(paths).files()? {
        match inner_extension(&file.path).as_str() {
            "jsonl" | "json" => read_lines(&file.path, codec, seq_len, &mut examples)?,
            "parquet" => read_rows(&file.path, codec, seq_len, &mut examples)?,
            _ => {
                for document in file.documents()? {
                    pieces(&document?.text, codec, seq_len, &mut examples);
                }
            }
        }
    }
    Ok(examples)
}

fn read_lines(path: &Path, codec: &Codec, seq_len: usize, examples: &mut Vec<Example>) -> Result<(), TextError> {
    use std::io::BufRead;
    for (index, line) in input::open(path, Limits::default())?.lines().enumerate() {
        let at = |reason: String| DataError::format(path, format!("line {}: {reason}", index + 1));
        let line = line.map_err(|error| at(error.to_string()))?;
        if line.trim().is_empty() {
            continue;
        }
        let line = serde_json::from_str(&line).map_err(|error| match error.is_data() {
            true => at(format!("a line {MUST_HAVE}")),
            false => at(error.to_string()),
        })?;
        let named = |error: TextError| named(error, path, &format!("line {}", index + 1));
        add(line, codec, seq_len, examples).map_err(named)?;
    }
    Ok(())
}

fn read_rows(path: &Path, codec: &Codec, seq_len: usize, examples: &mut Vec<Example>) -> Result<(), TextError> {
    for (index, row) in ParquetRows::open(path)?.enumerate() {
        let place = format!("row {}", index + 1);
        let wrong = |reason: String| DataError::format(path, format!("{place}: {reason}"));
        let row = row.map_err(DataError::from)?;
        let row = serde_json::from_value(row.into()).map_err(|_| wrong(format!("a row {MUST_HAVE}")))?;
        add(row, codec, seq_len, examples).map_err(|error| named(error, path, &place))?;
    }
    Ok(())
}

const MUST_HAVE: &str = "must have `messages`, `instruction` and `output`, `prompt` and `completion`, or `text`";

/// A template's error with the file and the place in it.
fn named(error: TextError, path: &Path, place: &str) -> TextError {
    match error {
        TextError::Template(reason) => TextError::Template(format!("{}, {place}: {reason}", path.display())),
        error => error,
    }
}

/// Adds the examples of a line.
fn add(line: Line, codec: &Codec, seq_len: usize, examples: &mut Vec<Example>) -> Result<(), TextError> {
    match line {
        Line::Text { text } => pieces(&text, codec, seq_len, examples),
        Line::Messages { messages } => examples.push(answers(&messages, codec)?),
        Line::Completion { prompt, completion } => examples.push(completed(&prompt, &completion, codec)),
        Line::Instruction { instruction, input, output } => {
            examples.push(instructed(&instruction, &input, &output, codec)?);
        }
    }
    Ok(())
}

/// A conversation, of which what the assistant says is trained on, with the token that ends its turn.
///
/// # Errors
/// [`TextError::Template`].
pub fn answers(messages: &[Message], codec: &Codec) -> Result<Example, TextError> {
    let tokens = conversation(codec, messages, false)?;
    let mut trained = vec![false; tokens.len()];
    for (turn, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
        // From where the answer would have begun to where its turn ends, by the tokens that both have.
        let start = common_prefix(&tokens, &conversation(codec, &messages[..turn], true)?);
        let end = common_prefix(&tokens, &conversation(codec, &messages[..=turn], false)?);
        let Some(answer) = tokens.get(start..end) else { continue };
        // What a template writes after the end of a turn is not said.
        let said = answer.iter().rposition(|token| Some(*token) == codec.eos).map_or(end, |last| start + last + 1);
        trained[start..said].fill(true);
    }
    Ok(Example { tokens, trained })
}

fn instructed(instruction: &str, input: &str, output: &str, codec: &Codec) -> Result<Example, TextError> {
    if codec.chat_template.is_some() {
        let asked = if input.is_empty() { instruction.to_string() } else { format!("{instruction}\n\n{input}") };
        return answers(&[Message::new("user", asked), Message::new("assistant", output)], codec);
    }
    let input = if input.is_empty() { String::new() } else { format!("### Input:\n{input}\n\n") };
    Ok(completed(&format!("### Instruction:\n{instruction}\n\n{input}### Response:\n"), output, codec))
}

/// A text of which the second part is trained on, and its end.
fn completed(prompt: &str, completion: &str, codec: &Codec) -> Example {
    let mut tokens = codec.encode_prompt(&format!("{prompt}{completion}"));
    let start = common_prefix(&tokens, &codec.encode_prompt(prompt));
    tokens.extend(codec.eos);
    let trained = (0..tokens.len()).map(|index| index >= start).collect();
    Example { tokens, trained }
}

/// A document, all of which is trained on.
fn pieces(text: &str, codec: &Codec, seq_len: usize, examples: &mut Vec<Example>) {
    let mut tokens = codec.encode_prompt(text);
    tokens.extend(codec.eos);
    // A piece begins with the last token of the one before, which was not an input yet.
    for start in (0..tokens.len().saturating_sub(1)).step_by(seq_len.max(1)) {
        let tokens = tokens[start..tokens.len().min(start + seq_len + 1)].to_vec();
        examples.push(Example { trained: vec![true; tokens.len()], tokens });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_data::tokenizer::Tokenizer;

    fn codec() -> Codec {
        let mut codec = Codec::from(Tokenizer::bytes());
        codec.chat_template = Some(
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}\
             {% if add_generation_prompt %}[assistant] {% endif %}"
                .into(),
        );
        codec
    }

    fn trained(example: &Example, codec: &Codec) -> String {
        let tokens = example.tokens.iter().zip(&example.trained).filter(|(_, trained)| **trained);
        tokens.map(|(token, _)| codec.decode_piece(*token)).collect()
    }

    fn examples(name: &str, text: &str, codec: &Codec) -> Result<Vec<Example>, TextError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&[path], codec, 8)
    }

    #[test]
    fn only_what_the_assistant_says_is_trained_on() {
        let codec = codec();
        let line = r#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No."}]}"#;
        let found = examples("a.jsonl", &line.replace('\n', " "), &codec).unwrap();
        assert_eq!(trained(&found[0], &codec), "Ho</s>No.</s>");
        let found = examples("a.jsonl", r#"{"instruction": "Add", "input": "1, 2", "output": "3"}"#, &codec).unwrap();
        assert_eq!(trained(&found[0], &codec), "3</s>");
        assert!(codec.decode(&found[0].tokens).contains("Add\n\n1, 2"));
    }

    #[test]
    fn prompts_instructions_and_text_without_a_template() {
        let codec = Codec::from(Tokenizer::bytes());
        let lines = "{\"prompt\": \"2 + 2 =\", \"completion\": \" 4\"}\n\n{\"instruction\": \"Go\", \"output\": \"Gone\"}\n\
                     {\"text\": \"0123456789\"}\n";
        let found = examples("a.jsonl", lines, &codec).unwrap();
        assert_eq!(trained(&found[0], &codec), " 4</s>");
        assert_eq!(trained(&found[1], &codec), "Gone</s>");
        assert!(codec.decode(&found[1].tokens).starts_with("### Instruction:\nGo\n\n### Response:\n"));
        // Every token of a document is the target of one piece.
        let pieces = &found[2..];
        let targets: Vec<u32> = pieces.iter().flat_map(|piece| piece.tokens[1..].to_vec()).collect();
        assert_eq!(codec.decode(&targets), "0123456789");
        assert!(pieces.iter().all(|piece| piece.tokens.len() <= 9));
        let text = examples("a.txt", "0123456789", &codec).unwrap();
        assert_eq!(text, pieces);
    }

    #[test]
    fn rows_of_a_table_are_as_lines() {
        let hub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hub");
        let codec = codec();
        let found = read(&[hub.join("chat.parquet")], &codec, 8).unwrap();
        assert_eq!(found.iter().map(|example| trained(example, &codec)).collect::<Vec<_>>(), ["2</s>", " 4</s>"]);
        let error = read(&[hub.join("arc.parquet")], &codec, 8).unwrap_err().to_string();
        assert!(error.contains("arc.parquet") && error.contains("row 1") && error.contains("messages"), "{error}");
    }

    #[test]
    fn bad_lines_are_named() {
        let codec = Codec::from(Tokenizer::bytes());
        let error = |text: &str| examples("bad.jsonl", text, &codec).unwrap_err().to_string();
        let found = error("{\"text\": \"good\"}\n{\"txt\": 1}");
        assert!(found.contains("bad.jsonl") && found.contains("line 2") && found.contains("messages"), "{found}");
        assert!(error("{\"text\": ").contains("line 1"));
        let found = error(r#"{"messages": [{"role": "user", "content": "Hi"}]}"#);
        assert!(found.contains("bad.jsonl, line 1") && found.contains("template"), "{found}");
    }
}
