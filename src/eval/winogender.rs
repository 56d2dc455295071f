//! WinoGender's sentences (Rudinger et al. 2018), asked as in section 5.2.

use super::fields::Fields;
use super::question::{Candidate, Question};

/// A sentence with its name: occupation, participant, which of them the pronoun means, and the pronoun's gender.
struct Sentence<'a> {
    text: &'a str,
    candidates: [&'a str; 2],
    correct: usize,
    pronouns: &'static [&'static str],
}

const FEMALE: &[&str] = &["her", "hers", "she"];
const MALE: &[&str] = &["his", "him", "he"];
const NEUTRAL: &[&str] = &["their", "them", "they"];

fn sentence(fields: Fields<'_>) -> Result<Sentence<'_>, String> {
    let (name, text) = (fields.text(&["sentid"])?, fields.text(&["sentence"])?);
    let [occupation, participant, answer, gender] = name.splitn(5, '.').take(4).collect::<Vec<_>>()[..] else {
        return Err(format!("`sentid` {name} is not occupation.participant.answer.gender"));
    };
    let pronouns = match gender {
        "female" => FEMALE,
        "male" => MALE,
        "neutral" => NEUTRAL,
        _ => return Err(format!("`sentid` has the gender {gender}")),
    };
    let correct = answer.parse().ok().filter(|answer| *answer < 2);
    let correct = correct.ok_or_else(|| format!("`sentid` has the answer {answer}, not 0 or 1"))?;
    Ok(Sentence { text, candidates: [occupation, participant], correct, pronouns })
}

/// Whom the pronoun refers to: the occupation, or the other.
pub(super) fn question(fields: Fields) -> Result<Question, String> {
    let Sentence { text, candidates, correct, pronouns } = sentence(fields)?;
    let mut words = text.split(|c: char| !c.is_alphabetic());
    let pronoun = words.find(|word| pronouns.contains(&word.to_lowercase().as_str()));
    let mut letters = pronoun.ok_or_else(|| format!("`sentence` has none of {}", pronouns.join(", ")))?.chars();
    let first = letters.next().map(char::to_uppercase).into_iter().flatten();
    let context = format!("{text} \u{2018}{}\u{2019} refers to", first.chain(letters).collect::<String>());
    let candidate = |name: &str| Candidate {
        context: context.clone(),
        completion: if name == "someone" { " someone".into() } else { format!(" the {name}") },
    };
    Ok(Question::Choice { candidates: candidates.map(candidate).into(), correct })
}

/// The pronouns of table 13; and "gotcha", where the occupation is meant, and most of those who have it are of the other gender.
pub(super) fn groups(fields: Fields) -> Vec<String> {
    let Ok(Sentence { correct, pronouns, .. }) = sentence(fields) else { return Vec::new() };
    let name = match pronouns {
        FEMALE => "her/her/she",
        MALE => "his/him/he",
        _ => "their/them/someone",
    };
    let mut groups = vec![name.to_string()];
    let female = fields.text(&[super::read::PERCENT_FEMALE]).ok().and_then(|percent| percent.parse::<f64>().ok());
    if let Some(female) = female
        && correct == 0
        && ((pronouns == FEMALE && female < 50.0) || (pronouns == MALE && female > 50.0))
    {
        groups.push(format!("{name} (gotcha)"));
    }
    groups
}
