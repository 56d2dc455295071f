//! Training n-gram models with interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998), as KenLM's `lmplz` estimates it
//! (Heafield et al., 2013).
//!
//! Counts of the longest n-grams are those of the text; a shorter one counts the distinct words before it, unless it begins a line. With
//! a(·) these counts, D(a) the discount of its order for counts 1, 2, 3 and more, and c' the context without its first word,
//!
//! p(w | c) = (a(c w) − D(a(c w))) / Σₓ a(c x) + γ(c) p(w | c'),   γ(c) = Σₓ D(a(c x)) / Σₓ a(c x),
//!
//! down to the uniform distribution over the vocabulary.

use super::ngram::{BEGIN, END, Entry, MAX_ORDER, NgramModel, Table, UNKNOWN, Units, key, no_words};
use crate::DataError;

/// An n-gram, zeros behind it.
type Ngram = [u32; MAX_ORDER];

impl NgramModel {
    /// Trains on lines. Memory grows with the text: about 60 bytes a word for order 5.
    ///
    /// # Errors
    /// [`DataError::Empty`] for a text too small to estimate the discounts from.
    ///
    /// # Panics
    /// If the order is not 1 to [`MAX_ORDER`].
    pub fn train(lines: impl Iterator<Item = impl AsRef<str>>, order: usize, units: Units) -> Result<Self, DataError> {
        assert!((1..=MAX_ORDER).contains(&order), "an order of {order}; 1 to {MAX_ORDER} are supported");
        let mut words = no_words();
        // By length: whole n-grams of the text, and the shorter ones that begin a line.
        let mut raw: Vec<Vec<Ngram>> = vec![Vec::new(); order];
        let mut ids = Vec::new();
        for line in lines {
            ids.clear();
            ids.push(BEGIN);
            units.split(line.as_ref(), |word| {
                let next = words.len() as u32;
                ids.push(match words.get(word) {
                    Some(&id) => id,
                    None => *words.entry(word.to_string()).or_insert(next),
                });
            });
            if ids.len() == 1 {
                continue;
            }
            ids.push(END);
            ids.windows(order).for_each(|window| raw[order - 1].push(ngram(window)));
            (1..order.min(ids.len() + 1)).for_each(|len| raw[len - 1].push(ngram(&ids[..len])));
        }

        let mut counts: Vec<Vec<(Ngram, u64)>> = vec![Vec::new(); order];
        for len in (1..=order).rev() {
            let mut grams = std::mem::take(&mut raw[len - 1]);
            if len < order {
                grams.extend(counts[len].iter().map(|(longer, _)| ngram(&longer[1..=len])));
            }
            grams.sort_unstable();
            counts[len - 1] = grams.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u64)).collect();
        }

        let mut tables: Vec<Table> = Vec::with_capacity(order);
        for len in 1..=order {
            let discounts = Discounts::of(&counts[len - 1])?;
            let mut table = Table::with_capacity_and_hasher(counts[len - 1].len(), Default::default());
            for group in counts[len - 1].chunk_by(|a, b| a.0[..len - 1] == b.0[..len - 1]) {
                // The start of a line is a context but never a word that follows one.
                let followers = || group.iter().filter(|(gram, _)| len > 1 || gram[0] != BEGIN);
                let sum = followers().map(|(_, count)| count).sum::<u64>() as f64;
                let gamma = followers().map(|(_, count)| discounts.of_count(*count)).sum::<f64>() / sum;
                for (gram, count) in followers() {
                    let shorter = match len {
                        1 => 1.0 / (words.len() - 1) as f64,
                        _ => 10f64.powf(f64::from(tables[len - 2][&key(&gram[1..len])].probability)),
                    };
                    let own = (*count as f64 - discounts.of_count(*count)) / sum;
                    let probability = (own + gamma * shorter).log10() as f32;
                    table.insert(key(&gram[..len]), Entry { probability, backoff: 0.0 });
                }
                match len {
                    1 => {
                        let unknown = (gamma / (words.len() - 1) as f64).log10() as f32;
                        table.insert(key(&[UNKNOWN]), Entry { probability: unknown, backoff: 0.0 });
                        table.insert(key(&[BEGIN]), Entry { probability: -99.0, backoff: 0.0 });
                    }
                    _ => {
                        if let Some(context) = tables[len - 2].get_mut(&key(&group[0].0[..len - 1])) {
                            context.backoff = gamma.log10() as f32;
                        }
                    }
                }
            }
            tables.push(table);
        }
        Ok(Self { words, tables, units })
    }
}

fn ngram(words: &[u32]) -> Ngram {
    let mut all = [0; MAX_ORDER];
    all[..words.len()].copy_from_slice(words);
    all
}

