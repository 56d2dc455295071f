//! A paper's own macros, expanded where they are used, with their arguments.
//!
//! `\newcommand`, `\renewcommand`, `\providecommand` (an optional argument with its default included), `\def` with `#1#2` parameters,
//! `\DeclareMathOperator` and `\let` are read. What programs TeX (conditionals, `@` names, delimited parameters) cannot be expanded
//! without running it: uses of it stay as they are.

use std::collections::HashMap;

/// Expansions inside expansions, at most.
const MAX_DEPTH: usize = 20;
/// A text may grow by this factor; hostile macros double with every level.
const MAX_GROWTH: usize = 10;

#[derive(Clone, Debug, PartialEq)]
struct Macro {
    arguments: usize,
    /// Of the first argument, which is optional then.
    default: Option<String>,
    body: String,
}

/// The macros that a text defines.
#[derive(Debug, Default)]
pub(super) struct Macros(HashMap<String, Macro>);

impl Macros {
    /// Reads all definitions; returns them with the text without them.
    pub(super) fn take(text: &str) -> (Self, String) {
        let mut macros = Self::default();
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        while let Some(found) = text[at..].find('\\') {
            let start = at + found;
            out.push_str(&text[at..start]);
            let end = command_end(text, start);
            let definition = match &text[start..end] {
                "\\newcommand" | "\\renewcommand" | "\\providecommand" | "\\DeclareRobustCommand" => {
                    new_command(text, end)
                }
                "\\def" | "\\gdef" | "\\edef" | "\\xdef" => def(text, end),
                "\\DeclareMathOperator" => operator(text, end),
                "\\let" => macros.let_equal(text, end),
                _ => None,
            };
            match definition {
                Some((name, definition, after)) => {
                    // Redefining a command in terms of itself, or a layout command of LaTeX, is left to TeX.
                    if let Some(definition) = definition.filter(|definition| expandable(&name, &definition.body)) {
                        macros.0.insert(name, definition);
                    }
                    at = after;
                }
                None => {
                    out.push_str(&text[start..end]);
                    at = end;
                }
            }
        }
        out.push_str(&text[at..]);
        (macros, out)
    }

    /// `\let\a=\b` or `\let\a\b`, where `\b` is a macro of the text.
    fn let_equal(&self, text: &str, at: usize) -> Option<(String, Option<Macro>, usize)> {
        let (name, at) = command(text, at)?;
        let at = skip_spaces(text, at);
        let at = skip_spaces(text, at + usize::from(text[at..].starts_with('=')));
        let (other, after) = command(text, at)?;
        let same = Macro { arguments: 0, default: None, body: other.clone() };
        Some((name, Some(self.0.get(&other).cloned().unwrap_or(same)), after))
    }

    /// The text with every use of a macro replaced by what it stands for.
    pub(super) fn expand(&self, text: &str) -> String {
        let mut budget = MAX_GROWTH * text.len() + 4096;
        let mut out = String::with_capacity(text.len());
        self.expand_into(text, MAX_DEPTH, &mut budget, &mut out);
        out
    }

    fn expand_into(&self, text: &str, depth: usize, budget: &mut usize, out: &mut String) {
        let mut at = 0;
        while let Some(found) = text[at..].find('\\') {
            let start = at + found;
            out.push_str(&text[at..start]);
            let end = command_end(text, start);
            let used = self.0.get(&text[start..end]).filter(|_| depth > 0).and_then(|found| found.apply(text, end));
            match used.filter(|(body, _)| body.len() <= *budget) {
                Some((body, after)) => {
                    *budget -= body.len();
                    let before = out.len();
                    self.expand_into(&body, depth - 1, budget, out);
                    if ends_in_name(&out[before..]) && text[after..].starts_with(|c: char| c.is_ascii_alphabetic()) {
                        out.push(' ');
                    }
                    at = after;
                }
                None => {
                    out.push_str(&text[start..end]);
                    at = end;
                }
            }
        }
        out.push_str(&text[at..]);
    }
}

