//! Log-probabilities of given texts, as evaluation needs them: many, short, and beginning alike.
//!
//! Texts are sorted, and those next to each other are read in one pass where that costs less than one after the other: what they share
//! is read once, into a cache of one row that the others then begin with, and their rests as a batch, padded at the end, where causal
//! attention does not see it.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use super::{PASS, absorb, common_prefix};
use crate::backend::ops;
use crate::{KvCache, Llama, LlamaBackend, ModelError};

/// A text whose end is to be scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoreRequest {
    /// The text.
    pub tokens: Vec<u32>,
    /// Where what is scored begins: 1 at least, for the first token comes after nothing.
    pub from: usize,
}

/// Tokens of a batch, at most, where it has several rows.
const BATCH: usize = 1024;
/// Positions of a batch's cache, at most, where it has several rows.
const CACHED: usize = 8192;
/// Positions of a prefix that are read in one pass, at most.
const CHUNK: usize = 512;
/// Positions whose logits exist at a time.
const LOGITS: usize = 128;

/// Natural log-probability of each of `tokens[from..]` given all before it, for each request.
///
/// # Errors
/// [`ModelError::Generation`] if nothing comes before `from`, [`ModelError::TokenOutOfRange`], and
/// [`ModelError::SequenceTooLong`] if more tokens come before the last than the model's context has.
pub fn score<B: LlamaBackend>(model: &Llama<B>, requests: &[ScoreRequest]) -> Result<Vec<Vec<f32>>, ModelError> {
    let (vocab_size, max, device) = (model.vocab_size(), model.max_seq_len(), &model.device());
    for ScoreRequest { tokens, from } in requests {
        if *from == 0 || *from > tokens.len() {
            let reason = format!("tokens from {from} of {} cannot be scored: one must come before", tokens.len());
            return Err(ModelError::Generation(reason));
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(ModelError::TokenOutOfRange { token, vocab_size });
        }
        if tokens.len() - 1 > max {
            return Err(ModelError::SequenceTooLong { len: tokens.len() - 1, max });
        }
    }
    let rows = rows(requests);
    let batches = batches(&rows);
    let longest = batches.iter().map(|batch| batch.prefix).max().unwrap_or(0);
    let mut prefix = Prefix { tokens: &[], cache: KvCache::new(model, 1, longest.max(1))? };
    let mut scores: Vec<Vec<f32>> =
        requests.iter().map(|request| vec![0.0; request.tokens.len() - request.from]).collect();
    for batch in batches {
        let rows = &rows[batch.rows];
        prefix.read(model, &rows[0].input[..batch.prefix])?;
        let hidden = rests(model, rows, &prefix)?;
        let width = hidden.dims()[1];
        // Where logits are wanted, as places in the flat batch.
        let places: Vec<(usize, usize)> =
            (0..rows.len()).flat_map(|row| (rows[row].first..rows[row].input.len()).map(move |at| (row, at))).collect();
        let hidden = hidden.flatten::<2>(0, 1);
        for places in places.chunks(LOGITS) {
            let ids = places.iter().map(|(row, at)| row * width + at - batch.prefix);
            let logits = model.head(hidden.clone().select(0, ints(ids, device)));
            // A position has a target in every request of its row that scores the token after it.
            let mut wanted = Vec::new();
            for (place, (row, at)) in places.iter().enumerate() {
                let scored = rows[*row].requests.iter().filter(|request| requests[**request].from <= at + 1);
                wanted.extend(scored.map(|request| (place, *request, at + 1)));
            }
            let targets =
                wanted.iter().map(|(place, request, at)| place * vocab_size + requests[*request].tokens[*at] as usize);
            let sums = ops::log_sum_exp(logits.clone());
            let sums = sums.select(0, ints(wanted.iter().map(|(place, ..)| *place), device));
            let log_probs = logits.flatten::<1>(0, 1).select(0, ints(targets, device)) - sums;
            let log_probs = log_probs.into_data().convert::<f32>().into_vec::<f32>();
            let log_probs = log_probs.map_err(|error| ModelError::Generation(format!("{error:?}")))?;
            for ((_, request, at), log_prob) in wanted.into_iter().zip(log_probs) {
                scores[request][at - requests[request].from] = log_prob;
            }
        }
    }
    Ok(scores)
}

fn ints<B: LlamaBackend>(ids: impl Iterator<Item = usize>, device: &B::Device) -> Tensor<B, 1, Int> {
    let ids: Vec<i32> = ids.map(|id| id as i32).collect();
    let len = ids.len();
    Tensor::from_data(TensorData::new(ids, [len]), device)
}

/// What is read of one text or of several that differ in the last token alone.
struct Row<'a> {
    /// All tokens but the last, which is only predicted.
    input: &'a [u32],
    /// First position whose logits are wanted.
    first: usize,
    requests: Vec<usize>,
}

/// The requests' rows, sorted.
fn rows(requests: &[ScoreRequest]) -> Vec<Row<'_>> {
    let input = |index: usize| &requests[index].tokens[..requests[index].tokens.len() - 1];
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|index| input(*index));
    let mut rows: Vec<Row> = Vec::new();
    for index in order {
        let first = requests[index].from - 1;
        match rows.last_mut().filter(|row| row.input == input(index)) {
            Some(row) => {
                row.first = row.first.min(first);
                row.requests.push(index);
            }
            None => rows.push(Row { input: input(index), first, requests: vec![index] }),
        }
    }
    rows
}

