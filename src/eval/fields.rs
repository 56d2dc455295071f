//! What is in a row, with errors that name the field, and HellaSwag's ways with text.

use serde_json::{Map, Value};

/// A row's fields, with errors that name them.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The text in the first field there is.
    pub fn text(self, names: &[&str]) -> Result<&'a str, String> {
        let found = names.iter().find_map(|name| self.0.get(*name).and_then(Value::as_str));
        found.ok_or_else(|| format!("`{}` is missing or no text", names[0]))
    }

    pub fn list(self, name: &str) -> Result<Vec<String>, String> {
        let list = self.0.get(name).and_then(Value::as_array);
        let texts = list.and_then(|list| list.iter().map(|text| text.as_str().map(String::from)).collect());
        texts.ok_or_else(|| format!("`{name}` is missing or no list of texts"))
    }

    /// Texts with the space that comes before an answer.
    pub fn spaced(self, names: &[&str]) -> Result<Vec<String>, String> {
        names.iter().map(|name| self.text(&[name]).map(|text| format!(" {text}"))).collect()
    }

    /// The number of the right answer, from `first` in the file: a number, yes or no, or a letter.
    pub fn index(self, names: &[&str], first: usize) -> Result<usize, String> {
        let value = names.iter().find_map(|name| self.0.get(*name));
        let number = match value {
            Some(Value::Bool(yes)) => Some(usize::from(*yes)),
            Some(Value::Number(number)) => number.as_u64().and_then(|number| (number as usize).checked_sub(first)),
            Some(Value::String(text)) => match text.trim() {
                "True" | "true" | "yes" => Some(1),
                "False" | "false" | "no" => Some(0),
                letter if letter.len() == 1 && letter.as_bytes()[0].is_ascii_uppercase() => {
                    Some(usize::from(letter.as_bytes()[0] - b'A'))
                }
                number => number.parse::<usize>().ok().and_then(|number| number.checked_sub(first)),
            },
            _ => None,
        };
        number.ok_or_else(|| format!("`{}` does not say which answer is right", names[0]))
    }
}

/// Choices with their labels: a list of pairs, or a pair of lists.
pub(super) fn labelled(fields: Fields) -> Result<(Vec<String>, Vec<String>), String> {
    match fields.0.get("choices") {
        Some(Value::Object(lists)) => Ok((Fields(lists).list("label")?, Fields(lists).list("text")?)),
        Some(Value::Array(pairs)) => {
            let pair = |pair: &Value| {
                let pair = Fields(pair.as_object().ok_or("`choices` has what is no object")?);
                Ok((pair.text(&["label"])?.to_string(), pair.text(&["text"])?.to_string()))
            };
            pairs.iter().map(pair).collect::<Result<Vec<_>, String>>().map(|pairs| pairs.into_iter().unzip())
        }
        _ => Err("`choices` is missing".into()),
    }
}

/// HellaSwag's texts from WikiHow without their marks.
pub(super) fn wikihow(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, mark)) = rest.split_once('[') {
        let Some((_, after)) = mark.split_once(']') else { break };
        out.push_str(before);
        rest = after;
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

/// The first letter in upper case, the others in lower case.
pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars.flat_map(char::to_lowercase)).collect())
}
