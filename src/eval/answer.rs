//! Answers in text: what is taken of a generation, and when two are the same.

/// Lower case, without articles, punctuation and duplicate whitespace (section 3.2).
pub(super) fn normalized(text: &str) -> String {
    let punctuation = |c: &char| c.is_ascii_punctuation() || matches!(c, '‘' | '’' | '“' | '”' | '´' | '–' | '—');
    let kept: String = text.to_lowercase().chars().filter(|c| !punctuation(c)).collect();
    let words = kept.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the"));
    words.collect::<Vec<_>>().join(" ")
}

/// Whether a generation is one of the accepted answers, after normalisation.
pub(super) fn matches(generated: &str, accepted: &[String]) -> bool {
    let generated = normalized(generated);
    accepted.iter().any(|answer| normalized(answer) == generated)
}

/// The number that a worked solution ends in: after `####`, GSM8k's mark, or else the last one there is.
pub(super) fn number(solution: &str) -> Option<String> {
    let marked = solution.split_once("####").and_then(|(_, rest)| numbers(rest).next());
    let found = marked.or_else(|| numbers(solution).last())?;
    // 18, 18.0 and 18.00 are one number.
    let found = match found.split_once('.') {
        Some((whole, decimals)) if decimals.bytes().all(|digit| digit == b'0') => whole.to_string(),
        _ => found,
    };
    Some(found)
}

/// The numbers in a text without their commas, `-12`, `1,000` or `2.50`.
fn numbers(text: &str) -> impl Iterator<Item = String> + '_ {
    let part_of_number = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',' | '-');
    let parts = text.split(move |c| !part_of_number(c));
    parts.filter_map(|part| {
        let part = part.trim_matches(|c| matches!(c, '.' | ','));
        let digits = part.strip_prefix('-').unwrap_or(part).replace(',', "");
        // `2-1` and `1.2.3` are no numbers; of a range, the end is.
        let last = digits.rsplit('-').next().unwrap_or_default().trim_matches('.').to_string();
        let number = last.parse::<f64>().is_ok() && last.starts_with(|c: char| c.is_ascii_digit());
        let negative = part.starts_with('-') && !digits.contains('-');
        number.then(|| if negative { format!("-{last}") } else { last })
    })
}

/// The answer that most samples gave; of equally frequent ones the one that came first.
pub(super) fn majority(answers: &[Option<String>]) -> Option<&String> {
    let given: Vec<&String> = answers.iter().flatten().collect();
    let votes = |answer: &String| given.iter().filter(|other| **other == answer).count();
    let most = given.iter().map(|answer| votes(answer)).max()?;
    given.iter().find(|answer| votes(answer) == most).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_as_the_paper_does() {
        let accepted = ["The United States of America".to_string(), "U.S.A.".into()];
        for (given, same) in [
            (" united states  of america", true),
            ("A United States of America!", true),
            ("USA", true),
            ("United States", false),
            ("", false),
        ] {
            assert_eq!(matches(given, &accepted), same, "{given}");
        }
    }

    #[test]
    fn a_solution_ends_in_its_number() {
        for (solution, expected) in [
            ("16 - 3 = <<16-3=13>>13\n#### 18", Some("18")),
            ("It costs $1,234.00.", Some("1234")),
            ("#### -5.\nQuestion: 7", Some("-5")),
            ("between 3-4", Some("4")),
            ("about 2.50, she said, not 1.5.", Some("1.5")),
            ("#### none, but 12 before", Some("12")),
            ("no number", None),
            ("-", None),
            ("...,,,", None),
        ] {
            assert_eq!(number(solution).as_deref(), expected, "{solution}");
        }
    }

    #[test]
    fn most_votes_win_and_the_first_of_equals() {
        let votes = |answers: &[&str]| {
            let answers: Vec<_> = answers.iter().map(|a| (!a.is_empty()).then(|| a.to_string())).collect();
            majority(&answers).cloned()
        };
        assert_eq!(votes(&["", "3", "4", "4"]).as_deref(), Some("4"));
        assert_eq!(votes(&["5", "4", "4", "5"]).as_deref(), Some("5"));
        assert_eq!(votes(&["", ""]), None);
    }
}