/// What counts of 1, 2, 3 and more lose.
struct Discounts([f64; 3]);

impl Discounts {
    /// Chen and Goodman's estimate from how many n-grams have counts of 1 to 4.
    fn of(counts: &[(Ngram, u64)]) -> Result<Self, DataError> {
        let mut n = [0u64; 5];
        counts.iter().filter(|(_, count)| *count <= 4).for_each(|(_, count)| n[*count as usize] += 1);
        if n[1] == 0 {
            let hint = "an n-gram model needs a larger text: no n-gram of some order occurs just once".to_string();
            return Err(DataError::Empty { path: Default::default(), hint });
        }
        let y = n[1] as f64 / (n[1] + 2 * n[2]) as f64;
        let discount = |count: usize| match n[count] {
            // lmplz's fallback for texts without such counts.
            0 => [0.5, 1.0, 1.5][count - 1],
            some => {
                (count as f64 - (count + 1) as f64 * y * n[count + 1] as f64 / some as f64).clamp(0.0, count as f64)
            }
        };
        Ok(Self([discount(1), discount(2), discount(3)]))
    }

    fn of_count(&self, count: u64) -> f64 {
        self.0[(count.clamp(1, 3) - 1) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: [&str; 8] = [
        "the cat sat on the mat",
        "the dog sat on the log",
        "a cat saw the dog",
        "the dog saw a cat",
        "on the mat the cat sat",
        "a log",
        "the mat",
        "dogs and cats sat",
    ];

    #[test]
    fn probabilities_sum_to_one_in_every_context() {
        let model = NgramModel::train(TEXT.iter(), 3, Units::Words).unwrap();
        let all: Vec<String> = model.words.keys().filter(|word| *word != "<s>").cloned().collect();
        for context in ["", "the", "the cat", "sat on", "never seen"] {
            let mut base = vec![BEGIN];
            model.ids(context, &mut base);
            let sum: f64 = all
                .iter()
                .map(|word| {
                    let ids: Vec<u32> = base.iter().copied().chain([model.words[word]]).collect();
                    let start = ids.len().saturating_sub(3);
                    10f64.powf(f64::from(model.log_probability(&ids[start..])))
                })
                .sum();
            assert!((sum - 1.0).abs() < 1e-5, "{context}: {sum}");
        }
    }

    #[test]
    fn text_like_the_training_text_is_less_perplexing() {
        let model = NgramModel::train(TEXT.iter(), 5, Units::Words).unwrap();
        let perplexity = |line: &str| model.perplexity([line].iter());
        assert!(perplexity("the cat sat on the log") < perplexity("log the on sat cat the"));
        assert!(perplexity("log the on sat cat the") < perplexity("zebra quantum flux"));
        assert!(model.perplexity([""].iter()).is_infinite());
    }

    #[test]
    fn an_arpa_file_holds_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lm.arpa");
        let model = NgramModel::train(TEXT.iter(), 4, Units::Words).unwrap();
        model.save_arpa(&path).unwrap();
        let read = NgramModel::load_arpa(&path, Units::Words).unwrap();
        for line in ["the cat sat", "a zebra on the mat", "x"] {
            assert!((model.score(line).0 - read.score(line).0).abs() < 1e-5, "{line}");
        }
        for (from, to) in
            [("ngram 2=", "ngram 2=9"), ("\\3-grams:", "\\7-grams:"), ("\tthe cat", "\tthe zebra"), ("-99", "x")]
        {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{from}");
            let broken = folder.path().join("broken.arpa");
            std::fs::write(&broken, text.replacen(from, to, 1)).unwrap();
            assert!(NgramModel::load_arpa(&broken, Units::Words).is_err(), "{from}");
        }
    }

    proptest::proptest! {
        /// A changed file is refused, or is a model that scores.
        #[test]
        fn changed_files_do_not_panic(changes in proptest::collection::vec((0.0f64..1.0, proptest::num::u8::ANY), 1..5)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("lm.arpa");
            NgramModel::train(TEXT.iter(), 3, Units::Words).unwrap().save_arpa(&path).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            for (place, byte) in changes {
                let at = (place * bytes.len() as f64) as usize;
                bytes[at] = byte;
            }
            std::fs::write(&path, bytes).unwrap();
            if let Ok(model) = NgramModel::load_arpa(&path, Units::Words) {
                model.perplexity(TEXT.iter());
            }
        }
    }

    #[test]
    fn too_little_text_is_an_error() {
        assert!(NgramModel::train(["a"; 0].iter(), 3, Units::Words).is_err());
    }
}