/// Rows that are read together, after a prefix that all have.
#[derive(Debug, PartialEq)]
struct Batch {
    rows: Range<usize>,
    prefix: usize,
}

/// Divides sorted rows into batches: a row joins the one before where that costs fewer tokens than a pass of its own.
fn batches(rows: &[Row]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut start = 0;
    while start < rows.len() {
        let head = &rows[start];
        let (mut end, mut prefix, mut longest) = (start + 1, head.first, head.input.len());
        while let Some(row) = rows.get(end) {
            let (n, common) = (end - start, common_prefix(head.input, row.input).min(row.first).min(prefix));
            let (len, width) = (row.input.len(), longest.max(row.input.len()));
            let joint = common + (n + 1) * (width - common);
            let apart = prefix + n * (longest - prefix) + PASS + len
                - common_prefix(rows[end - 1].input, row.input).min(row.first);
            if joint > apart || (n + 1) * (width - common) > BATCH || (n + 1) * width > CACHED {
                break;
            }
            (end, prefix, longest) = (end + 1, common, width);
        }
        // What the batch before has read may be enough.
        let read =
            batches.last().map_or(0, |last| common_prefix(&rows[last.rows.start].input[..last.prefix], head.input));
        let kept = read.min(prefix);
        let with_prefix = prefix - kept + PASS * usize::from(prefix > kept) + (end - start) * (longest - prefix);
        if (end - start) * (longest - kept) <= with_prefix {
            prefix = kept;
        }
        batches.push(Batch { rows: start..end, prefix });
        start = end;
    }
    batches
}

/// What the rows of a batch begin with.
struct Prefix<'a, B: LlamaBackend> {
    tokens: &'a [u32],
    cache: KvCache<B>,
}

impl<'a, B: LlamaBackend> Prefix<'a, B> {
    fn read(&mut self, model: &Llama<B>, tokens: &'a [u32]) -> Result<(), ModelError> {
        self.cache.truncate(common_prefix(self.tokens, tokens));
        self.tokens = tokens;
        let kept = self.cache.len();
        absorb(model, &mut self.cache, &tokens[kept..], CHUNK)
    }
}

/// Hidden states of the rows after their prefix, `[rows, width, d_model]`.
fn rests<B: LlamaBackend>(model: &Llama<B>, rows: &[Row], prefix: &Prefix<B>) -> Result<Tensor<B, 3>, ModelError> {
    let start = prefix.tokens.len();
    let longest = rows.iter().map(|row| row.input.len()).max().unwrap_or(0);
    let padded = |row: &Row| {
        let padding = longest - row.input.len();
        row.input[start..]
            .iter()
            .map(|token| *token as usize)
            .chain(std::iter::repeat_n(0, padding))
            .collect::<Vec<_>>()
    };
    let ids = ints(rows.iter().flat_map(padded), &model.device()).reshape([rows.len(), longest - start]);
    if start == 0 {
        return model.hidden(ids, None);
    }
    let mut cache = prefix.cache.empty_like(rows.len(), longest);
    cache.begin_with(&prefix.cache);
    model.hidden(ids, Some(&mut cache))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(tokens: impl IntoIterator<Item = u32>, from: usize) -> ScoreRequest {
        ScoreRequest { tokens: tokens.into_iter().collect(), from }
    }

    #[test]
    fn rows_that_begin_alike_share_what_they_begin_with() {
        // Two questions of 100 tokens after 700 that both have, each with four letters to choose from.
        let question = |id: u32, letter: u32| request((0..700).chain(id..id + 100).chain([letter]), 800);
        let requests: Vec<_> = [1000, 2000].iter().flat_map(|id| (1..5).map(|letter| question(*id, letter))).collect();
        let rows = rows(&requests);
        assert_eq!(rows.iter().map(|row| row.requests.len()).collect::<Vec<_>>(), [4, 4]);
        assert_eq!(batches(&rows), [Batch { rows: 0..2, prefix: 700 }]);
    }

    #[test]
    fn short_rows_are_read_as_a_batch_and_long_ones_alone() {
        let requests: Vec<_> = (0..40).map(|id| request(id..id + 20, 1)).collect();
        assert_eq!(batches(&rows(&requests)), [Batch { rows: 0..40, prefix: 0 }]);
        let requests: Vec<_> = (0..3).map(|id| request(id..id + 900, 1)).collect();
        assert_eq!(batches(&rows(&requests)).len(), 3);
        // Endings of 30 tokens after 80, of two questions.
        let ending = |id: u32, ending: u32| request((id..id + 80).chain(ending..ending + 30), 80);
        let requests: Vec<_> = [0, 5000].iter().flat_map(|id| (1..5).map(|n| ending(*id, 100 * n))).collect();
        assert_eq!(batches(&rows(&requests)), [Batch { rows: 0..4, prefix: 79 }, Batch { rows: 4..8, prefix: 79 }]);
    }
}
