//! Answers to the problems of MATH (Hendrycks et al. 2021): where a solution has its answer, and a form in which equal ones are the same.

/// The answer that a solution ends in, in one form: Minerva's last sentence, the last `\boxed`, what is between dollars, or all of a single line.
pub(super) fn answer(solution: &str) -> Option<String> {
    let said = solution.split_once("The final answer is").map(|(_, rest)| {
        let end = rest.find("I hope it is correct").or_else(|| rest.find('\n')).unwrap_or(rest.len());
        rest[..end].trim().trim_end_matches('.').trim_matches('$')
    });
    let dollars = || {
        let (first, last) = (solution.find('$')?, solution.rfind('$')?);
        (first < last).then(|| &solution[first + 1..last])
    };
    let line = || Some(solution.trim()).filter(|line| !line.contains('\n'));
    let found = said.or_else(|| boxed(solution)).or_else(dollars).or_else(line)?;
    Some(normalized(found)).filter(|answer| !answer.is_empty())
}

/// What is in the last `\boxed` or `\fbox`.
fn boxed(text: &str) -> Option<&str> {
    let start = text.rfind("\\boxed").max(text.rfind("\\fbox"))?;
    let rest = &text[start..];
    let open = rest.find(['{', ' '])?;
    if rest.as_bytes()[open] == b' ' {
        // `\boxed 5`, up to the formula's end.
        return Some(rest[open..].split('$').next()?.trim());
    }
    let mut depth = 0;
    for (at, c) in rest[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&rest[open + 1..open + at]);
        }
    }
    None
}

/// The form in which the benchmark's authors compare answers: without spaces, units, degrees and signs of size, fractions and roots in braces.
fn normalized(answer: &str) -> String {
    let mut text = answer.replace(['\n'], "").replace("\\!", "").replace("\\\\", "\\");
    for (from, to) in [("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")] {
        text = text.replace(from, to);
    }
    for gone in ["^{\\circ}", "^\\circ", "\\$"] {
        text = text.replace(gone, "");
    }
    // Units stand at the end.
    if let Some((before, _)) = text.split_once("\\text{ ") {
        text = before.to_string();
    }
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.");
    if text.starts_with('.') {
        text.insert(0, '0');
    }
    // `x = 5` is 5.
    if let [name, value] = text.split('=').collect::<Vec<_>>()[..]
        && name.chars().count() <= 2
    {
        text = value.to_string();
    }
    let text = fractions(&roots(&text).replace(' ', ""));
    match text.as_str() {
        "0.5" => "\\frac{1}{2}".into(),
        _ => slash(&text).unwrap_or(text),
    }
}

/// `\sqrt3` is `\sqrt{3}`.
fn roots(text: &str) -> String {
    let mut parts = text.split("\\sqrt");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        out += "\\sqrt";
        match part.chars().next() {
            Some(first) if first != '{' => out += &format!("{{{first}}}{}", &part[first.len_utf8()..]),
            _ => out += part,
        }
    }
    out
}

/// `\frac12` and `\frac1{2}` are `\frac{1}{2}`.
fn fractions(text: &str) -> String {
    let mut parts = text.split("\\frac");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        out += "\\frac";
        let mut chars = part.chars();
        match (chars.next(), chars.next()) {
            (Some('{'), _) => out += part,
            (Some(a), Some('{')) => out += &format!("{{{a}}}{{{}", chars.as_str()),
            (Some(a), Some(b)) => out += &format!("{{{a}}}{{{b}}}{}", chars.as_str()),
            // Not a fraction: all stays as it is.
            _ => return text.to_string(),
        }
    }
    out
}

/// `1/2` is `\frac{1}{2}`, of whole numbers.
fn slash(text: &str) -> Option<String> {
    let (a, b) = text.split_once('/')?;
    let (a, b): (i64, i64) = (a.parse().ok()?, b.parse().ok()?);
    (format!("{a}/{b}") == text).then(|| format!("\\frac{{{a}}}{{{b}}}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solutions_have_an_answer() {
        for (solution, expected) in [
            ("So $x = \\boxed{\\frac{3}{4}}$.", "\\frac{3}{4}"),
            ("First \\boxed{1}, then $\\boxed{\\text{(A)}}$", "\\text{(A)}"),
            ("It is $\\boxed 7$ then", "7"),
            ("Final Answer: The final answer is $\\frac12$. I hope it is correct.", "\\frac{1}{2}"),
            ("The final answer is 12.\nProblem", "12"),
            ("is $5$, so $x=5$", "5$,so$x=5"),
            (" 0.5 ", "\\frac{1}{2}"),
        ] {
            assert_eq!(answer(solution).as_deref(), Some(expected), "{solution}");
        }
        for none in ["", "two\nlines", "open:\n\\boxed{1"] {
            assert_eq!(answer(none), None, "{none}");
        }
    }

    /// The pairs that the authors' own comparison is tested with, and more.
    #[test]
    fn equal_answers_are_the_same() {
        for (a, b, same) in [
            ("\\tfrac{1}{2}", "\\dfrac12", true),
            ("1/2", "\\frac{1}{2}", true),
            ("3\\sqrt3", "3\\sqrt{3}", true),
            ("\\frac1{72}", "\\frac{1}{72}", true),
            ("x = 5", "5", true),
            ("90^\\circ", "90", true),
            ("10\\text{ inches}", "10", true),
            (".5", "0.5", true),
            ("50\\%", "50", true),
            ("\\left( 1, 2 \\right)", "(1,2)", true),
            ("\\$3", "3", true),
            ("1,000", "1000", false),
            ("x/2", "\\frac{x}{2}", false),
            ("abc = 5", "5", false),
        ] {
            assert_eq!(normalized(a) == normalized(b), same, "{a} {b}");
        }
    }
}