impl Macro {
    /// The body with the arguments that follow a use, and where they end; `None` if they are not there.
    fn apply(&self, text: &str, end: usize) -> Option<(String, usize)> {
        let mut at = end;
        let mut arguments: Vec<&str> = Vec::with_capacity(self.arguments);
        if let Some(default) = &self.default {
            let optional = delimited(text, skip_spaces(text, at), b'[', b']');
            arguments.push(optional.map_or(default, |(inner, _)| inner));
            at = optional.map_or(at, |(_, after)| after);
        }
        while arguments.len() < self.arguments {
            let (argument, after) = argument(text, at)?;
            arguments.push(argument);
            at = after;
        }
        let mut body = String::with_capacity(self.body.len());
        let mut rest = self.body.as_str();
        while let Some(mark) = rest.find('#') {
            body.push_str(&rest[..mark]);
            let digit = rest[mark + 1..].bytes().next()?;
            let index = usize::from(digit.checked_sub(b'1')?);
            body.push_str(arguments.get(index)?);
            rest = &rest[mark + 2..];
            if ends_in_name(&body) && rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
                body.push(' ');
            }
        }
        body.push_str(rest);
        Some((body, at))
    }
}

/// `{\name}[n][default]{body}` or `\name..`, and where it ends.
fn new_command(text: &str, at: usize) -> Option<(String, Option<Macro>, usize)> {
    let at = at + usize::from(text[at..].starts_with('*'));
    let (name, at) = braced_command(text, at)?;
    let (mut arguments, mut default, mut at) = (0, None, skip_spaces(text, at));
    if let Some((count, after)) = delimited(text, at, b'[', b']') {
        arguments = count.trim().parse().ok().filter(|&count| count <= 9)?;
        at = skip_spaces(text, after);
        if let Some((value, after)) = delimited(text, at, b'[', b']') {
            default = Some(value.to_string());
            at = after;
        }
    }
    let (body, after) = argument(text, at)?;
    let default = default.filter(|_| arguments > 0);
    Some((name, Some(Macro { arguments, default, body: body.trim().into() }), after))
}

/// `\name#1#2{body}`. With other parameters, or a name TeX hides with `@`, the definition is passed over.
fn def(text: &str, at: usize) -> Option<(String, Option<Macro>, usize)> {
    let (name, at) = command(text, skip_spaces(text, at))?;
    let open = at + text[at..].find('{')?;
    let parameters = &text[at..open];
    if parameters.len() > 200 {
        return None;
    }
    let (body, after) = delimited(text, open, b'{', b'}')?;
    let count = parameters.matches('#').count();
    let simple: String = (1..=count).map(|index| format!("#{index}")).collect();
    let plain = parameters.trim() == simple && count <= 9;
    Some((name, plain.then(|| Macro { arguments: count, default: None, body: body.trim().into() }), after))
}

fn operator(text: &str, at: usize) -> Option<(String, Option<Macro>, usize)> {
    let star = usize::from(text[at..].starts_with('*'));
    let (name, at) = braced_command(text, at + star)?;
    let (body, after) = argument(text, at)?;
    let body = format!("\\operatorname{}{{{body}}}", if star == 1 { "*" } else { "" });
    Some((name, Some(Macro { arguments: 0, default: None, body }), after))
}

/// Whether a body can be put in place of a use.
fn expandable(name: &str, body: &str) -> bool {
    let programs = [
        "\\if",
        "\\else",
        "\\fi",
        "\\expandafter",
        "\\csname",
        "\\futurelet",
        "\\begingroup",
        "\\let",
        "\\def",
        "\\gdef",
        "##",
        "\\mathchoice",
    ];
    let mut itself = body.match_indices(name).any(|(at, _)| command_end(body, at) == at + name.len());
    itself |= name.len() < 2 || name == "\\par" || name == "\\item";
    !itself && !name.contains('@') && !body.contains('@') && !programs.iter().any(|word| body.contains(word))
}

/// The end of the command that begins with the backslash at `start`: letters (and `@`), or one other character.
pub(super) fn command_end(text: &str, start: usize) -> usize {
    let after = &text[start + 1..];
    match after.find(|c: char| !c.is_ascii_alphabetic() && c != '@') {
        Some(0) => start + 1 + after.chars().next().map_or(0, char::len_utf8),
        Some(letters) => start + 1 + letters,
        None => text.len(),
    }
}

/// Whether a text ends in the name of a command, which a letter after it would change.
fn ends_in_name(text: &str) -> bool {
    let letters = text.len() - text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len();
    letters > 0 && text[..text.len() - letters].ends_with('\\')
}

fn command(text: &str, at: usize) -> Option<(String, usize)> {
    let at = skip_spaces(text, at);
    text[at..].starts_with('\\').then(|| {
        let end = command_end(text, at);
        (text[at..end].to_string(), end)
    })
}

fn braced_command(text: &str, at: usize) -> Option<(String, usize)> {
    let at = skip_spaces(text, at);
    match delimited(text, at, b'{', b'}') {
        Some((inner, after)) => {
            let (name, end) = command(inner, 0)?;
            inner[end..].trim().is_empty().then_some((name, after))
        }
        None => command(text, at),
    }
}

/// An argument as TeX takes one: a group, a command, or a character.
fn argument(text: &str, at: usize) -> Option<(&str, usize)> {
    let at = skip_spaces(text, at);
    match text[at..].chars().next()? {
        '{' => delimited(text, at, b'{', b'}'),
        '\\' => {
            let end = command_end(text, at);
            Some((&text[at..end], end))
        }
        '}' => None,
        c => Some((&text[at..at + c.len_utf8()], at + c.len_utf8())),
    }
}

/// What stands between a bracket at `at` and its partner, and the place after that. Groups inside are whole.
fn delimited(text: &str, at: usize, open: u8, close: u8) -> Option<(&str, usize)> {
    let bytes = text.as_bytes();
    if bytes.get(at) != Some(&open) {
        return None;
    }
    let (mut braces, mut own) = (0usize, 0usize);
    let mut index = at;
    while index < bytes.len() {
        match bytes[index] {
            b'\\' => index += 1,
            byte if byte == close && braces == 0 && own == 1 => return Some((&text[at + 1..index], index + 1)),
            byte if byte == open && braces == 0 => own += 1,
            byte if byte == close && braces == 0 => own -= 1,
            b'{' => braces += 1,
            b'}' => braces = braces.checked_sub(1)?,
            _ => {}
        }
        index += 1;
    }
    None
}

/// Past spaces and at most one line end, as TeX skips them.
fn skip_spaces(text: &str, at: usize) -> usize {
    let rest = &text[at..];
    let trimmed = rest.trim_start_matches([' ', '\t']);
    let trimmed = trimmed.strip_prefix('\n').unwrap_or(trimmed).trim_start_matches([' ', '\t']);
    at + rest.len() - trimmed.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(text: &str) -> String {
        let (macros, rest) = Macros::take(text);
        macros.expand(&rest)
    }

    #[test]
    fn definitions_of_all_kinds() {
        assert_eq!(expand("\\newcommand\\a{x}\\a b"), "x b");
        assert_eq!(expand("\\newcommand*{\\f}[1]{f(#1)}\\f{\\f{y}}\\f z"), "f(f(y))f(z)");
        assert_eq!(expand("\\newcommand{\\g}[2][d]{#1:#2}\\g{e} \\g[h]{i}"), "d:e h:i");
        assert_eq!(expand("\\def\\a{b}\\let\\c=\\a\\c"), "b");
        assert_eq!(expand("\\DeclareMathOperator{\\tr}{tr}$\\tr A$"), "$\\operatorname{tr} A$");
        assert_eq!(expand("\\newcommand{\\al}{\\alpha}$\\al x$"), "$\\alpha x$");
        assert_eq!(expand("\\def\\a{\\alpha}\\def\\f#1{#1y}\\f\\a"), "\\alpha y");
    }

    #[test]
    fn what_programs_tex_stays() {
        assert_eq!(expand("\\def\\a{\\ifx b\\fi}\\a"), "\\a");
        assert_eq!(expand("\\def\\a#1.{x#1}\\a y."), "\\a y.");
        assert_eq!(expand("\\renewcommand{\\a}{\\a}\\a"), "\\a");
        assert_eq!(expand("\\newcommand{\\f}[1]{#1}\\f"), "\\f");
    }

    #[test]
    fn growth_is_bounded() {
        let mut text = String::from("\\def\\a{xxxxxxxxxx}");
        for (name, inner) in ('b'..='z').zip('a'..) {
            text += &format!("\\def\\{name}{{{}}}", format!("\\{inner}").repeat(10));
        }
        text += "\\z";
        assert!(expand(&text).len() < 100_000);
    }
}
